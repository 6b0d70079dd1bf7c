"""The rules of relevance propagation: how a layer deals out the relevance of its outputs to its inputs.

Written from Bach et al., PLoS ONE 10(7), 2015, and Montavon et al., Layer-Wise Relevance Propagation: An Overview, in
Explainable AI, Springer 2019. For a patent note see `workers.cam.relevance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from schemas.errors import SpecError

Rule = Literal["zero", "epsilon", "gamma", "zplus", "alphabeta", "zbox", "flat"]

Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(values, weights, bias or None) -> what the layer makes of them."""


class Term(NamedTuple):
    """One evaluation of a layer with changed values, weights and bias."""

    a: Tensor
    w: Tensor
    b: Tensor | None


class Share(NamedTuple):
    """`factor * R_j` is dealt out in proportion to `a_i w_ij`, summed over terms; the biases take part."""

    factor: float
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Rules:
    """Which rule for what, and their parameters (Montavon et al. 2019, table 1)."""

    conv: Rule = "zplus"
    """Convolutions, and batch norms that have none before them."""
    linear: Rule = "epsilon"
    first: Rule | None = None
    """The layers that see the input itself; None: no other rule than the rest."""
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    """`beta` is `alpha - 1`."""
    low: float | None = None
    """Least value of a pixel, for z-box; None: each tile's own."""
    high: float | None = None
    bias: bool = True
    """False: biases are left out of the denominators, so that none of the relevance stays with them."""

    def stabiliser(self, rule: Rule) -> float:
        """What denominators are kept away from 0 by: needed where terms of both signs meet."""
        return self.epsilon if rule in ("epsilon", "gamma") else 0.0

    @property
    def of_sums(self) -> float:
        """The same, of sums of branches and of pools."""
        return 0.0 if self.linear == "zero" else self.epsilon

    def shares(self, rule: Rule, a: Tensor, w: Tensor, b: Tensor | None) -> tuple[Share, ...]:
        """How a layer `sum_i a_i w_ij + b_j` deals out the relevance of its outputs by a rule.

        A bias is the weight of one more input of 1. For `zplus` and `alphabeta` the positive terms are those of positive
        products, which for `a >= 0` are those of positive weights; `gamma` changes weights, as published, whatever the sign of `a`.
        """
        b = b if self.bias else None
        if rule == "gamma":
            return (Share(1.0, (Term(a, w + self.gamma * w.clamp_min(0), _raised(b, self.gamma)),)),)
        if rule == "zplus":
            return (Share(1.0, _products(a, w, b, 1)),)
        if rule == "alphabeta":
            up, down = Share(self.alpha, _products(a, w, b, 1)), Share(1 - self.alpha, _products(a, w, b, -1))
            return (up, down) if self.alpha != 1 else (up,)
        if rule == "zbox":
            low, high = self._box(a)
            positive, negative = w.clamp_min(0), w.clamp_max(0)
            terms = (Term(a, w, None), Term(low, -positive, None), Term(high, -negative, None))
            return (Share(1.0, terms),)
        if rule == "flat":
            return (Share(1.0, (Term(torch.ones_like(a), torch.ones_like(w), None),)),)
        return (Share(1.0, (Term(a, w, b),)),)

    def _box(self, a: Tensor) -> tuple[Tensor, Tensor]:
        least, most = a.flatten(1).aminmax(dim=1)
        if (self.low is not None and bool((least < self.low).any())) or (
            self.high is not None and bool((most > self.high).any())
        ):
            msg = (
                f"the network's input spans {float(least.min()):.4g} to {float(most.max()):.4g}, beyond low = {self.low}, high = "
                f"{self.high} of rule z-box: give bounds of what the network sees (after the card's normalisation), or leave them out"
            )
            raise SpecError(msg)
        shape = (-1, *(1,) * (a.ndim - 1))
        low = least if self.low is None else torch.full_like(least, self.low)
        high = most if self.high is None else torch.full_like(most, self.high)
        return low.view(shape).expand_as(a), high.view(shape).expand_as(a)


def _raised(b: Tensor | None, gamma: float) -> Tensor | None:
    return None if b is None else b + gamma * b.clamp_min(0)


def _products(a: Tensor, w: Tensor, b: Tensor | None, sign: int) -> tuple[Term, ...]:
    """The terms whose products are positive (`sign` 1) or negative (-1)."""

    def of(sign: int, t: Tensor) -> Tensor:
        return t.clamp_min(0) if sign > 0 else t.clamp_max(0)

    bias = None if b is None else of(sign, b)
    positive = Term(of(1, a), of(sign, w), bias)
    if not bool((a < 0).any()):  # as behind a ReLU
        return (positive,)
    return positive, Term(of(-1, a), of(-sign, w), None)


def quotient(r: Tensor, z: Tensor, epsilon: float = 0.0) -> Tensor:
    """`r / (z + epsilon sign z)` with `sign 0 = 1`, and 0 where that denominator is 0: no input, no share."""
    z = torch.where(z < 0, z - epsilon, z + epsilon)
    return torch.where(z == 0, 0, r / torch.where(z == 0, 1, z))


def redistribute(r: Tensor, f: Affine, shares: Sequence[Share], epsilon: float = 0.0) -> Tensor:
    """Relevance of a layer's values, from that of its outputs.

    `R_i = factor sum_j a_i w_ij / (z_j + epsilon sign z_j) R_j`, with `z_j` the sum of the same terms and of the bias: a forward
    and a vector-Jacobian product for each term.

    Parameters
    ----------
    r
        `(B, *out)`.
    f
        The layer, affine in its values.
    shares
        From `Rules.shares`; the values are `(B, *in)`.
    epsilon
        Stabiliser of the denominators.

    Returns
    -------
    relevance
        `(B, *in)`.
    """
    total = torch.zeros_like(shares[0].terms[0].a)
    for factor, terms in shares:
        with torch.enable_grad():
            values = [t.a.detach().clone().requires_grad_() for t in terms]
            z = reduce(torch.add, (f(v, t.w, t.b) for v, t in zip(values, terms, strict=True)))
        slopes = torch.autograd.grad(z, values, quotient(r, z.detach(), epsilon))
        for t, slope in zip(terms, slopes, strict=True):
            total = total + factor * t.a * slope
    return total
