"""Additive multiple instance learning (Javed et al., NeurIPS 2022): the logits are a sum of the tiles' own logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from workers.cam.bag import BagParts
from workers.models.heads.abmil import Attend
from workers.models.heads.head import PartsHead, activation_module


class AdditiveHead(PartsHead):
    """`logits = sum_i psi(a_i f_i)`, a the attention over the tiles and psi a small network.

    The bias inside psi counts once a tile: a bag's logits depend on its size.

    Parameters
    ----------
    features, classes, hidden, activation, dropout
        See `BagHead`.
    size, gated, attention_activation
        See `AttentionHead`.
    layers
        Widths of the layers inside psi; none: psi is linear.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 512,
        activation: str = "relu",
        dropout: float = 0.0,
        size: int = 128,
        gated: bool = False,
        attention_activation: str = "tanh",
        layers: Sequence[int] = (256,),
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        self.attend = Attend(self.width, size, gated=gated, activation=attention_activation)
        self.softmax = nn.Softmax(-1)
        widths = [self.width, *layers, classes]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            steps += [nn.Linear(before, after), activation_module(activation)]
        self.psi = nn.Sequential(*steps[:-1])

    def pool(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(N, C)`, each tile's share of the logits."""
        shares: Tensor = self.psi(self.softmax(self.attend(f)).T * f)
        return shares

    def classify(self, pooled: Tensor) -> Tensor:
        return pooled.sum(0)

    def attention(self, h: Tensor) -> Tensor:
        found: Tensor = self.softmax(self.attend(self.project(h)))
        return found

    def parts(self, h: Tensor) -> BagParts:
        """The shares, each counted once; no `energies`, since a share depends on the other tiles through the softmax."""
        shares = self.pool(self.project(h))
        return BagParts(
            attention=shares.new_ones(1, len(shares)),
            values=shares,
            weight=torch.eye(self.classes).to(shares),
            bias=shares.new_zeros(self.classes),
        )
