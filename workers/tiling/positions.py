"""Where tiles lie: positions from the index, sizes rounded once to whole level-0 pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SpecError
from schemas.grid import GridSpec, Lattice
from schemas.image import LevelMeta

SIZE_ERROR_LIMIT = 0.01
"""Rounding a tile to whole level-0 px may change its physical size by this much."""
UPSAMPLING_LIMIT = 1.25
"""A model pixel may be this much finer than the source's before it is refused."""
LEVEL_SLACK = 1.05
"""A level this much coarser than the model pixel still serves (4.002 for 4)."""


def make_lattice(
    name: str,
    levels: tuple[LevelMeta, ...],
    spacing: tuple[float, ...],
    grid: GridSpec,
    *,
    allow_upsampling: bool = False,
) -> Lattice:
    """Lay the tiles of `grid` over an image.

    Parameters
    ----------
    name
        The image, for messages.
    levels
        Levels of the image, finest first.
    spacing
        Physical size of a level-0 px and axis, in the unit of `grid.spacing`.
    grid
        Tile size in model px at a physical pixel size.
    allow_upsampling
        Accept a model pixel more than 1.25 times finer than the source's.

    Raises
    ------
    SpecError
        The model's pixel is much finer than the source's, or whole level-0 px cannot hold the tile
        within 1 %.
    """
    exact = [t * g / s for t, g, s in zip(grid.tile_px, grid.spacing, spacing, strict=True)]
    upsampling = max(t / e for t, e in zip(grid.tile_px, exact, strict=True))
    if upsampling > UPSAMPLING_LIMIT and not allow_upsampling:
        msg = (
            f"{name}: the model expects pixels of {_sizes(grid.spacing)}, the source has {_sizes(spacing)}: "
            f"reading {upsampling:.2f} times finer than the source invents pixels (limit {UPSAMPLING_LIMIT}); "
            "use a finer scan, or --allow-upsampling to accept and record it"
        )
        raise SpecError(msg)
    tile_l0 = tuple(max(1, round(e)) for e in exact)
    stride_l0 = tuple(max(1, round(t * (1 - grid.overlap))) for t in tile_l0)
    error = max(abs(t - e) / e for t, e in zip(tile_l0, exact, strict=True))
    if error > SIZE_ERROR_LIMIT:
        msg = (
            f"{name}: a tile of {grid.tile_px} model px is {tuple(round(e, 2) for e in exact)} level-0 px; whole "
            f"pixels change its size by {error:.1%} (limit {SIZE_ERROR_LIMIT:.0%}); use a larger --tile"
        )
        raise SpecError(msg)
    shape = levels[0].shape
    count = tuple(
        1 if n <= t else -(-(n - t) // s) + 1 for n, t, s in zip(shape, tile_l0, stride_l0, strict=True)
    )
    pixel_l0 = [t / p for t, p in zip(tile_l0, grid.tile_px, strict=True)]
    serving = [
        i
        for i, lv in enumerate(levels)
        if all(d <= p * LEVEL_SLACK for d, p in zip(lv.downsample, pixel_l0, strict=True))
    ]
    return Lattice(
        shape_l0=shape,
        tile_l0=tile_l0,
        stride_l0=stride_l0,
        count=count,
        edge=grid.edge,
        level=max(serving, default=0),
        tile_px=grid.tile_px,
        size_error=error,
        upsampling=upsampling,
    )


def all_indices(lattice: Lattice) -> NDArray[np.int64]:
    """Every tile's index `(N, axes)`, last axis fastest."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(lattice.count))), lattice.count), axis=1)


def starts(lattice: Lattice, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Level-0 start `(N, axes)` of the tiles at `index` `(N, axes)`."""
    origin = index * np.asarray(lattice.stride_l0, np.int64)
    if lattice.edge == "shift":
        last = np.maximum(np.asarray(lattice.shape_l0) - np.asarray(lattice.tile_l0), 0)
        origin = np.minimum(origin, last)
    return origin.astype(np.int64)


def boxes(lattice: Lattice, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Level-0 boxes `(N, 2, axes)` of the tiles at `index` `(N, axes)`: start, then stop."""
    start = starts(lattice, index)
    return np.stack([start, start + np.asarray(lattice.tile_l0, np.int64)], axis=1)


def _sizes(spacing: tuple[float, ...]) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing)
