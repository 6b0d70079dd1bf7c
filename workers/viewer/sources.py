"""The images that heatmaps were made from: found, checked to be the same, kept open by few handles."""

from __future__ import annotations

import glob
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import SourceError
from schemas.image import ImageMeta, LevelMeta, ReadOptions
from workers.readers import open_image
from workers.readers.arrays import ArrayReader
from workers.readers.overview import read_overview, value_window
from workers.readers.reader import Reader

IDLE_READERS = 6
"""Handles kept open for the next tile; those in use are bounded by the threads."""
RETRY_S = 10.0
"""After how long a source that was missing is looked for again."""
OVERVIEWS = 4


@dataclass(frozen=True)
class Origin:
    """What a run has recorded of its source."""

    uri: str
    name: str
    """What people may see: the file name; of runs that hide it, the image's id."""
    identity: str
    read: ReadOptions


@dataclass(frozen=True)
class Found:
    """Where a source lies now, or why it cannot be shown."""

    uri: str = ""
    reason: str = ""
    meta: ImageMeta | None = None
    window: tuple[float, float] | None = None
    """Values shown black and white, the same for all tiles; None where pixels are 8-bit as they are."""
    objective: str = ""
    associated: tuple[str, ...] = ()
    looked: float = 0.0


class Sources:
    """Every source of the viewer, by identity.

    Parameters
    ----------
    folders
        Where sources that have moved are looked for, by file name; only one of the same identity is taken.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._found: dict[str, Found] = {}
        self._finding: dict[str, threading.Lock] = {}
        self._idle: list[tuple[str, Reader]] = []
        self._overviews: OrderedDict[str, Reader] = OrderedDict()

    def known(self, origin: Origin) -> Found | None:
        """What the last look gave, without looking; None before the first."""
        return self._found.get(origin.identity)

    def find(self, origin: Origin) -> Found:
        """Open the source if it is there, and describe it; slow only the first time."""
        with self._lock:
            gate = self._finding.setdefault(origin.identity, threading.Lock())
        with gate:
            found = self._found.get(origin.identity)
            if found is None or (time.monotonic() - found.looked > RETRY_S and not self._holds(found)):
                found = self._look(origin)
                self._found[origin.identity] = found
            return found

    @staticmethod
    def _holds(found: Found) -> bool:
        """Whether what was found last is still there."""
        return not found.reason and (found.uri.startswith("procedural:") or os.path.exists(found.uri))

    def _look(self, origin: Origin) -> Found:
        reasons = []
        for uri in self._candidates(origin):
            try:
                reader = open_image(uri, origin.read)
            except SourceError as error:
                reasons.append(error.message)
                continue
            if reader.meta.identity != origin.identity:
                reader.close()
                reasons.append(
                    f"{origin.name} was changed: it is no longer the image that was explained, and is not shown under its heatmap"
                )
                continue
            found = describe(reader, uri)
            self._give_back(origin.identity, reader)
            return found
        if not reasons:
            reasons = [
                f"{origin.name} is not where it was when it was explained; tell the viewer where it is now with --source DIR"
            ]
        return Found(reason=reasons[-1], looked=time.monotonic())

    def _candidates(self, origin: Origin) -> Iterator[str]:
        if origin.uri.startswith("procedural:"):
            yield origin.uri
            return
        if os.path.exists(origin.uri):
            yield origin.uri
        for folder in self._folders:
            for other in sorted(folder.rglob(glob.escape(Path(origin.uri).name))):
                yield str(other)

    @contextmanager
    def reader(self, origin: Origin) -> Iterator[Reader]:
        """A handle for as long as the block lasts.

        Raises
        ------
        SourceError
            The source is not there, or is another.
        """
        found = self.find(origin)
        if found.meta is None:
            raise SourceError(found.reason)
        reader = self._take(origin.identity)
        if reader is None:
            reader = open_image(found.uri, origin.read)
            if reader.meta.identity != origin.identity:
                reader.close()
                with self._lock:
                    self._found.pop(origin.identity, None)
                msg = f"{origin.name} was changed while it was open; reload the page"
                raise SourceError(msg)
        try:
            yield reader
        finally:
            self._give_back(origin.identity, reader)

    def _take(self, identity: str) -> Reader | None:
        with self._lock:
            for at in range(len(self._idle) - 1, -1, -1):
                if self._idle[at][0] == identity:
                    return self._idle.pop(at)[1]
        return None

    def _give_back(self, identity: str, reader: Reader) -> None:
        with self._lock:
            if reader.meta.kind == "volume":  # may hold all of its voxels: one is enough
                self._idle = [one for one in self._idle if one[1].meta.kind != "volume"]
            self._idle.append((identity, reader))
            spare = [self._idle.pop(0)[1] for _ in range(len(self._idle) - IDLE_READERS)]
        for other in spare:
            other.close()

    def overview(self, origin: Origin, reader: Reader) -> Reader:
        """The source with a small picture of all of it as a further level, for files that have no coarse ones."""
        with self._lock:
            gate = self._finding.setdefault(origin.identity, threading.Lock())
        with gate:
            known = self._overviews.get(origin.identity)
            if known is None:
                pixels, downsample, _ = read_overview(reader)
                level = LevelMeta(shape=pixels.shape[1:], downsample=downsample)
                meta = reader.meta.model_copy(update={"levels": (*reader.meta.levels, level)})
                known = ArrayReader(meta, lambda _, window: pixels[(slice(None), *window)])
                self._overviews[origin.identity] = known
                while len(self._overviews) > OVERVIEWS:
                    self._overviews.popitem(last=False)
            return known

    def close(self) -> None:
        """Close every idle handle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, reader in idle:
            reader.close()


def describe(reader: Reader, uri: str) -> Found:
    """What pages say of an open source."""
    meta = reader.meta
    window = value_window(reader) if meta.kind == "slide" else None
    objective, associated = "", tuple[str, ...]()
    if meta.format.startswith("openslide:"):
        from workers.readers.slide import SlideReader

        if isinstance(reader, SlideReader):
            objective, associated = reader.objective, reader.associated
    return Found(
        uri=uri, meta=meta, window=window, objective=objective, associated=associated, looked=time.monotonic()
    )
