"""Tiles decoded ahead of the device that explains them: threads, handles, mini-batches."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.run import TilesInfo
from workers.readers import open_image
from workers.readers.reader import Reader

BATCHES_AHEAD = 2
"""Mini-batches decoded while the device computes."""
UNITS_AHEAD = 2
"""Units of which the first mini-batch may wait, decoded: as many as a pool keeps submitted to a worker."""


class TileReader:
    """Reads tiles of one image in `threads` threads, a few mini-batches ahead.

    Raises
    ------
    SourceError
        The source is not the one that was planned.
    """

    def __init__(self, info: TilesInfo, threads: int) -> None:
        self._info = info
        self._readers = _Readers(info)
        self._early: OrderedDict[bytes, list[Future[NDArray[Any]]]] = OrderedDict()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._decoders.submit(self._readers.check).result()

    def expect(self, boxes: NDArray[np.int64]) -> None:
        """Begin to decode the first mini-batch of `boxes`, for a `batches` to come."""
        self._early[boxes.tobytes()] = self._decode(boxes[: self._info.spec.batch])
        while len(self._early) > UNITS_AHEAD:
            for future in self._early.popitem(last=False)[1]:
                future.cancel()

    def _decode(self, boxes: NDArray[np.int64]) -> list[Future[NDArray[Any]]]:
        return [self._decoders.submit(self._readers.read, box) for box in boxes]

    def batches(
        self, boxes: NDArray[np.int64], parts: dict[str, float]
    ) -> Iterator[tuple[int, NDArray[Any], dict[int, str]]]:
        """Decoded mini-batches `(first row, pixels (B, C, *S), failures)`, a few ahead of the device."""
        size = self._info.spec.batch
        firsts = iter(range(0, len(boxes), size))
        ahead: deque[tuple[int, list[Future[NDArray[Any]]]]] = deque()

        def submit() -> None:
            first = next(firsts, None)
            if first is not None:
                early = self._early.pop(boxes.tobytes(), None) if first == 0 else None
                ahead.append((first, early or self._decode(boxes[first : first + size])))

        for _ in range(1 + BATCHES_AHEAD):
            submit()
        while ahead:
            first, futures = ahead.popleft()
            clock = time.perf_counter()
            pixels, bad = _gather(futures, self._info)
            parts["decode"] += time.perf_counter() - clock
            submit()
            yield first, pixels, bad

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._readers.close()


class _Readers:
    """The source, open: one handle a decode thread for a slide, one in all for a volume.

    A slide's handle is not shared, so that errors of one do not reach another; a volume lies in memory whole,
    and is not to lie there once a thread.
    """

    def __init__(self, info: TilesInfo) -> None:
        self._info = info
        self._local: Any = threading.local() if info.image.kind == "slide" else SimpleNamespace()
        self._open: list[Reader] = []
        self._lock = threading.Lock()

    def _reader(self) -> Reader:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = open_image(self._info.image.uri, self._info.spec.read)
            self._local.reader = reader
            with self._lock:
                self._open.append(reader)
        return reader

    def check(self) -> None:
        """The source must still be the one that was planned."""
        found = self._reader().meta.identity
        if found != self._info.image.identity:
            msg = (
                f"{self._info.image.uri}: the file changed since the run was planned (identity {found[:12]}, "
                f"expected {self._info.image.identity[:12]}); restore it, or explain again with --fresh"
            )
            raise SourceError(msg)

    def read(self, box: NDArray[np.int64]) -> NDArray[Any]:
        lattice = self._info.lattice
        box_l0 = Box(frame="l0", start=tuple(box[0].tolist()), stop=tuple(box[1].tolist()))
        pixels, _ = self._reader().read(box_l0, lattice.tile_px, lattice.level)
        return pixels

    def close(self) -> None:
        for reader in self._open:
            reader.close()


def _gather(futures: list[Future[NDArray[Any]]], info: TilesInfo) -> tuple[NDArray[Any], dict[int, str]]:
    """Stack what was read; a tile that could not be keeps its slot, as zeros.

    A batch's shape changes the bits of its members, so that none may drop out.
    """
    tiles: list[NDArray[Any] | None] = []
    bad: dict[int, str] = {}
    for i, future in enumerate(futures):
        try:
            tiles.append(future.result())
        except (SourceError, OSError) as error:
            tiles.append(None)
            # The store says which file; what is kept of a reason is short.
            bad[i] = "read: " + str(error).removeprefix(f"{info.image.uri}: ")
    like = next((t for t in tiles if t is not None), None)
    shape = like.shape if like is not None else (info.image.channels, *info.lattice.tile_px)
    dtype = like.dtype if like is not None else np.dtype(np.float32)
    return np.stack([np.zeros(shape, dtype) if t is None else t for t in tiles]), bad
