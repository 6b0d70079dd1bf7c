"""Patch flipping: how a bag's logits change while its tiles are taken out, the most or the least relevant first.

A faithful attribution makes the curve fall at once when what speaks for the target goes first, and stay up when that goes
last (Hense et al., xMIL, NeurIPS 2024). Steps hold equal counts of tiles; equal relevances leave in the bag's order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import SpecError
from workers.cam.bag import BagView
from workers.cam.bag_methods import probabilities

STEPS = 100


@dataclass(frozen=True)
class Flipping:
    """Logits of what is left of the bag. The empty bag has none: the curves end one step before it."""

    fraction: Tensor
    """`(S,)` float64, share of the tiles taken out: 0 first."""
    most: Tensor
    """`(T, S, C)` float64: the tiles most relevant for target t are taken out first."""
    least: Tensor
    """The same, least relevant first."""
    targets: Tensor
    """`(T, C)`."""

    @property
    def most_area(self) -> Tensor:
        """`(T,)`: mean probability of the target along the curve; low is faithful."""
        return self._area(self.most)

    @property
    def least_area(self) -> Tensor:
        """`(T,)`; high is faithful."""
        return self._area(self.least)

    @property
    def gain(self) -> Tensor:
        """`(T,)`: area between the two curves (symmetric relevance gain); of a random order 0 on average."""
        return self.least_area - self.most_area

    def scores(self, logits: Tensor) -> Tensor:
        """The targets themselves `(T, S)`, of `most` or `least`."""
        return torch.einsum("tsc,tc->ts", logits, self.targets)

    def _area(self, logits: Tensor) -> Tensor:
        p = torch.stack(
            [probabilities(curve, t[None])[:, 0] for curve, t in zip(logits, self.targets, strict=True)]
        )
        if p.shape[1] == 1:
            return p[:, 0]
        return torch.trapezoid(p, self.fraction) / self.fraction[-1]


def flipping(bag: BagView, relevance: Tensor, steps: int = STEPS) -> Flipping:
    """Take the tiles out in `steps` steps of equal count, by relevance.

    Where any part of the bag is a sum over its tiles, one sort and cumulative sums in float64; else a forward pass a step, with
    the tiles that are left in the bag's order.

    Parameters
    ----------
    bag
        Head, features and targets.
    relevance
        `(N, T)`, a column a target.
    steps
        S; no more than there are tiles.

    Raises
    ------
    SpecError
        Relevances are not finite (a tile without one has no place in the order), or not of this bag.
    """
    if relevance.shape != (len(bag), len(bag.targets)) or not bool(relevance.isfinite().all()):
        msg = (
            f"relevances of shape {tuple(relevance.shape)}, {int((~relevance.isfinite()).sum())} of them not finite; expected "
            f"({len(bag)}, {len(bag.targets)}), all finite: a tile without one has no place in the order"
        )
        raise SpecError(msg)
    count = min(steps, len(bag))
    starts = [s * len(bag) // count for s in range(count)]
    curves = [
        torch.stack(
            [_curve(bag, column.argsort(descending=down, stable=True), starts) for column in relevance.T]
        )
        for down in (True, False)
    ]
    fraction = torch.tensor(starts, dtype=torch.float64, device=bag.device) / len(bag)
    return Flipping(fraction, curves[0], curves[1], bag.wide)


def _curve(bag: BagView, order: Tensor, starts: list[int]) -> Tensor:
    """Logits `(S, C)` of `order[s:]`."""
    if bag.sums is not None:
        return bag.sums.of_suffixes(order.to(bag.device), starts)
    left = order.to(bag.h.device)
    return torch.stack([bag.forward(bag.h[left[s:].sort().values]) for s in starts])
