"""Which tiles of a finished run a channel is strongest in, by their own raw maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.heatmap import ChannelInfo
from schemas.run import MapGrid
from workers.store.bags import Bag
from workers.store.tiles import TilesStore


@dataclass(frozen=True)
class TopTile:
    """A tile, and the strongest cell of its raw map."""

    tile: int
    value: float
    """Of that cell, before any blending with neighbours."""
    box: Box
    """Level-0 box of the tile; it may reach past the image."""
    centre_l0: tuple[float, ...]
    """Centre of that cell."""


def top_tiles(
    tiles: TilesStore, channel: ChannelInfo, most: int, sign: Literal[1, -1] = 1
) -> tuple[TopTile, ...]:
    """The tiles whose raw maps reach furthest above zero (`sign` 1) or below it (-1), strongest first.

    A tile that overlaps a stronger one is passed over: it shows the same thing again. Of equals, the first in the
    order of the plan comes first.
    """
    target = tiles.info.spec.cam.targets.index(channel.target)
    bag = Bag(tiles.path, tiles.info) if channel.bag_method else None
    peaks, cells = [], []
    for unit in range(tiles.info.units):
        rows = tiles.unit_rows(unit)
        maps = (
            tiles.maps_of(channel.method, target, rows)
            if bag is None
            else bag.relevance(channel.bag_method, target, rows)
        )
        flat = sign * maps.reshape(len(rows), -1)
        flat[~np.isfinite(flat)] = -np.inf
        cells.append(flat.argmax(axis=1))
        peaks.append(flat.max(axis=1))
    peak, cell = np.concatenate([np.empty(0), *peaks]), np.concatenate([np.empty(0, np.int64), *cells])
    grid = tiles.info.bag_grid() if bag is not None else tiles.info.grids[channel.method]
    boxes = tiles.boxes()
    chosen: list[TopTile] = []
    for row in np.argsort(-peak, kind="stable").tolist():
        if len(chosen) == most or peak[row] <= 0:
            break
        box = Box(frame="l0", start=tuple(boxes[row, 0].tolist()), stop=tuple(boxes[row, 1].tolist()))
        if not any(box.intersects(other.box) for other in chosen):
            centre = _cell_centre(grid, int(cell[row]), boxes[row, 0])
            chosen.append(TopTile(row, sign * float(peak[row]), box, centre))
    return tuple(chosen)


def _cell_centre(grid: MapGrid, cell: int, start_l0: NDArray[np.int64]) -> tuple[float, ...]:
    index = np.unravel_index(cell, grid.shape)
    return tuple(
        float(a + f + int(i) * c)
        for a, f, i, c in zip(start_l0.tolist(), grid.first_centre_l0, index, grid.cell_l0, strict=True)
    )
