"""What lies in the output folders: images, the runs of each, and how far those that are not finished have come."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import StoreError
from schemas.image import ImageMeta, ReadOptions
from schemas.run import HeatmapInfo, ImageReport, RunReport, TilesInfo
from workers.report.private import names_of, shown_name, without_folders
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.viewer.sources import Origin

log = logging.getLogger("gigacam")

FRESH_S = 1.0
"""How old an answer may be: however many pages ask, the folders are read so often."""
HEATMAP, TILES, REPORT, RUN = "heatmap.ome.zarr", "tiles.zarr", "report.json", "run.json"
FINISHED = ("complete", "gaps", "failed")
Marks = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Run:
    """What one output folder holds of one image."""

    index: int
    folder: Path
    status: str
    error: str = ""
    heatmap: HeatmapInfo | None = None
    meta: ImageMeta | None = None
    origin: Origin | None = None
    cells: tuple[tuple[float, ...] | None, ...] = ()
    """Native CAM cell in level-0 px, a channel."""
    methods: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    prediction: tuple[dict[str, Any], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    auroc: dict[str, float] = field(default_factory=dict)
    auroc_of: str = ""
    """Which question the AUROC answers."""
    seconds: float | None = None
    started: str = ""
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def heatmap_path(self) -> Path:
        return self.folder / HEATMAP

    @property
    def complete(self) -> bool:
        return self.status in ("complete", "gaps") and self.heatmap is not None and self.heatmap.complete


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
            image_id = first.name if first.name not in images else f"{first.name}~{key[:8]}"
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
        marks = _marks(out / RUN)
        known = self._batches.get(out)
        if known is None or known[0] != marks:
            document = _read_json(out / RUN, RunReport)
            known = marks, document.images if document else ()
            self._batches[out] = known
        return known[1]

    def _run(self, index: int, folder: Path) -> Run:
        paths = (REPORT, f"{HEATMAP}/zarr.json", f"{TILES}/zarr.json", "methods.json")
        marks = _marks(*(folder / path for path in paths))
        known = self._read.get(folder)
        if known is None or known[0] != marks:
            known = marks, _read_run(index, folder)
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
        ended = _marks(run.folder.parent / RUN)[0]
        ledgers = _marks(run.folder / TILES / "zarr.json", run.folder / TILES / "status" / "explain" / "c",
                         run.folder / HEATMAP / "zarr.json")  # fmt: skip
        return ended is not None and all(mark is None or mark[0] < ended[0] for mark in ledgers)


def image_folders(out: Path) -> list[Path]:
    """Folders of images in an output folder, by name."""
    try:
        entries = [Path(entry) for entry in os.scandir(out) if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(f for f in entries if any((f / name).exists() for name in (HEATMAP, TILES, REPORT)))


def progress(run: Run) -> dict[str, int]:
    """Tiles and blocks by state, as they are on disk now."""
    found = dict.fromkeys(("planned", "done", "failed", "left_out", "blocks_done", "blocks_total"), 0)
    found |= run.counts
    if run.heatmap is not None:
        grid = run.heatmap.grid
        blocks = [grid.blocks(level) for level in range(len(grid.levels))]
        found["blocks_total"] = sum(math.prod(counts) for counts in blocks)
        found["blocks_done"] = found["blocks_total"]
    if run.status in FINISHED:
        return found
    try:
        counts = TilesStore.open(run.folder / TILES).counts()
        found |= counts.model_dump()
        store = HeatmapStore.open(run.heatmap_path)
        found["blocks_done"] = sum(len(store.done_blocks(level)) for level in range(len(store.grid.levels)))
    except (StoreError, OSError, LookupError) as error:
        log.info("%s: %s", run.folder, error)  # it went away, or is being made
    return found


def _read_run(index: int, folder: Path) -> Run:
    report = _read_json(folder / REPORT, ImageReport)
    tiles, heat, faults = _stores(folder)
    provenance = report.provenance if report else {}
    meta = tiles.image if tiles else None
    spec: dict[str, Any] = tiles.spec.model_dump(mode="json") if tiles else provenance.get("spec", {})
    if meta is None and "image" in provenance:
        meta = ImageMeta.model_validate(provenance["image"])
    hidden = meta is not None and folder.name == meta.image_id("hash")
    origin = None
    if meta is not None:
        name = folder.name if hidden else shown_name(meta.uri)
        read = (tiles.spec.read if tiles else None) or _read_options(spec)
        origin = Origin(meta.uri, name, meta.identity, read)
    status, error = "computing", ""
    if report is not None:
        status = report.status
        error = without_folders(report, origin.name if origin else folder.name).error
    elif (folder / REPORT).exists():
        faults.append(f"{REPORT} is of another version of gigacam")
    if faults:
        status, error = "failed", "; ".join([*([error] if error else []), *faults])
    channels = heat.channels if heat else report.channels if report else ()
    auroc, question = _auroc(folder, [(c.label, c.method) for c in channels])
    card, network = spec.get("card", {}), spec.get("card", {}).get("network", {})
    return Run(
        index=index,
        folder=folder,
        status=status,
        error=error,
        heatmap=heat,
        meta=meta,
        origin=origin,
        cells=tuple(_cell(tiles, c.method, bool(c.bag_method)) for c in channels),
        methods=tuple(dict.fromkeys(c.method for c in channels)),
        targets=tuple(dict.fromkeys(c.target for c in channels)),
        prediction=_prediction(report),
        counts=report.counts.model_dump() if report and report.counts else {},
        auroc=auroc,
        auroc_of=question,
        seconds=report.seconds.get("all") if report else None,
        started=_time(folder / TILES / "zarr.json"),
        model={
            "model": f"{card.get('name', '')} {card.get('version', '')}".strip(),
            "digest": network.get("sha256", "") or network.get("trunk_sha256", ""),
            "precision": spec.get("cam", {}).get("precision", ""),
            "layer": spec.get("cam", {}).get("layer", ""),
            "intended_use": card.get("intended_use", ""),
            "run_id": heat.run_id if heat else provenance.get("run_id", ""),
            "created": _time(folder / REPORT) or _time(folder / HEATMAP / "zarr.json"),
        },
    )


def _stores(folder: Path) -> tuple[TilesInfo | None, HeatmapInfo | None, list[str]]:
    """What the two stores say of themselves, and what is wrong with those that say nothing."""
    tiles, heat, faults = None, None, []
    try:
        if (folder / TILES).exists():
            tiles = TilesStore.open(folder / TILES).info
    except StoreError as error:
        log.warning("%s", error)
        faults.append(f"{TILES} cannot be read: it is damaged, or of another version of gigacam")
    try:
        if (folder / HEATMAP).exists():
            heat = HeatmapStore.open(folder / HEATMAP).info
    except StoreError as error:
        log.warning("%s", error)
        faults.append(f"{HEATMAP} cannot be read: it is damaged, or of another version of gigacam")
    return tiles, heat, faults


def _read_options(spec: dict[str, Any]) -> ReadOptions:
    return ReadOptions.model_validate(spec.get("read", {}))


def _cell(tiles: TilesInfo | None, method: str, bag: bool) -> tuple[float, ...] | None:
    if tiles is None:
        return None
    if bag:
        return tiles.bag_grid().cell_l0
    grid = tiles.grids.get(method)
    return grid.cell_l0 if grid else None


def _prediction(report: ImageReport | None) -> tuple[dict[str, Any], ...]:
    if report is None:
        return ()
    rows = [
        {"target": p.target, "mean": p.mean, "highest": p.highest, "quantity": p.quantity}
        for p in report.prediction
    ]
    if report.bag is not None:
        rows += [
            {"target": name, "mean": logit, "highest": None, "quantity": "logit of the bag"}
            for name, logit in zip(report.bag.classes, report.bag.logits, strict=True)
        ]
    return tuple(rows)


def _auroc(folder: Path, channels: Sequence[tuple[str, str]]) -> tuple[dict[str, float], str]:
    """AUROC by channel label from `methods.json`, which is written where the truth is known; its first question."""
    written, heat = _marks(folder / "methods.json", folder / HEATMAP / "zarr.json")
    if written is None or (heat is not None and heat[0] > written[0]):
        return {}, ""
    try:
        document = json.loads((folder / "methods.json").read_text(encoding="utf-8"))
        answers = {label: document.get(method, {}).get("auroc", {}) for label, method in channels}
        question = next((next(iter(found)) for found in answers.values() if found), "")
        return {
            label: float(found[question]) for label, found in answers.items() if question in found
        }, question
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: %s", folder / "methods.json", error)
        return {}, ""


def _read_json(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError:
        return None
    except ValidationError as error:
        log.warning("%s is of another version of gigacam (%d fields differ)", path, error.error_count())
        return None


def _marks(*paths: Path) -> Marks:
    """When and how large files were written; None where there is none."""
    marks: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            marks.append(None)
        else:
            marks.append((found.st_mtime_ns, found.st_size))
    return tuple(marks)


def _time(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return ""
