"""What lies in an inbox and is all there, and where it goes once it is done."""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import SourceError, SpecError
from workers.readers import expand
from workers.readers.dicom import instances
from workers.readers.listing import is_image_file
from workers.readers.opening import companion_slide

log = logging.getLogger("gigacam")


@dataclass(frozen=True)
class Entry:
    """What arrives and leaves as one: a file with its companions, or a folder with all in it."""

    images: tuple[str, ...]
    paths: tuple[Path, ...]
    """Entries of the inbox itself."""


def settled(inbox: Path, settle_s: float) -> tuple[list[Entry], int]:
    """The entries that nothing was written to for `settle_s` seconds, and how many others there are.

    Raises
    ------
    SpecError
        The inbox is no folder.
    """
    if not inbox.is_dir():
        msg = f"{inbox}: not a folder; the inbox must exist before it is scanned"
        raise SpecError(msg)
    entries = _entries(inbox)
    before = time.time() - settle_s
    ready = [entry for entry in entries if max(map(_last_written, entry.paths)) <= before]
    return ready, len(entries) - len(ready)


def move(entry: Entry, done: Path) -> None:
    """Move an entry to `done`; one whose name is taken there stays, since nothing may be written over."""
    done.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in entry.paths if (done / path.name).exists()]
    if taken:
        log.warning("%s stays: %s has something of that name", entry.paths[0], done)
        return
    for path in entry.paths:
        shutil.move(path, done / path.name)


def _entries(inbox: Path) -> list[Entry]:
    series: dict[str, list[Path]] = {}
    found = []
    for path in sorted(inbox.iterdir()):
        if path.name.startswith(".") or (path.is_dir() and companion_slide(path)):
            continue
        try:
            instance = instances([path])
            images = () if instance else _images(path)
        except SourceError:  # named as it is: what is wrong with it is said when its turn comes
            instance, images = [], (str(path),)
        for one in instance:
            series.setdefault(one.series, []).append(path)
        if images:
            companion = path.with_suffix("")
            mirax = path.suffix.lower() == ".mrxs" and companion.is_dir()
            found.append(Entry(images, (path, companion) if mirax else (path,)))
    return [*found, *(Entry((str(paths[0]),), tuple(paths)) for paths in series.values())]


def _images(path: Path) -> tuple[str, ...]:
    """URIs of the images an entry holds; a file is one where a listing of its folder would say so."""
    if not path.is_dir():
        return (str(path),) if is_image_file(path) else ()
    try:
        return tuple(image.uri for image in expand([str(path)]))
    except SpecError:  # a folder without images
        return ()


def _last_written(path: Path) -> float:
    """Seconds since the epoch; what vanishes meanwhile is being written."""
    try:
        return max(p.stat().st_mtime for p in [path, *path.rglob("*")])
    except FileNotFoundError:
        return math.inf
