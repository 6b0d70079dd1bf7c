"""The report of a whole run: what became of every image, the failed ones first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.run import ImageReport, RunReport
from workers.export.context import HEATMAP
from workers.report import facts
from workers.report.image import NAME
from workers.report.pages import write_page
from workers.report.private import without_folders
from workers.store.folders import written_after

LOST = ("failed", "interrupted", "not started", "gaps")
"""What needs somebody's attention, most first."""


@dataclass(frozen=True)
class Line:
    """One image."""

    report: ImageReport
    status: str
    link: str
    """Of its own report, relative; empty where there is none of the heatmap as it is now."""
    prediction: tuple[tuple[str, float], ...]
    """Class and score: the bag's logit, or the mean over tiles."""
    predicted: str


def write_batch_page(folder: Path, run: RunReport, names: Sequence[str]) -> Path:
    """Write `report.html` beside `run.json`.

    Parameters
    ----------
    folder
        `OUT`.
    names
        What each image is called.
    """
    lines = [_line(folder, image, name) for image, name in zip(run.images, names, strict=True)]
    by_status: Counter[str] = Counter(line.report.status for line in lines)
    counts = [line.report.counts for line in lines if line.report.counts is not None]
    lost = sorted(
        (line for line in lines if line.report.status in LOST),
        key=lambda line: LOST.index(line.report.status),
    )
    return write_page(
        folder / NAME,
        "batch.html",
        title=f"{folder.resolve().name}: {len(lines)} image{'' if len(lines) == 1 else 's'}",
        run=run,
        lost=lost,
        done=[line for line in lines if line.report.status not in LOST],
        statuses=[(facts.STATUS[s], by_status[s]) for s in facts.STATUS if by_status[s]],
        totals={name: sum(getattr(c, name) for c in counts) for name in ("planned", "done", "failed", "left_out")},
        seconds=sum(line.report.seconds.get("all", 0.0) for line in lines),
    )  # fmt: skip


def _line(folder: Path, report: ImageReport, name: str) -> Line:
    shown = without_folders(report, name)
    own = folder / report.image_id
    current = bool(report.image_id) and written_after(own / NAME, own / HEATMAP)
    bag = report.bag
    return Line(
        report=shown,
        status=facts.STATUS[report.status],
        link=f"{report.image_id}/{NAME}" if current else "",
        prediction=tuple((p.target, p.mean) for p in report.prediction)
        if bag is None
        else tuple(zip(bag.classes, bag.logits, strict=True)),
        predicted=bag.predicted if bag is not None else "",
    )
