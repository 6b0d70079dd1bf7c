"""Several maps as one: brought onto one grid, weighted, and multiplied or added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import CellGeometry

How = Literal["product", "sum"]


def combine(maps: Sequence[Tensor], weights: Sequence[float] | None = None, how: How = "product") -> Tensor:
    """Maps of J layers as one.

    Parameters
    ----------
    maps
        J tensors of one shape.
    weights
        J numbers of at least 0, of any sum: equal, a ramp, the accuracies of linear probes. None: equal.
    how
        `product`: `exp(sum w log m)`, 0 wherever a map of weight above 0 is; maps must not be negative.
        `sum`: `sum w m`.

    Returns
    -------
    Tensor
        Like each map. Equal maps give themselves.

    Raises
    ------
    SpecError
        Weights that are no weights of these maps, or negative values in a product.
    """
    given = [1.0] * len(maps) if weights is None else [float(w) for w in weights]
    total = sum(given)
    if len(given) != len(maps) or not 0 < total < math.inf or min(given) < 0:
        msg = f"weights {given} for {len(maps)} maps: expected as many, none below 0, not all 0"
        raise SpecError(msg)
    # a layer of weight 0 has no say, not even by 0 ** 0 or 0 * infinity
    parts = [(w / total, m) for w, m in zip(given, maps, strict=True) if w > 0]
    if how == "sum":
        return torch.stack([w * m for w, m in parts]).sum(0)
    if any(bool((m < 0).any()) for _, m in parts):
        msg = "a geometric mean of maps with negative values is not defined: combine them by 'sum'"
        raise SpecError(msg)
    return torch.stack([w * m.log() for w, m in parts]).sum(0).exp()


def ramp(n: int) -> list[float]:
    """Weights 1/n, 2/n ... 1."""
    return [(j + 1) / n for j in range(n)]


def minmax(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `(B, *grid)` to 0..1; a constant row to 0, and True for it in the second `(B,)`."""
    rows = maps.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    flat = low == high
    return ((rows - low) / torch.where(flat, 1, high - low)).reshape(maps.shape), flat[:, 0]


def resample(maps: Tensor, cells: CellGeometry, onto: CellGeometry) -> Tensor:
    """Maps `(B, *cells.shape)` read linearly at the cell centres of another grid; beyond the outer centres, constant."""
    for axis, n in enumerate(cells.shape):
        centres = (
            torch.arange(onto.shape[axis], dtype=torch.float64) * onto.cell_px[axis]
            + onto.first_centre_px[axis]
        )
        at = ((centres - cells.first_centre_px[axis]) / cells.cell_px[axis]).clamp(0, n - 1)
        low = at.floor().clamp(max=max(n - 2, 0)).long()
        share = (at - low).to(maps).view(-1, *[1] * (maps.ndim - 2 - axis))
        low = low.to(maps.device)
        before = maps.index_select(axis + 1, low)
        maps = before + share * (maps.index_select(axis + 1, (low + 1).clamp(max=n - 1)) - before)
    return maps
