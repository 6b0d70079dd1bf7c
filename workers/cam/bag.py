"""A bag of tile features and the head that reads it, as bag methods see them; what is expensive is computed once.

Two kinds of head. Where the logits are a softmax-weighted sum of one number a tile (`BagParts` with `energies`), everything a
method asks, gradients included, is `(N, C)` numbers and one pass over the features in chunks: 100,000 float16 features
never become float32 at once. Any other head sees its whole bag, in its own precision, one bag at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.capture import frozen

CHUNK = 8192
"""Tiles whose features are in the head's precision at once."""


@dataclass(frozen=True)
class BagParts:
    """Logits as a sum over tiles: `logits[c] = sum_i attention[g(c), i] * (values[i] @ weight[c]) + bias[c]`.

    `g(c)` is c where there is an attention a class, else 0. Differentiable in the features: nothing is detached.
    """

    attention: Tensor
    """`(G, N)`, G = 1 or C."""
    values: Tensor
    """`(N, M)`."""
    weight: Tensor
    """`(C, M)`."""
    bias: Tensor
    """`(C,)`."""
    energies: Tensor | None = None
    """`(G, N)`: what `attention` is the softmax of (mean pooling: zeros). Given only where neither energies nor values of a
    tile depend on the other tiles, so that `parts` of some tiles are those rows; None: the sum holds for this bag alone."""


class BagView:
    """A bag and the targets it is explained for.

    Attributes
    ----------
    head
        `head(h (N, D)) -> logits (C,)`; `attention(h)` and `parts(h)` where it has them.
    h
        `(N, D)` features in any precision, as they were predicted from.
    targets
        `(T, C)`: target t is the scalar `logits @ targets[t]`.
    seed
        Of methods that use noise.
    """

    def __init__(self, head: nn.Module, h: Tensor, targets: Tensor, seed: int = 0) -> None:
        if h.ndim != 2 or not len(h):
            msg = f"the bag has features of shape {tuple(h.shape)}; expected (tiles, numbers a tile) with at least one tile"
            raise ModelError(msg)
        self.head = head
        self.h = h.detach()
        like = next(head.parameters(), torch.empty(0))
        self.dtype = like.dtype
        self.device = like.device
        self.targets = targets.to(self.device, self.dtype)
        self.seed = seed
