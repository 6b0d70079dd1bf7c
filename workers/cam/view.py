"""A batch and one target of it, as a method sees them; what is expensive is computed once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from workers.cam.capture import Split, SplitNet

Shared = TypeVar("Shared")


class Batch:
    """What all targets of a batch share: one pass through the network.

    Parameters
    ----------
    net
        The network, split at the explained layer.
    x
        `(B, C_in, *S)`.
    split
        Its activations and scores.
    seeds
        `(B,)` int64, a seed a tile: noise belongs to the tile, whichever worker computes it.
    """

    def __init__(self, net: SplitNet, x: Tensor, split: Split, seeds: Tensor) -> None:
        self.net = net
        self.x = x
        self.split = split
        self.seeds = seeds
        self.activations = split.activations.detach()
        self.grid = tuple(self.activations.shape[2:])
        self.a = full(self.activations).flatten(2)
        output = full(split.scores.detach())
        self.reading = net.readout.reading(output)
        self.scores = self.reading(output)
        self.shared: dict[Hashable, Any] = {}
        self.sound = self.a.isfinite().flatten(1).all(1) & self.scores.isfinite().all(1)


class View:
    """One target of a batch.

    Attributes
    ----------
    net, x, seeds
        Network, input `(B, C_in, *S)`, seed a tile `(B,)`.
    activations
        `(B, K, *grid)` detached, in the network's precision.
    a
        The same as `(B, K, Z)`, at least float32.
    scores
        `(B, C)` detached, at least float32.
    target
        `(B, C)`: the target of row `b` is the scalar `scores[b] @ target[b]`.
    """

    def __init__(self, batch: Batch, target: Tensor, retain: bool = True) -> None:
        self.net = batch.net
        self.x = batch.x
        self.seeds = batch.seeds
        self.activations = batch.activations
        self.grid = batch.grid
        self.a = batch.a
        self.scores = batch.scores
        self.reading = batch.reading
        self.target = target.to(batch.scores.dtype).expand_as(batch.scores)
        self._shared = batch.shared
        self._split = batch.split
        self._retain = retain

    def y(self, scores: Tensor, rows: Tensor | None = None) -> Tensor:
        """The target's scalar `(n,)` of other scores, as `Split` or `SplitNet.tail` give them.

        `rows` `(n,)` says which tile each belongs to: a region or a symbol is that of the tile as it was.
        """
        target = self.target if rows is None else self.target[rows]
        return (self.reading(full(scores), rows) * target).sum(1)

    @cached_property
    def g(self) -> Tensor:
        """`(B, K, Z)` gradient of the target with respect to the activations, at least float32."""
        with torch.enable_grad():
            y = self.y(self._split.scores)
        return full(self.net.grad(y, self._split.activations, retain=self._retain)).flatten(2)

    @cached_property
    def steady(self) -> Tensor:
        """`(B,)` whether the gradient is finite."""
        return self.g.isfinite().flatten(1).all(1)

    @cached_property
    def blind(self) -> Tensor:
        """`(B,)` whether the gradient is 0 everywhere: the layer does not move the target."""
        return (self.g == 0).flatten(1).all(1)

    def gradient(self, target: Tensor) -> Tensor:
        """`(B, K, Z)` gradient of another functional `(B, C)` of the same scores; such a method needs `tail`."""
        with torch.enable_grad():
            y = (self.reading(full(self._split.scores), None) * target).sum(1)
        return full(self.net.grad(y, self._split.activations, retain=True)).flatten(2)

    def once(self, key: Hashable, compute: Callable[[], Shared]) -> Shared:
        """What does not hang on the target, computed for the first view of the batch that asks."""
        if key not in self._shared:
            self._shared[key] = compute()
        found: Shared = self._shared[key]
        return found

    def noise(self, sample: int) -> Tensor:
        """Standard normal noise like `x`, a function of each tile's seed and of `sample` alone."""
        rows = []
        for seed in self.seeds.tolist():
            generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63)
            rows.append(torch.randn(self.x.shape[1:], generator=generator, dtype=torch.float32))
        return torch.stack(rows).to(self.x)


def full(tensor: Tensor) -> Tensor:
    """At least float32: sums over channels and cells are not made in half precision."""
    return tensor if tensor.element_size() >= 4 else tensor.float()
