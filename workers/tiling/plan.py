"""Which tiles of an image are computed, in which order, and what that costs; computes no tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon, polygon_perimeter

from schemas.grid import Lattice, TissueSpec
from schemas.heatmap import HeatmapGrid
from schemas.image import Kind
from schemas.run import MapGrid
from workers.tiling.positions import all_indices, boxes, starts
from workers.tiling.tissue import tissue_fraction

UNITS_ENOUGH = 32
"""So many tasks share out evenly among a few workers: the last of them to finish waits for little."""


def default_unit(kind: Kind, planned: int) -> int:
    """Tiles a task, which is the length of a chunk along the tile axis.

    256, or less on a small slide, where so few tasks would leave workers idle at the end; 8 in a volume.
    """
    if kind == "volume":
        return 8
    return next((unit for unit in (256, 128) if planned >= UNITS_ENOUGH * unit), 64)


@dataclass(frozen=True)
class Plan:
    """The tiles of one image.

    Attributes
    ----------
    boxes
        `(N, 2, axes)` level-0; tiles to compute first, in row order, then those left out by choice.
    planned
        How many are to be computed.
    unit
        Tiles a task.
    """

    lattice: Lattice
    boxes: NDArray[np.int64]
    planned: int
    unit: int

    @property
    def tiles(self) -> int:
        return len(self.boxes)

    @property
    def units(self) -> int:
        return -(-self.planned // self.unit)


def make_plan(
    lattice: Lattice,
    unit: int | Kind,
    mask: NDArray[np.bool_] | None,
    mask_downsample: tuple[float, ...],
    tissue: TissueSpec,
    region_l0: tuple[tuple[tuple[float, float], ...], ...] = (),
    placed: NDArray[np.int64] | None = None,
) -> Plan:
    """Keep the tiles that hold enough tissue; split them into asked-for and left out.

    Parameters
    ----------
    unit
        Tiles a task, or the kind of image, whose default is taken.
    mask
        `(*S)` tissue at `mask_downsample` level-0 px a mask px and axis; None keeps every tile.
    region_l0
        Polygons of level-0 `(y, x)`; a tile that meets none of them is left out by choice.
    placed
        `(N, 2, axes)` level-0 boxes that are the tiles, all of them, wherever they came from.
    """
    if placed is not None:
        size = unit if isinstance(unit, int) else default_unit(unit, len(placed))
        return Plan(lattice, placed, len(placed), size)
    index = all_indices(lattice)
    start = starts(lattice, index)
    if mask is not None:
        share = tissue_fraction(mask, start, lattice.tile_l0, mask_downsample)
        area = float(np.prod([t / d for t, d in zip(lattice.tile_l0, mask_downsample, strict=True)]))
        # At least one mask pixel, so that rounding in the integral never lets an empty tile in.
        keep = share >= max(tissue.min_fraction, min(1.0, 1.0 / area))
        index, start = index[keep], start[keep]
    asked = np.ones(len(index), bool)
    if region_l0:
        inside = _region_mask(region_l0, lattice.shape_l0, _REGION_PX)
        scale = tuple(n / m for n, m in zip(lattice.shape_l0, inside.shape, strict=True))
        asked = tissue_fraction(inside, start, lattice.tile_l0, scale) > 0
    order = np.concatenate([np.flatnonzero(asked), np.flatnonzero(~asked)])
    planned = int(asked.sum())
    size = unit if isinstance(unit, int) else default_unit(unit, planned)
    return Plan(lattice, boxes(lattice, index[order]), planned, size)


_REGION_PX = 4096
"""Longest side of the raster that polygons are drawn on."""


def _region_mask(
    polygons: tuple[tuple[tuple[float, float], ...], ...], shape_l0: tuple[int, ...], longest: int
) -> NDArray[np.bool_]:
    scale = max(1.0, max(shape_l0) / longest)
    shape = tuple(max(1, int(np.ceil(n / scale))) for n in shape_l0)
    mask = np.zeros(shape, bool)
    for points in polygons:
        rows, cols = (np.asarray(points, float) * np.divide(shape, shape_l0)).T
        if max(rows) < 0 or max(cols) < 0 or min(rows) >= shape[0] or min(cols) >= shape[1]:
            continue  # one GeoJSON may serve several slides
        mask[polygon(rows, cols, shape)] = True  # type: ignore[no-untyped-call]
        # The outline too, so that a region thinner than a raster pixel is not lost.
        mask[polygon_perimeter(rows.astype(int), cols.astype(int), shape, clip=True)] = True
    return mask


def tiles_bytes(plan: Plan, grids: dict[str, MapGrid], classes: int, targets: int) -> int:
    """Uncompressed size of `tiles.zarr`."""
    axes: int = plan.boxes.shape[2]
    cells = sum(math.prod(g.shape) for g in grids.values())
    return plan.tiles * (2 * axes * 8 + 2 + 4 * classes + 4 * targets + 4 * targets * cells)


def heatmap_bytes(grid: HeatmapGrid, channels: int) -> int:
    """Uncompressed size of the heatmap with its pyramid, peaks and coverage."""
    pixels = [math.prod(level) for level in grid.levels]
    return sum(pixels) * (4 * channels + 1) + sum(pixels[1:]) * 4 * channels


def peak_memory_bytes(plan: Plan, grid: HeatmapGrid, channels: int, batch: int, weights_bytes: int) -> int:
    """Estimate what one worker holds at most: libraries, weights, batches in flight, and a block.

    A forward keeps a few times its input in activations; 40 times is what ResNet-like networks were seen
    to need, so this is an order of magnitude, not a promise.
    """
    libraries = 600 << 20
    tile = math.prod(plan.lattice.tile_px) * (channels * 4)
    block = math.prod(grid.shards[0]) * (4 + 8 + 8 + 1)
    return libraries + weights_bytes + 40 * batch * tile + 2 * block
