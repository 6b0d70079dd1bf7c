"""What the pages are told, as JSON: images, runs, channels; of the disk no more than file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from schemas.run import ImageReport, RunReport
from workers.export.words import INTENDED_USE
from workers.report.private import names_of, without_folders
from workers.viewer import deepzoom
from workers.viewer.catalog import Image
from workers.viewer.runs import REPORT, Run, progress
from workers.viewer.sources import Found, Origin


def image_row(image: Image, there: bool) -> dict[str, Any]:
    """One image of the gallery."""
    return {
        "id": image.id,
        "name": image.name,
        "kind": image.kind,
        "source_available": there,
        "runs": [_run_row(run) for run in image.runs.values()],
    }


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "run": run.index,
        "status": run.status,
        "error": run.error,
        "complete": run.complete,
        "progress": progress(run),
        "methods": run.methods,
        "targets": run.targets,
        "channels": [channel.label for channel in run.heatmap.channels] if run.heatmap else [],
        "prediction": run.prediction,
        "auroc": run.auroc,
        "auroc_of": run.auroc_of,
        "seconds": run.seconds,
        "started": run.started,
        "model": run.model.get("model", ""),
    }


def image_document(
    image: Image, found: Found, labels: Sequence[str], pictures: Sequence[str]
) -> dict[str, Any]:
    """All that the page of an image needs.

    Parameters
    ----------
    found
        Its source.
    labels
        Names of the output folders.
    pictures
        Names of the label and macro pictures that may be asked for.
    """
    meta = image.meta
    shown = None
    if image.kind == "slide" and meta is not None and not found.reason:
        levels = deepzoom.level_count(meta.shape_l0)
        shown = {"tile": deepzoom.TILE, "overlap": deepzoom.OVERLAP, "levels": levels, "format": "jpg"}
    heat = next((run.heatmap for run in image.runs.values() if run.heatmap), None)
    return {
        "id": image.id,
        "name": image.name,
        "kind": image.kind,
        "source": {
            "available": not found.reason,
            "reason": private(found.reason, image.origin),
            "shape_l0": heat.grid.shape_l0 if heat else meta and meta.shape_l0,
            "spacing": heat.spacing if heat else meta and meta.spacing,
            "spacing_unit": heat.spacing_unit if heat else meta and meta.spacing_unit,
            "deepzoom": shown,
            "vendor": meta.format if meta else "",
            "objective": found.objective,
            "orientation": meta.source_orientation if meta else "",
            "has_label": bool(pictures),
            "associated": pictures,
        },
        "runs": [_run_document(run, labels[run.index]) for run in image.runs.values()],
        "intended_use": INTENDED_USE,
    }


def _run_document(run: Run, label: str) -> dict[str, Any]:
    info = run.heatmap
    known: dict[str, Any] = {
        "run": run.index,
        "label": label,
        "complete": run.complete,
        "status": run.status,
        "error": run.error,
        "has_peak": info is not None and info.spec.peak and len(info.grid.levels) > 1,
        "partial": info is not None and info.partial,
        "grid": None,
        "channels": [],
        "prediction": run.prediction,
        "counts": run.counts or None,
        "progress": progress(run),
        "auroc_of": run.auroc_of,
        "provenance_short": run.model,
        "raw": f"raw/{run.index}/{run.name}/heatmap.ome.zarr",
    }
    if info is None:
        return known
    grid = info.grid
    words = {
        "method",
        "target",
        "title",
        "edition",
        "unit",
        "signed",
        "bag",
        "bag_method",
        "encoder_unverified",
    }
    known["grid"] = {
        "shape_l0": grid.shape_l0,
        "downsample": grid.downsample,
        "levels": grid.levels,
        "tile": grid.chunk[0],
        "spacing": info.spacing,
    }
    known["channels"] = [
        {
            "index": i,
            **channel.model_dump(include=words),
            "label": channel.label,
            "native_cell_l0": run.cells[i],
            "value_range": info.value_range[i] if info.value_range else None,
            "display": info.display[i] if info.display else None,
            "auroc": run.auroc.get(channel.label),
        }
        for i, channel in enumerate(info.channels)
    ]
    return known


def report_document(run: Run) -> Any:
    """`report.json` of a run, without folders.

    Raises
    ------
    HTTPException
        404: there is none. 409: it is of another version.
    """
    report = _read(run.folder / REPORT, ImageReport)
    return without_folders(report, run.origin.name if run.origin else run.name).model_dump(mode="json")


def batch_document(path: Path) -> Any:
    """`run.json`, without folders.

    Raises
    ------
    HTTPException
        404: there is none. 409: it is of another version.
    """
    batch = _read(path, RunReport)
    images = tuple(
        without_folders(report, name)
        for report, name in zip(batch.images, names_of(batch.images), strict=True)
    )
    return batch.model_copy(update={"images": images}).model_dump(mode="json")


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HTTPException(404, f"there is no {path.name} here") from error
    except ValueError as error:
        raise HTTPException(409, f"this {path.name} is of another version of gigacam") from error


def private(message: str, origin: Origin | None) -> str:
    """A message that shows of a source no more than its name."""
    if not message or origin is None:
        return message
    return without_folders(ImageReport(image=origin.uri, status="failed", error=message), origin.name).error
