"""LRP of a bag head: what its logit is made of, followed back to the tiles layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.cam.bag import BagView
from workers.cam.capture import frozen
from workers.cam.method import Options
from workers.cam.relevance_rules import LinearRule, RelevanceRules

TOKENS = ("cls_token",)
"""Learned tokens that heads put beside their tiles, as the last word of a parameter's name."""


class LrpOptions(Options):
    """Rule of the linear layers, and whether biases take their share."""

    rule: Literal["0", "epsilon", "gamma"] = "0"
    epsilon: float = Field(default=1e-6, ge=0)
    gamma: float = Field(default=0.25, ge=0)
    biases: Literal["share", "drop"] = "share"

    @property
    def linear(self) -> LinearRule:
        """The rule itself."""
        return LinearRule(self.rule, self.epsilon, self.gamma, self.biases)


def lrp(bag: BagView, options: LrpOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Relevance of each tile's features (Hense et al., xMIL, NeurIPS 2024; rules of Jafari et al., RelP, 2025).

    Attention is a constant, and is that of the unchanged head. Relevance is conserved: tiles, learned tokens and biases
    together make up the target.

    Returns
    -------
    relevance
        `(N, T)`.
    facts
        `cls`: what flowed into learned tokens, and so left the bag; much of it means that the head ignores its tiles.
        `bias`: what the biases took. `rest`: what is missing from the target (constants that the head adds by other
        means than layers; rounding).
    """
    coefficients, cls, bias = _propagate(bag, bag.h, options.linear)
    h = bag.h.to(coefficients[0])
    found = torch.stack([(h * c).sum(1) for c in coefficients], dim=1).double()
    return found, {"cls": cls, "bias": bias, "rest": bag.wide @ bag.logits - found.sum(0) - cls - bias}


def coefficients(bag: BagView, rule: LinearRule) -> list[Tensor]:
    """A target each: `(N, D)`, what a small change of the features is worth under the rules (RelP's coefficients)."""
    return _propagate(bag, bag.h, rule)[0]


def _propagate(bag: BagView, h: Tensor, rule: LinearRule) -> tuple[list[Tensor], Tensor, Tensor]:
    leaf = h.to(bag.device, bag.dtype).clone().requires_grad_()
    tokens = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in bag.head.named_parameters()
        if name.rpartition(".")[2] in TOKENS
    }
    with frozen(bag.head):
        with RelevanceRules(rule) as rules:
            logits = torch.func.functional_call(bag.head, tokens, (leaf,))
        beside, biases = list(tokens.values()), rules.biases
        found, cls, bias = [], [], []
        nothing = leaf.new_zeros((), dtype=torch.float64)
        for t, target in enumerate(bag.targets):
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                logits @ target,
                [leaf, *beside, *biases],
                retain_graph=t + 1 < len(bag.targets),
                allow_unused=True,
            )
            coefficient, *others = gradients
            found.append(torch.zeros_like(leaf) if coefficient is None else coefficient)
            taken = [
                nothing if g is None else (p.detach() * g).double().sum()
                for p, g in zip([*beside, *biases], others, strict=True)
            ]
            cls.append(sum(taken[: len(beside)], nothing))
            bias.append(sum(taken[len(beside) :], nothing))
    return found, torch.stack(cls), torch.stack(bias)
