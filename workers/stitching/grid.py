"""The heatmap's pyramid grid, which blocks a tile reaches, and which blocks a block is made from."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import HeatmapGrid

CHUNK = {2: 512, 3: 128}
SHARD = {2: 2048, 3: 256}
"""Edge of a chunk and of a shard, by number of spatial axes."""

Block = tuple[int, ...]


def heatmap_grid(shape_l0: tuple[int, ...], downsample: int | tuple[int, ...]) -> HeatmapGrid:
    """Pyramid of an image: ceil halves until the longest side fits one chunk.

    Parameters
    ----------
    shape_l0
        Shape of the image in level-0 px, array order, 2 or 3 axes.
    downsample
        Level-0 px a heatmap px, one for all axes or one an axis; an axis shorter than that becomes one px.
    """
    ndim = len(shape_l0)
    if isinstance(downsample, int):
        downsample = (downsample,) * ndim
    # else the only px's centre would lie outside the image, and nothing would be evaluated
    downsample = tuple(min(d, n) for d, n in zip(downsample, shape_l0, strict=True))
    chunk, shard = CHUNK[ndim], SHARD[ndim]
    levels = [tuple(-(-n // d) for n, d in zip(shape_l0, downsample, strict=True))]
    while max(levels[-1]) > chunk:
        levels.append(tuple(-(-n // 2) for n in levels[-1]))
    return HeatmapGrid(
        shape_l0=shape_l0,
        downsample=downsample,
        levels=tuple(levels),
        chunk=(chunk,) * ndim,
        shards=tuple(tuple(min(shard, -(-n // chunk) * chunk) for n in level) for level in levels),
    )


def block_box(grid: HeatmapGrid, level: int, block: Block) -> NDArray[np.int64]:
    """`(2, axes)` box of a block in px of its level, clipped to the level."""
    shard, shape = np.array(grid.shards[level]), np.array(grid.levels[level])
    start = np.array(block, dtype=np.int64) * shard
    return np.stack([start, np.minimum(start + shard, shape)])


def all_blocks(grid: HeatmapGrid, level: int) -> list[Block]:
    """Every block of a level, in array order."""
    return list(product(*(range(n) for n in grid.blocks(level))))


def children(grid: HeatmapGrid, level: int, block: Block) -> list[Block]:
    """Blocks of `level - 1` that a block of `level` (above 0) is reduced from, in array order."""
    start, stop = 2 * block_box(grid, level, block)
    shard, count = grid.shards[level - 1], grid.blocks(level - 1)
    return list(
        product(
            *(
                range(a // s, min(-(-b // s), n))
                for a, b, s, n in zip(start.tolist(), stop.tolist(), shard, count, strict=True)
            )
        )
    )


def parent(grid: HeatmapGrid, level: int, block: Block) -> Block:
    """The block of `level + 1` that a block of `level` is reduced into."""
    return tuple(
        b * s // (2 * t) for b, s, t in zip(block, grid.shards[level], grid.shards[level + 1], strict=True)
    )


def blocks_touched(
    grid: HeatmapGrid, boxes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (box, level-0 block) that share a level-0 px.

    Parameters
    ----------
    boxes
        `(N, 2, axes)` level-0 boxes; they may reach past the image.

    Returns
    -------
    row, block
        `(P,)` index of the box, and flat (array order) index of the block.
    """
    size_l0 = np.array(grid.shards[0]) * np.array(grid.downsample)
    count = np.array(grid.blocks(0))
    first = np.maximum(boxes[:, 0] // size_l0, 0)
    last = np.minimum((boxes[:, 1] - 1) // size_l0, count - 1)
    span = (last - first + 1).max(axis=0, initial=0)
    rows, blocks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for offset in product(*(range(n) for n in span.tolist())):
        at = first + np.array(offset)
        row = np.flatnonzero((at <= last).all(axis=1))
        rows.append(row)
        blocks.append(np.ravel_multi_index(tuple(at[row].T), tuple(count)).astype(np.int64))
    return np.concatenate(rows), np.concatenate(blocks)


def block_dependencies(
    grid: HeatmapGrid, boxes: NDArray[np.int64], unit: int, planned: int
) -> dict[Block, set[int]]:
    """Units that must be finished before a level-0 block can be stitched.

    Parameters
    ----------
    boxes
        `(N, 2, axes)` level-0 boxes of all tiles; those from `planned` on are never computed.
    unit
        Tiles a unit.

    Returns
    -------
    dict
        Every level-0 block, in array order; blocks that no planned tile reaches have an empty set.
    """
    row, block = blocks_touched(grid, boxes[:planned])
    pairs = np.unique(np.stack([block, row // unit], axis=1), axis=0)
    blocks = all_blocks(grid, 0)
    cuts = np.searchsorted(pairs[:, 0], np.arange(len(blocks) + 1)).tolist()
    units = pairs[:, 1].tolist()
    return {b: set(units[cuts[i] : cuts[i + 1]]) for i, b in enumerate(blocks)}
