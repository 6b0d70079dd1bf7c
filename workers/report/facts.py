"""Rows of a report's tables: what was recorded, in words and in the units people use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.geometry import Box
from schemas.heatmap import Coverage
from schemas.image import ImageMeta
from schemas.run import HeatmapInfo, ImageReport
from workers.export import words
from workers.export.context import HEATMAP
from workers.report.limits import FLAGS
from workers.report.private import Clean
from workers.store.folders import written_after

COVERAGE: Mapping[Coverage, str] = {
    Coverage.PENDING: "not computed yet",
    Coverage.EVALUATED: "evaluated",
    Coverage.FAILED: "failed: no value",
    Coverage.BACKGROUND: "background: not looked at",
    Coverage.LEFT_OUT: "left out by choice",
}
STATUS = {
    "complete": "Complete",
    "gaps": "Has gaps: some tiles have no map",
    "failed": "Failed: there is no map",
    "duplicate": "Same image as another of the run: not computed twice",
    "interrupted": "Interrupted: run again to finish",
    "not started": "Not started",
}
Row = tuple[str, str]


@dataclass(frozen=True)
class Area:
    """How much of an image has one coverage code."""

    what: str
    size: str
    share: float


def place(box: Box) -> str:
    """A level-0 box, x first, as viewers count."""
    axes = ("x", "y", "z")[: len(box.start)]
    ranges = zip(axes, reversed(box.start), reversed(box.stop), strict=True)
    return ", ".join(f"{axis}\N{NO-BREAK SPACE}{words_of(a)}–{words_of(b)}" for axis, a, b in ranges)


def words_of(count: int) -> str:
    """A whole number with its thousands apart."""
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "−")


def times(values: Any, unit: str = "") -> str:
    """Sizes in array order as x × y (× z)."""
    shown = " × ".join(words_of(v) if isinstance(v, int) else f"{v:.4g}" for v in reversed(list(values)))
    return f"{shown} {unit}".strip()


def areas(counts: Mapping[Coverage, int], info: HeatmapInfo) -> list[Area]:
    """Area or volume by coverage code, and its share of the image."""
    pixel = math.prod(d * s for d, s in zip(info.grid.downsample, info.spacing, strict=True))
    inside = {code: n for code, n in counts.items() if code in COVERAGE}
    total = sum(inside.values())
    slide = info.spacing_unit == "um"
    found = []
    for code, what in COVERAGE.items():
        if n := inside.get(code, 0):
            size = n * pixel * (1e-6 if slide else 1e-3)
            found.append(Area(what, f"{words.number(size)} {'mm²' if slide else 'cm³'}", n / total))
    return found


def flags(report: ImageReport) -> list[tuple[str, int, str]]:
    """Flag, how many tile maps carry it, and what it means."""
    found = []
    for name, number in report.flags.items():
        label = next((label for label in FLAGS if name.endswith(f" {label}")), "")
        found.append((name, number, FLAGS.get(label, "")))
    return found


def source(report: ImageReport) -> list[Row]:
    """What the image is."""
    if "image" not in report.provenance:
        return []
    meta = ImageMeta.model_validate(report.provenance["image"])
    unit = "µm" if meta.kind == "slide" else "mm"
    spacing = report.provenance["spec"]["spacing"]
    rows = [
        ("Image", report.image),
        ("Kind", f"{meta.kind}, {meta.format}, {meta.channels} channel(s), {meta.dtype}"),
        ("Size", times(meta.shape_l0, "pixels" if meta.kind == "slide" else "voxels")),
        ("Pixel size", f"{times(spacing, unit)} ({meta.spacing_source})"),
        ("Levels", ", ".join(times(level.shape) for level in meta.levels)),
        ("Content (sha256)", meta.identity),
    ]
    if meta.source_orientation:
        rows.append(("Orientation as stored", meta.source_orientation))
    return rows + [("Note", note) for note in meta.notes]


def model(report: ImageReport) -> list[Row]:
    """What the network is."""
    card = report.provenance.get("spec", {}).get("card", {})
    network, bag = card.get("network", {}), card.get("bag") or {}
    rows = [
        ("Model", f"{card.get('name', '')} {card.get('version', '')}".strip()),
        ("Intended use, as its card says", report.provenance.get("intended_use", "")),
        ("Licence", card.get("licence", "")),
        ("Network", f"{network.get('name', '')} ({network.get('adapter', '')})" if network else ""),
        ("Weights (sha256)", network.get("sha256", "") or card.get("state_sha256", "")),
        ("Bag head", bag.get("head", "")),
        ("Bag head weights (sha256)", bag.get("sha256", "")),
    ]
    return [(name, value) for name, value in rows if value]


def tiles_have(report: ImageReport) -> str:
    """What a tile that is done has."""
    return "features" if report.provenance.get("stage") == "embed" else "a map"


def how(report: ImageReport) -> list[Row]:
    """What was asked, and where it ran."""
    provenance = report.provenance
    if "spec" not in provenance:
        return []
    spec, lattice = provenance["spec"], provenance["lattice"]
    cam, grid = spec["cam"], spec["grid"]
    ran = [
        ("Precision", cam["precision"]),
        ("Tiles", f"{times(grid['tile_px'])} model pixels ({times(lattice['tile_l0'])} level-0), overlap {grid['overlap']:.0%}"),
        ("Batch and unit", f"{spec['batch']} tiles, {spec['unit']} tiles"),
        ("Device", provenance["device"] or "none"),
        ("Ran on", provenance["pool"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
        ("Tile maps (id)", provenance["tiles_id"]),
    ]  # fmt: skip
    if "heatmap" not in provenance:  # the tiles were embedded, and nothing is explained yet
        return ran
    heatmap, tissue = provenance["heatmap"], provenance["tissue"]
    return [
        ("Methods", ", ".join([*cam["bag_methods"], *cam["methods"]])),
        ("Targets", ", ".join(cam["targets"])),
        ("Layer", cam["layer"]),
        ("Tissue", f"{tissue['method']}, {tissue['fraction']:.1%} of the image"),
        ("Heatmap pixel", f"{heatmap['downsample']} level-0 pixels; tiles blended by {heatmap['importance']} weights"),
        ("Seeds", "fixed: noise and samples are drawn by the number of each tile, so that the same request gives the same numbers"),
        *ran,
        ("Heatmap (id)", provenance["run_id"]),
    ]  # fmt: skip


def recorded(report: ImageReport) -> list[Row]:
    """Every value of the provenance by its dotted name, as it was written down; what is empty is left out."""
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in _leaves(report.provenance)
        if value not in (None, "", [], {})
    ]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


@dataclass(frozen=True)
class Metrics:
    """How well maps found what is known to be there, where that was measured."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    refused: tuple[Row, ...]
    """Methods that could not be used, and why."""


MEASURED = {
    "class_sensitivity": "class sensitivity",
    "ssim": "SSIM under noise",
    "seconds_per_1000_tiles": "s per 1,000 tiles",
}
"""Of `methods.json`; AUROCs come first, one a question."""


def metrics(folder: Path, clean: Clean) -> Metrics | None:
    """What was measured of an image whose truth is known (`methods.json`); None where nothing was, or of an earlier heatmap."""
    path = folder / "methods.json"
    if not written_after(path, folder / HEATMAP):
        return None
    document: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    used = {name: facts for name, facts in document.items() if not facts.get("reason")}
    questions = list(dict.fromkeys(q for facts in used.values() for q in facts.get("auroc", {})))
    others = [key for key in MEASURED if any(facts.get(key) is not None for facts in used.values())]
    return Metrics(
        columns=(*(f"AUROC, {q}" for q in questions), *(MEASURED[key] for key in others)),
        rows=tuple(
            (
                name,
                (
                    *(facts.get("auroc", {}).get(q) for q in questions),
                    *(facts.get(key) for key in others),
                ),
            )
            for name, facts in used.items()
        ),
        refused=tuple(
            (name, clean(str(facts["reason"]))) for name, facts in document.items() if facts.get("reason")
        ),
    )
