"""How much a cell of a tile map counts where tiles overlap."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from schemas.run import MapGrid

FLOOR = 1e-3
"""Smallest importance of an axis: never 0, so that a lone tile keeps its border."""
SIGMA = 0.125
"""Width of the Gaussian as a share of the tile, as MONAI's sliding-window inferer has it."""

Importance = Literal["flat", "hann", "gaussian"]


def cell_importance(
    kind: Importance, grid: MapGrid, tile_l0: tuple[int, ...]
) -> tuple[NDArray[np.float64], ...]:
    """Importance of each cell, one 1-D factor an axis, sampled at the cell centres.

    Parameters
    ----------
    kind
        `flat`: 1; `hann`: sin^2(pi t); `gaussian`: exp(-((t - 1/2) / 0.125)^2 / 2); `t` is the centre's
        place in the tile, 0 to 1. Values below 1e-3, and centres outside the tile, count 1e-3.
    grid
        Cell geometry.
    tile_l0
        Size of a tile in level-0 px.
    """
    factors = []
    for cells, first, step, size in zip(grid.shape, grid.first_centre_l0, grid.cell_l0, tile_l0, strict=True):
        t = np.clip((first + step * np.arange(cells)) / size, 0.0, 1.0)
        if kind == "flat":
            weight = np.ones(cells)
        elif kind == "hann":
            weight = np.sin(np.pi * t) ** 2
        else:
            weight = np.exp(-0.5 * ((t - 0.5) / SIGMA) ** 2)
        factors.append(np.maximum(weight, FLOOR))
    return tuple(factors)
