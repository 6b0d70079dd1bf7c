"""One block of the heatmap: gathered from tile maps (level 0) or reduced from the level below."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import StoreError
from schemas.frozen import Frozen
from schemas.heatmap import ChannelInfo, Coverage, TileStatus
from schemas.run import BlockTask, Report
from workers.pool import Task
from workers.stitching.blend import blend_block, coverage_block
from workers.stitching.downsample import halve_absmax, halve_coverage, halve_mean
from workers.stitching.grid import Block, block_box, children
from workers.stitching.importance import cell_importance
from workers.store.bags import Bag
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.tiling.touching import tiles_touching


class StitchInit(Frozen):
    """The two stores of an image."""

    tiles: str
    heatmap: str
    run_id: str
    """Of the heatmap that was planned: another one in its place is refused."""


class Stitcher:
    """Writes blocks; each is a pure function of the tile maps (or of the level below), so order is free."""

    def __init__(self, init: StitchInit) -> None:
        self._tiles = TilesStore.open(init.tiles)
        self._bag = Bag(self._tiles.path, self._tiles.info)
        self._heatmap = HeatmapStore.open(init.heatmap, "r+")
        if self._heatmap.info.run_id != init.run_id:
            msg = (
                f"{init.heatmap}: holds the heatmap of another request (found {self._heatmap.info.run_id[:12]}, "
                f"expected {init.run_id[:12]}); two runs write to one folder: run one at a time"
            )
            raise StoreError(msg)
        if self._tiles.info.tiles_id != self._heatmap.info.tiles_id:
            msg = (
                f"{init.heatmap}: made of tiles {self._heatmap.info.tiles_id}, "
                f"{init.tiles} holds {self._tiles.info.tiles_id}; run again to make the heatmap anew"
            )
            raise StoreError(msg)

    def run(self, task: Task) -> Report:
        """Write one block.

        Raises
        ------
        StoreError
            A tile that touches the block, or a block below it, is not finished.
        """
        if not isinstance(task, BlockTask):
            msg = f"a stitcher takes blocks; found {task!r}"
            raise TypeError(msg)
        start = time.perf_counter()
        write = self._stitch if task.level == 0 else self._reduce
        written = write(task.level, task.block)
        return Report(
            stage="stitch" if task.level == 0 else "downsample",
            key=task.key,
            task=task,
            seconds=time.perf_counter() - start,
            bytes_written=written,
        )

    def expect(self, task: Task) -> None:
        """Nothing can be read ahead: a block is free to be written the moment its tiles are done."""

    def close(self) -> None:
        """Nothing is held open."""

    def _stitch(self, level: int, block: Block) -> int:
        info, grid = self._tiles.info, self._heatmap.grid
        box = block_box(grid, level, block)
        start_l0, stop_l0 = (box * np.array(grid.downsample)).tolist()
        rows = tiles_touching(self._tiles.boxes(), tuple(start_l0), tuple(stop_l0))
        status = self._tiles.statuses_of(rows)
        if (status == TileStatus.PENDING).any():
            msg = (
                f"{self._tiles.path}: block {block} is to be stitched while "
                f"{int((status == TileStatus.PENDING).sum())} of its tiles are not computed; run again"
            )
            raise StoreError(msg)
        boxes = np.minimum(self._tiles.boxes(rows), np.array(grid.shape_l0))
        codes = coverage_block(box, grid.downsample, boxes, status, grid.shape_l0)
        done = {"coverage": status == TileStatus.DONE}
        labels = {"coverage": codes}
        if self._heatmap.info.partial:
            left_out = (status == TileStatus.DONE) & ~self._bag.inside(rows)
            status = np.where(left_out, TileStatus.LEFT_OUT, status).astype(np.uint8)
            done["inside"] = status == TileStatus.DONE
            labels["inside"] = coverage_block(box, grid.downsample, boxes, status, grid.shape_l0)

        def channels() -> Iterator[NDArray[np.float32]]:
            for channel in self._heatmap.info.channels:
                label = self._heatmap.info.label_of(channel)
                some = done[label]
                cells = info.bag_grid() if channel.bag_method else info.grids[channel.method]
                importance = cell_importance(self._heatmap.info.spec.importance, cells, info.lattice.tile_l0)
                target = info.spec.cam.targets.index(channel.target)
                maps = self._maps(channel, target, rows[some])
                values = blend_block(box, grid.downsample, boxes[some], maps, cells, importance)
                values[labels[label] != Coverage.EVALUATED] = np.nan
                yield values

        return self._heatmap.write_block(level, block, codes, channels(), inside=labels.get("inside"))

    def _maps(self, channel: ChannelInfo, target: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, *grid)` of a channel; a bag method's one value a tile is its whole map."""
        if not channel.bag_method:
            return self._tiles.maps_of(channel.method, target, rows)
        values = self._bag.relevance(channel.bag_method, target, rows)
        return values.reshape(-1, *channel.grid)

    def _reduce(self, level: int, block: Block) -> int:
        store, below = self._heatmap, children(self._heatmap.grid, level, block)
        for child in below:
            if not store.is_done(level - 1, child):
                msg = (
                    f"{store.path}: level {level} block {block} needs level {level - 1} block {child}, "
                    "which is not written; run again"
                )
                raise StoreError(msg)
        start, stop = block_box(store.grid, level, block)
        places = []
        for child in below:
            low, high = block_box(store.grid, level - 1, child)
            source = tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            # blocks begin at even px, so that halving one by one is halving the whole
            at, to = (low // 2 - start).tolist(), (-(-high // 2) - start).tolist()
            places.append((source, tuple(slice(a, b) for a, b in zip(at, to, strict=True))))
        shape = tuple((stop - start).tolist())

        labels = {name: np.empty(shape, np.uint8) for name in store.info.labels}
        for name, codes in labels.items():
            for source, place in places:
                codes[place] = halve_coverage(store.label(name, level - 1)[source])
        # most of a slide is glass: nothing is read there
        evaluated = bool((labels["coverage"] == Coverage.EVALUATED).any())

        def halved(
            array: Any, halve: Callable[[NDArray[np.float32]], NDArray[np.float32]]
        ) -> Iterator[NDArray[np.float32]]:
            for channel in range(len(store.info.channels)):
                values = np.full(shape, np.nan, np.float32)
                for source, place in places if evaluated else ():
                    values[place] = halve(array[(channel, *source)])
                yield values

        means = halved(store.image(level - 1), halve_mean)
        if not store.has_peak:
            return store.write_block(level, block, labels["coverage"], means, inside=labels.get("inside"))
        finer = store.image(0) if level == 1 else store.peak(level - 1)
        peaks = halved(finer, halve_absmax)
        return store.write_block(level, block, labels["coverage"], means, peaks, labels.get("inside"))
