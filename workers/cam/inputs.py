"""Gradients through the whole network down to its input, and pixels gathered into coarser cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.view import View

TILES_AT_ONCE = 8
"""Tiles whose graph of the whole network is held at once: trunk included, it is many times that of the tail."""


def parts(view: View) -> Iterator[Tensor]:
    """Row numbers of a batch, some at a time; rows do not interact, so that it may be taken apart."""
    for first in range(0, len(view.x), TILES_AT_ONCE):
        yield torch.arange(first, min(first + TILES_AT_ONCE, len(view.x)), device=view.x.device)


def attached(view: View, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles `(n, C_in, *S)` as a leaf, and the target's scalars `(n,)` attached to it.

    Raises
    ------
    ModelError
        The scores do not depend on the input in a way that can be differentiated.
    """
    leaf = view.x[rows].clone().requires_grad_()
    with torch.enable_grad():
        y = view.y(view.net.end_to_end(leaf), rows)
    if not y.requires_grad:
        msg = (
            "the scores cannot be differentiated down to the input: the network runs a part of itself without a graph "
            "(`no_grad`, `detach`, a lookup). Use a method that needs no more than the layer, such as 'gradcam'"
        )
        raise ModelError(msg)
    return leaf, y


def coarse(tile: Sequence[int], cell: int) -> tuple[int, ...]:
    """Cells an axis where each is of at most `cell` px and all of an axis are equal."""
    return tuple(math.ceil(n / cell) for n in tile)


def sum_onto(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums `(B, *s)` -> `(B, *grid)`: both grids part the same tile evenly, and a cell's value is split by overlap.

    What a cell holds is conserved: either tensor has the same sum.
    """
    for axis, m in enumerate(grid, start=1):
        n = values.shape[axis]
        if n != m:
            values = torch.tensordot(values, _overlap(n, m).to(values), dims=([axis], [0])).movedim(-1, axis)
    return values


def mean_onto(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Means `(B, *s)` -> `(B, *grid)` by area."""
    return sum_onto(values, grid) * (math.prod(grid) / math.prod(values.shape[1:]))


def _overlap(n: int, m: int) -> Tensor:
    """`(n, m)`: the share of each of n even cells of an axis that lies in each of m. In units of 1 / (n m), whole."""
    start, to = torch.arange(n)[:, None] * m, torch.arange(m) * n
    common = torch.minimum(start + m, to + n) - torch.maximum(start, to)
    return common.clamp_min(0).double() / m
