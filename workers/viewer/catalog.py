"""What lies in the output folders: images, and the runs of each."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from schemas.image import ImageMeta
from schemas.run import ImageReport, RunReport
from workers.report.private import names_of, without_folders
from workers.viewer.runs import HEATMAP, METHODS, REPORT, TILES, Marks, Run, marks, read_json, read_run
from workers.viewer.sources import Origin

FRESH_S = 1.0
"""How old an answer may be: however many pages ask, the folders are read so often."""
BATCH = "run.json"


@dataclass(frozen=True)
class Image:
    """One source, and its runs by the index of their folder."""

    id: str
    name: str
    kind: str | None
    """None: it could not be opened when it was to be explained."""
    runs: dict[int, Run]

    @property
    def origin(self) -> Origin | None:
        return next((run.origin for run in self.runs.values() if run.origin), None)

    @property
    def meta(self) -> ImageMeta | None:
        return next((run.meta for run in self.runs.values() if run.meta), None)


class Catalog:
    """The output folders of a viewer; read again when asked, at most once a second, and only what has changed.

    Parameters
    ----------
    folders
        Output folders of `explain`, in the order of the command line.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Marks, Run]] = {}
        self._batches: dict[Path, tuple[Marks, tuple[ImageReport, ...]]] = {}
        self._images: dict[str, Image] = {}
        self._scanned = float("-inf")

    def labels(self) -> list[str]:
        """What to call each folder: its name, with its parent's where two are alike."""
        names = [folder.resolve().name for folder in self.folders]
        return [
            f"{folder.resolve().parent.name}/{name}" if names.count(name) > 1 else name
            for folder, name in zip(self.folders, names, strict=True)
        ]

    def seen(self) -> dict[str, Image]:
        """Every image by id as of the last look."""
        return self._images

    def images(self) -> dict[str, Image]:
        """Every image by id."""
        with self._lock:
            if time.monotonic() - self._scanned > FRESH_S:
                self._images = self._scan()
                self._scanned = time.monotonic()
            return self._images

    def _scan(self) -> dict[str, Image]:
        groups: dict[str, list[Run]] = {}
        by_name: dict[str, str] = {}
        failed: list[Image] = []
        for index, out in enumerate(self.folders):
            runs = [self._run(index, folder) for folder in image_folders(out)]
            for run in runs:
                key = run.origin.identity if run.origin else by_name.get(run.name, run.name)
                if any(other.index == index for other in groups.get(key, ())):
                    key = f"{index}/{run.name}"  # explained twice into one folder, under two ids
                groups.setdefault(key, []).append(run)
                by_name.setdefault(run.name, key)
            failed += self._failed(index, out, runs)
        images: dict[str, Image] = {}
        for key, group in groups.items():
            first = group[0]
            image_id = (
                first.name
                if first.name not in images
                else f"{first.name}~{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            )
            meta = next((run.meta for run in group if run.meta), None)
            heat = next((run.heatmap for run in group if run.heatmap), None)
            kind = meta.kind if meta else heat and {"um": "slide", "mm": "volume"}[heat.spacing_unit]
            name = next((run.origin.name for run in group if run.origin), first.name)
            images[image_id] = Image(image_id, name, kind or None, {run.index: run for run in group})
        return images | {image.id: image for image in failed if image.id not in images}

    def _failed(self, index: int, out: Path, runs: Sequence[Run]) -> Iterator[Image]:
        """Images of the batch that have no folder: they failed before they had one."""
        batch = self._batch(out)
        known = {run.origin.name for run in runs if run.origin} | {run.name for run in runs}
        for report, name in zip(batch, names_of(batch), strict=True):
            if report.status == "failed" and not report.image_id and name not in known:
                error = without_folders(report, name).error
                run = Run(index, out, "failed", error)
                image_id = "failed-" + hashlib.sha256(report.image.encode()).hexdigest()[:8]
                yield Image(image_id, name, None, {index: run})

    def _batch(self, out: Path) -> tuple[ImageReport, ...]:
        now = marks(out / BATCH)
        known = self._batches.get(out)
        if known is None or known[0] != now:
            document = read_json(out / BATCH, RunReport)
            known = now, document.images if document else ()
            self._batches[out] = known
        return known[1]

    def _run(self, index: int, folder: Path) -> Run:
        paths = (REPORT, f"{HEATMAP}/zarr.json", f"{TILES}/zarr.json", METHODS)
        now = marks(*(folder / path for path in paths))
        known = self._read.get(folder)
        if known is None or known[0] != now:
            known = now, read_run(index, folder)
            self._read[folder] = known
        run = known[1]
        if run.status == "computing" and self._interrupted(run):
            return replace(run, status="interrupted")
        return run

    def _interrupted(self, run: Run) -> bool:
        """Whether the batch ended by an interruption after the last thing that was computed."""
        batch = self._batch(run.folder.parent)
        if not any(report.status == "interrupted" for report in batch):
            return False
        ended = marks(run.folder.parent / BATCH)[0]
        ledgers = marks(run.folder / TILES / "zarr.json", run.folder / TILES / "status" / "explain" / "c",
                         run.folder / HEATMAP / "zarr.json")  # fmt: skip
        return ended is not None and all(mark is None or mark[0] < ended[0] for mark in ledgers)


def image_folders(out: Path) -> list[Path]:
    """Folders of images in an output folder, by name; without those that may not be looked into."""
    try:
        entries = [Path(entry) for entry in os.scandir(out) if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(f for f in entries if any(os.path.exists(f / name) for name in (HEATMAP, TILES, REPORT)))
