"""Heatmap tiles as they are stored: float32 values, then coverage codes; nothing is coloured or scaled here."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np
from starlette.exceptions import HTTPException

from schemas.errors import StoreError
from schemas.heatmap import Coverage
from workers.store.heatmap import HeatmapStore
from workers.viewer.work import Answer

log = logging.getLogger("gigacam")

Kind = Literal["mean", "peak"]
Stamp = tuple[int, int, int]
"""When and how large the metadata of a store were written: they are replaced whenever blocks are cleared, and at the end."""

GONE = "this heatmap is not there any more; reload the page"
OPEN_STORES = 64


def stamp_of(path: Path) -> Stamp:
    """Stamp of the store at `path`.

    Raises
    ------
    HTTPException
        410: it is gone.
    """
    try:
        found = os.stat(path / "zarr.json")
    except OSError as error:
        raise HTTPException(410, GONE) from error
    return found.st_mtime_ns, found.st_size, found.st_ino


class Heatmaps:
    """Open heatmaps, those used last; one whose files were replaced is opened anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: OrderedDict[Path, tuple[Stamp, HeatmapStore]] = OrderedDict()

    def open(self, path: Path) -> tuple[HeatmapStore, Stamp]:
        """The store at `path` and the stamp of what it was opened from.

        Raises
        ------
        HTTPException
            410: it is gone, or no heatmap that can be read.
        """
        stamp = stamp_of(path)
        with self._lock:
            if path in self._stores and self._stores[path][0] == stamp:
                self._stores.move_to_end(path)
                return self._stores[path][1], stamp
        try:
            store = HeatmapStore.open(path)
        except (StoreError, OSError) as error:
            log.warning("%s", error)
            raise HTTPException(410, GONE) from error
        with self._lock:
            self._stores[path] = (stamp, store)
            while len(self._stores) > OPEN_STORES:
                self._stores.popitem(last=False)
        return store, stamp

    def tile(self, path: Path, channel: int, kind: Kind, level: int, y: int, x: int) -> Answer:
        """One chunk of a level, clipped at its edge: `h * w` little-endian float32, then `h * w` uint8 of `Coverage`.

        A block not written yet is NaN and 0, and may not be kept. At level 0 the peak is the value.

        Raises
        ------
        HTTPException
            404: there is no such tile. 410: the store is gone.
        """
        store, stamp = self.open(path)
        info, grid = store.info, store.grid
        if len(grid.downsample) != 2:
            raise HTTPException(404, "a volume has no heat tiles; its heat comes as NIfTI")
        if not (0 <= channel < len(info.channels) and 0 <= level < len(grid.levels)):
            raise HTTPException(
                404, f"there are {len(info.channels)} channels and {len(grid.levels)} levels, counted from 0"
            )
        if kind == "peak" and level and not store.has_peak:
            raise HTTPException(404, "this heatmap was made without peaks")
        shape, chunk = grid.levels[level], grid.chunk
        start = (y * chunk[0], x * chunk[1])
        if any(a >= n for a, n in zip(start, shape, strict=True)):
            raise HTTPException(404, f"level {level} is {shape[0]} x {shape[1]} px (y, x): no tile {y}, {x}")
        region = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, chunk, shape, strict=True))
        size = tuple(s.stop - s.start for s in region)
        block = tuple(a // s for a, s in zip(start, grid.shards[level], strict=True))
        written = info.complete or store.is_done(level, block)
        if written:
            image = store.peak(level) if kind == "peak" and level else store.image(level)
            values = np.asarray(image[(channel, *region)], "<f4")
            coverage = np.asarray(store.coverage(level, channel)[region], np.uint8)
        else:
            values = np.full(size, np.nan, "<f4")
            coverage = np.full(size, Coverage.PENDING, np.uint8)
        # Files that went away meanwhile read as NaN, those of another run as its values.
        settled = stamp_of(path) == stamp
        etag = f'"{info.run_id[:16]}-{stamp[0]:x}-{stamp[2]:x}"' if written and settled else ""
        return Answer(values.tobytes() + coverage.tobytes(), "application/octet-stream", etag)
