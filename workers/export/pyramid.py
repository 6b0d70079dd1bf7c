"""Pyramids of TIFF: tiles cut from bands of the heatmap, so that a level is never in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 512
"""Of a TIFF pyramid, and of the heatmap's chunks."""

Band = Callable[[int, int], NDArray[Any]]
"""Rows `start` to `stop` of a level: `(rows, W)` or `(rows, W, samples)`."""


def tiles_of(shape: tuple[int, int], band: Band, fill: float) -> Iterator[NDArray[Any]]:
    """`TILE` x `TILE` tiles of a level row by row, those that reach past it filled up.

    Parameters
    ----------
    shape
        Height and width of the level.
    band
        Gives the rows; called once for every row of tiles.
    fill
        Value past the edge.
    """
    height, width = shape
    for top in range(0, height, TILE):
        rows = band(top, min(top + TILE, height))
        for left in range(0, width, TILE):
            part = rows[:, left : left + TILE]
            if part.shape[:2] != (TILE, TILE):
                whole = np.full((TILE, TILE, *part.shape[2:]), fill, part.dtype)
                whole[: part.shape[0], : part.shape[1]] = part
                part = whole
            yield np.ascontiguousarray(part)


def per_cm(size_um: float) -> float:
    """Pixels a centimetre, as TIFF's resolution tags have them."""
    return 1e4 / size_um


def file_stem(label: str) -> str:
    """A channel's label as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-") or "channel"
