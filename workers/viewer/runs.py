"""What one output folder holds of one image: read from its report and stores, which may be missing, old or damaged."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import StoreError
from schemas.image import ImageMeta, ReadOptions
from schemas.run import HeatmapInfo, ImageReport, TilesInfo
from workers.report.private import shown_name, without_folders
from workers.store.folders import written_after
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.viewer.sources import Origin

log = logging.getLogger("gigacam")

HEATMAP, TILES, REPORT, METHODS = "heatmap.ome.zarr", "tiles.zarr", "report.json", "methods.json"
FINISHED = ("complete", "gaps", "failed")
OTHER_VERSION = f"{REPORT} is of another version of gigacam"
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


def read_run(index: int, folder: Path) -> Run:
    report = read_json(folder / REPORT, ImageReport)
    tiles, heat, faults = _stores(folder)
    provenance = report.provenance if report else {}
    meta, read = (tiles.image, tiles.spec.read) if tiles else _recorded(folder, provenance, faults)
    spec: dict[str, Any] = tiles.spec.model_dump(mode="json") if tiles else provenance.get("spec", {})
    hidden = meta is not None and folder.name == meta.image_id("hash")
    origin = None
    if meta is not None:
        name = folder.name if hidden else shown_name(meta.uri)
        origin = Origin(meta.uri, name, meta.identity, read)
    status, error = "computing", ""
    if report is not None:
        status = report.status
        error = without_folders(report, origin.name if origin else folder.name).error
    elif os.path.exists(folder / REPORT):
        faults.append(OTHER_VERSION)
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
        if os.path.exists(folder / TILES):
            tiles = TilesStore.open(folder / TILES).info
    except StoreError as error:
        log.warning("%s", error)
        faults.append(f"{TILES} cannot be read: it is damaged, or of another version of gigacam")
    try:
        if os.path.exists(folder / HEATMAP):
            heat = HeatmapStore.open(folder / HEATMAP).info
    except StoreError as error:
        log.warning("%s", error)
        faults.append(f"{HEATMAP} cannot be read: it is damaged, or of another version of gigacam")
    return tiles, heat, faults


def _recorded(
    folder: Path, provenance: dict[str, Any], faults: list[str]
) -> tuple[ImageMeta | None, ReadOptions]:
    """The image as a report has it, and how it was opened; what is wrong with them goes to `faults`."""
    if "image" in provenance:
        try:
            read = ReadOptions.model_validate(provenance.get("spec", {}).get("read", {}))
            return ImageMeta.model_validate(provenance["image"]), read
        except ValidationError as error:
            log.warning("%s: %d fields of its image differ", folder / REPORT, error.error_count())
            faults.append(OTHER_VERSION)
    return None, ReadOptions()


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
    if not written_after(folder / METHODS, folder / HEATMAP):
        return {}, ""
    try:
        document = json.loads((folder / METHODS).read_text(encoding="utf-8"))
        answers = {label: document.get(method, {}).get("auroc", {}) for label, method in channels}
        question = next((next(iter(found)) for found in answers.values() if found), "")
        return {
            label: float(found[question]) for label, found in answers.items() if question in found
        }, question
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: %s", folder / METHODS, error)
        return {}, ""


def read_json(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError:
        return None
    except ValidationError as error:
        log.warning("%s is of another version of gigacam (%d fields differ)", path, error.error_count())
        return None


def marks(*paths: Path) -> Marks:
    """When and how large files were written; None where there is none."""
    found_marks: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            found_marks.append(None)
        else:
            found_marks.append((found.st_mtime_ns, found.st_size))
    return tuple(found_marks)


def _time(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return ""
