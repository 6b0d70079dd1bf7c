"""Any part of a bag in closed form, where its logits are softmax-weighted means of one number a tile and class.

All in float64 and without subtracting what was added: the logit of a bag without tile i is a mean over the others, not a
difference of two sums, so that a tile that holds all the attention may be taken out too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """`logits[c] = sum_i softmax(energies[:, c])_i * evidence[i, c] + bias[c]`, of any part of the bag."""

    energies: Tensor
    """`(N, C)` float64."""
    evidence: Tensor
    """`(N, C)` float64."""
    bias: Tensor
    """`(C,)` float64."""

    @cached_property
    def attention(self) -> Tensor:
        """`(N, C)`, each column sums to 1."""
        return self.energies.softmax(0)

    @cached_property
    def mean(self) -> Tensor:
        """`(C,)`: the logits without their bias."""
        return (self.attention * self.evidence).sum(0)

    @property
    def logits(self) -> Tensor:
        """`(C,)`."""
        return self.mean + self.bias

    @cached_property
    def without_each(self) -> Partial:
        """For every tile the sums over all others, `(N, C)` each; nothing where it is the only one."""
        top, first = self.energies.max(0)
        share = (self.energies - top).exp()
        rest = Partial(top.expand_as(share).clone(), _exclusive(share), _exclusive(share * self.evidence))
        # beside a tile with far the largest energy the others vanish; without it they must not
        for c, i in enumerate(first.tolist()):
            others = torch.arange(len(share), device=share.device) != i
            alone = partial(self.energies[others, c], self.evidence[others, c])
            for whole, one in zip(
                (rest.top, rest.share, rest.sum), (alone.top, alone.share, alone.sum), strict=True
            ):
                whole[i, c] = one
        return rest

    def of_suffixes(self, order: Tensor, starts: Sequence[int]) -> Tensor:
        """Logits `(S, C)` of the tiles `order[s:]` for each s of the ascending `starts`; NaN of none.

        Reverse cumulative sums: each tile is read once.
        """
        kept: Partial | None = None
        logits = []
        for first, end in reversed(list(zip(starts, [*starts[1:], len(order)], strict=True))):
            rows = order[first:end]
            found = partial(self.energies[rows], self.evidence[rows])
            kept = found if kept is None else kept.joined(found)
            logits.append(kept.mean + self.bias)
        return torch.stack(logits[::-1])


@dataclass(frozen=True)
class Partial:
    """Sums over some tiles, `share` and `sum` in units of `exp(top)`."""

    top: Tensor
    share: Tensor
    sum: Tensor

    @property
    def mean(self) -> Tensor:
        """NaN of no tiles."""
        return self.sum / self.share

    def joined(self, other: Partial) -> Partial:
        """Sums over the tiles of both."""
        top = torch.maximum(self.top, other.top)
        mine, theirs = ((p.top - top).nan_to_num(-torch.inf).exp() for p in (self, other))
        return Partial(top, mine * self.share + theirs * other.share, mine * self.sum + theirs * other.sum)


def partial(energies: Tensor, evidence: Tensor) -> Partial:
    """Sums over the first axis; of no tiles: `top` -inf, the rest 0."""
    if not len(energies):
        zero = energies.new_zeros(energies.shape[1:])
        return Partial(zero - torch.inf, zero, zero)
    top = energies.amax(0)
    share = (energies - top).exp()
    return Partial(top, share.sum(0), (share * evidence).sum(0))


def _exclusive(values: Tensor) -> Tensor:
    """Sum over all rows but each: what comes before it, plus what comes after."""
    zero = torch.zeros_like(values[:1])
    before = torch.cat([zero, values[:-1].cumsum(0)])
    after = torch.cat([values[1:].flip(0).cumsum(0).flip(0), zero])
    return before + after
