"""Tile maps in, one block of the heatmap out.

The rule. Heatmap px `j` has its centre at level-0 `(j + 1/2) * downsample`. A tile speaks for a px whose
centre lies in the tile's box. It says there the linear interpolation between its cell centres (a separable
product over axes), held constant outside their hull; it counts there with its cells' importances
interpolated the same way, times `HELD` for each axis on which it only holds: a tile that interpolates
outweighs one that extrapolates. The px is the importance-weighted mean over the tiles that speak.
Where heatmap px are coarser than cells, interpolation at the centre becomes the exact mean of the same
interpolant over the part of the px that lies in the box.

Everything is elementwise float64 in ascending tile order, so that the bits of a px do not depend on the
block it is computed in (a matrix product would not promise that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import Coverage, TileStatus
from schemas.run import MapGrid

HELD = 1e-3
BATCH_PX = 1 << 20
"""Tiles of one geometry are resampled together, up to this many px."""
SLAB_PX = 1 << 22
"""A block is blended in slabs of its first axis of about this many px, which bounds the memory of a volume's."""


@dataclass(frozen=True)
class AxisWeights:
    """One axis of a tile on the heatmap's px."""

    cells: NDArray[np.intp]
    """`(px, taps)` cells that a px is made from."""
    weights: NDArray[np.float64]
    """`(px, taps)`, rows sum to 1."""
    importance: NDArray[np.float64]
    """`(px,)`."""


@lru_cache(maxsize=4096)
def axis_weights(
    offset_l0: float, px: int, length_l0: int, downsample: int, first: float, step: float, factor: bytes
) -> AxisWeights:
    """Weights of the `px` heatmap px whose centres lie at `offset_l0 + i * downsample` from a tile's start.

    Parameters
    ----------
    length_l0
        Length of the tile's box, clipped to the image.
    first, step
        First cell's centre and the distance to the next, from the tile's start, level-0 px.
    factor
        float64 importance of the cells, as bytes.
    """
    importance = np.frombuffer(factor)
    last = len(importance) - 1
    centre = offset_l0 + downsample * np.arange(px)
    u = (centre - first) / step
    if downsample > step:
        low = (np.maximum(centre - downsample / 2, 0.0) - first) / step
        high = (np.minimum(centre + downsample / 2, float(length_l0)) - first) / step
        taps = int(np.ceil(downsample / step)) + 2
        cells = np.clip(np.floor(low), 0, last).astype(np.intp)[:, None] + np.arange(taps)
        weights = (_hat_integral(high[:, None], cells, last) - _hat_integral(low[:, None], cells, last)) / (
            high - low
        )[:, None]
        weights[cells > last] = 0.0
        cells = np.minimum(cells, last)
    else:
        inside = np.clip(u, 0.0, last)
        left = np.minimum(np.floor(inside), max(last - 1, 0)).astype(np.intp)
        cells = np.minimum(np.stack([left, left + 1], axis=1), last)
        weights = np.stack([1.0 - (inside - left), inside - left], axis=1)
    at_px = sum(importance[cells[:, t]] * weights[:, t] for t in range(cells.shape[1]))
    if last > 0:  # a single cell is painted over its whole tile: nothing is extrapolated
        at_px = np.where((u < 0.0) | (u > last), HELD * at_px, at_px)
    return AxisWeights(cells, weights, at_px)


def _hat_integral(u: NDArray[np.float64], cell: NDArray[np.intp], last: int) -> NDArray[np.float64]:
    """Integral, up to `u`, of what `cell` adds to the interpolant: a hat; the outer ones held constant."""
    t = u - cell
    rising = np.where(cell == 0, np.minimum(t, 0.0), 0.5 * (np.clip(t, -1.0, 0.0) + 1.0) ** 2 - 0.5)
    falling = np.where(cell == last, np.maximum(t, 0.0), 0.5 - 0.5 * (1.0 - np.clip(t, 0.0, 1.0)) ** 2)
    return rising + falling


def px_range(boxes: NDArray[np.int64], downsample: tuple[int, ...]) -> NDArray[np.int64]:
    """`(N, 2, axes)` half-open range of the heatmap px whose centres lie in level-0 boxes."""
    ds = np.array(downsample, dtype=np.int64)
    # (j + 1/2) * ds >= start  <=>  j >= (2 * start - ds) / (2 * ds)
    return -(-(2 * boxes - ds) // (2 * ds))


def blend_block(
    block: NDArray[np.int64],
    downsample: tuple[int, ...],
    boxes: NDArray[np.int64],
    maps: NDArray[np.float32],
    grid: MapGrid,
    importance: tuple[NDArray[np.float64], ...],
) -> NDArray[np.float32]:
    """Blend tile maps into one block of one channel.

    Parameters
    ----------
    block
        `(2, axes)` box in heatmap px.
    downsample
        Level-0 px a heatmap px.
    boxes
        `(n, 2, axes)` level-0 boxes of the tiles that have a map, ascending tile index, clipped to the image.
    maps
        `(n, *grid)` their maps of this channel.
    grid
        Cell geometry.
    importance
        Factors of `cell_importance`.

    Returns
    -------
    ndarray
        `(*block)` float32; NaN where no tile speaks.
    """
    shape = tuple((block[1] - block[0]).tolist())
    out = np.empty(shape, np.float32)
    thick = max(1, SLAB_PX // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], thick):
        slab = block.copy()
        slab[0, 0] += first
        slab[1, 0] = min(slab[0, 0] + thick, block[1, 0])
        out[first : first + thick] = _blend_slab(slab, downsample, boxes, maps, grid, importance)
    return out


def _blend_slab(
    block: NDArray[np.int64],
    downsample: tuple[int, ...],
    boxes: NDArray[np.int64],
    maps: NDArray[np.float32],
    grid: MapGrid,
    importance: tuple[NDArray[np.float64], ...],
) -> NDArray[np.float32]:
    shape = tuple((block[1] - block[0]).tolist())
    if not len(boxes):
        return np.full(shape, np.nan, np.float32)
    total, weight = np.zeros(shape), np.zeros(shape)
    px = px_range(boxes, downsample)
    low, high = np.maximum(px[:, 0], block[0]), np.minimum(px[:, 1], block[1])
    # offsets of the first px centre from the tile's start; multiples of 1/2, hence exact
    offset = (low + 0.5) * np.array(downsample) - boxes[:, 0]
    count, length = high - low, boxes[:, 1] - boxes[:, 0]
    factors = [f.tobytes() for f in importance]
    where, offsets, counts, lengths = low - block[0], offset.tolist(), count.tolist(), length.tolist()
    targets, sizes = where.tolist(), count.prod(axis=1).tolist()
    rows = np.flatnonzero((count > 0).all(axis=1)).tolist()
    begin = 0
    while begin < len(rows):
        # a run of tiles, in order: resampled by geometry, then added one after another
        end, budget = begin, BATCH_PX
        while end < len(rows) and (budget > 0 or end == begin):
            budget -= sizes[rows[end]]
            end += 1
        stamps: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        groups: dict[tuple[tuple[float, int, int], ...], list[int]] = {}
        for row in rows[begin:end]:
            key = tuple(zip(offsets[row], counts[row], lengths[row], strict=True))
            groups.setdefault(key, []).append(row)
        for key, members in groups.items():
            axes = [
                axis_weights(*k, downsample[a], grid.first_centre_l0[a], grid.cell_l0[a], factors[a])
                for a, k in enumerate(key)
            ]
            values, share = _resample(maps[members], axes)
            stamps.update({row: (values[i], share) for i, row in enumerate(members)})
        for row in rows[begin:end]:
            region = tuple(slice(a, a + n) for a, n in zip(targets[row], counts[row], strict=True))
            values, share = stamps[row]
            total[region] += values
            weight[region] += share
        begin = end
    silent = weight == 0.0
    total[silent], weight[silent] = np.nan, 1.0
    total /= weight
    return total.astype(np.float32)


def _resample(
    maps: NDArray[np.float32], axes: list[AxisWeights]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Importance-weighted values `(n, *px)` and importances `(*px)` of tiles of one geometry."""
    values = maps.astype(np.float64)
    share = np.ones(())
    for a, axis in enumerate(axes):
        column = (-1,) + (1,) * (len(axes) - a - 1)
        cells, values = values, np.zeros(())
        for t in range(axis.cells.shape[1]):
            tap = cells.take(axis.cells[:, t], axis=a + 1)
            tap *= axis.weights[:, t].reshape(column)
            values = np.add(values, tap, out=values) if t else tap
        share = share[..., None] * axis.importance
    values *= share
    return values, share


def coverage_block(
    block: NDArray[np.int64],
    downsample: tuple[int, ...],
    boxes: NDArray[np.int64],
    status: NDArray[np.uint8],
    shape_l0: tuple[int, ...],
) -> NDArray[np.uint8]:
    """Why each px of a block has a value or none.

    Parameters
    ----------
    block
        `(2, axes)` box in heatmap px.
    downsample
        Level-0 px a heatmap px.
    boxes
        `(n, 2, axes)` level-0 boxes of all tiles that touch the block, computed or not.
    status
        `(n,)` their `TileStatus`; none may be pending.
    shape_l0
        Shape of the image.

    Returns
    -------
    ndarray
        `(*block)` uint8 of `Coverage`: a px in the box of any failed tile is FAILED, else in that of a done
        one EVALUATED, else in that of one left out LEFT_OUT, else BACKGROUND; OUTSIDE where its centre is.

    Raises
    ------
    ValueError
        A tile is pending.
    """
    if (status == TileStatus.PENDING).any():
        msg = f"{int((status == TileStatus.PENDING).sum())} tiles that touch the block are not computed yet"
        raise ValueError(msg)
    codes = np.full(tuple((block[1] - block[0]).tolist()), Coverage.BACKGROUND, np.uint8)
    px = px_range(boxes, downsample)
    low = np.maximum(px[:, 0], block[0]) - block[0]
    high = np.minimum(px[:, 1], block[1]) - block[0]
    for state, code in (
        (TileStatus.LEFT_OUT, Coverage.LEFT_OUT),
        (TileStatus.DONE, Coverage.EVALUATED),
        (TileStatus.FAILED, Coverage.FAILED),
    ):
        chosen = (status == state) & (high > low).all(axis=1)
        for a, b in zip(low[chosen].tolist(), high[chosen].tolist(), strict=True):
            codes[tuple(slice(i, j) for i, j in zip(a, b, strict=True))] = code
    whole = np.array([[(0,) * len(shape_l0), shape_l0]], dtype=np.int64)
    inside = np.clip(px_range(whole, downsample)[0, 1] - block[0], 0, None).tolist()
    for axis, n in enumerate(inside):
        codes[(slice(None),) * axis + (slice(n, None),)] = Coverage.OUTSIDE
    return codes
