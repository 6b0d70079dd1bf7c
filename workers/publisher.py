"""The last step of an image: ranges and display windows, predictions, the written report."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.frozen import Frozen
from schemas.geometry import Box
from schemas.heatmap import TileStatus
from schemas.model import OutputSpec
from schemas.run import ImageReport, Prediction, RunReport
from workers.store.folders import move_aside
from workers.store.heatmap import HeatmapStore
from workers.store.statistics import channel_statistics
from workers.store.tiles import TilesStore

log = logging.getLogger("gigacam")


def publish_heatmap(heatmap: HeatmapStore, threads: int) -> None:
    """Write each channel's raw range and display window, and mark the heatmap complete.

    A thread holds a shard or two: their number bounds the memory.
    """
    signed = [channel.signed for channel in heatmap.info.channels]
    stats = channel_statistics(heatmap.as_dask(), signed, threads)
    heatmap.publish(value_range=stats.value_range, display=stats.display)


def predictions(tiles: TilesStore, output: OutputSpec) -> tuple[Prediction, ...]:
    """Mean and highest score of each class (output, reference, position) over the tiles that were computed.

    None of a bag: its tiles have no scores.
    """
    scores = tiles.scores()
    done = np.flatnonzero(tiles.statuses() == TileStatus.DONE)
    if not len(done) or tiles.info.features:
        return ()
    best = done[np.argmax(scores[done], axis=0)]
    boxes = tiles.boxes(best)
    return tuple(
        Prediction(
            target=name,
            quantity=output.quantity,
            mean=float(np.mean(scores[done, i], dtype=np.float64)),
            highest=float(scores[best[i], i]),
            highest_box=Box(frame="l0", start=tuple(boxes[i, 0].tolist()), stop=tuple(boxes[i, 1].tolist())),
            symbols=_emitted(tiles, name, done, output.vocabulary) if output.kind == "sequence" else {},
        )
        for i, name in enumerate(tiles.info.classes)
    )


def _emitted(
    tiles: TilesStore, target: str, done: NDArray[np.int64], vocabulary: Sequence[str]
) -> dict[str, int]:
    """How many of the tiles `done` emitted each symbol at the position `target`; empty if it was not explained."""
    targets = tiles.info.spec.cam.targets
    if target not in targets:
        return {}
    counts = Counter(tiles.target_index()[done, targets.index(target)].tolist())
    return {
        vocabulary[symbol] if symbol < len(vocabulary) else str(symbol): n
        for symbol, n in counts.most_common()
    }


def write_json(path: Path, value: Frozen) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as handle:
        handle.write(value.model_dump_json(indent=2) + "\n")
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)


def drop_derived(folder: Path) -> None:
    """Remove what was made from a heatmap that is about to change: it would describe the earlier one.

    Exports are moved aside (`export.old-N`), as people may keep files of their own among them.
    """
    for name in ("report.json", "report.html", "overview.png", "heatmap.nii.gz"):
        (folder / name).unlink(missing_ok=True)
    if (folder / "export").is_dir():
        move_aside(folder / "export")


def write_image_report(folder: Path, report: ImageReport) -> None:
    """`report.json` beside the heatmap."""
    write_json(folder / "report.json", report)


def finished_report(folder: Path, run_id: str) -> ImageReport | None:
    """The report of a run that left nothing to do, where its report and picture are still there."""
    if not ((folder / "report.json").exists() and (folder / "overview.png").exists()):
        return None
    try:
        report = ImageReport.model_validate_json((folder / "report.json").read_text())
    except ValidationError:
        return None  # written by another version: everything is published anew
    finished = report.status in ("complete", "gaps") and not report.failed_tasks
    return report if finished and report.provenance.get("run_id") == run_id else None


def write_run_report(out: Path, report: RunReport) -> None:
    """`run.json`: the batch, after what earlier runs left in the same folder about other images.

    Failed tiles one by one and the provenance are in each image's own `report.json`.
    """
    path = out / "run.json"
    asked = {image.image for image in report.images}
    earlier = (image for image in _earlier(path) if image.image not in asked)
    short = (image.model_copy(update={"failures": (), "provenance": {}}) for image in report.images)
    write_json(path, report.model_copy(update={"images": (*earlier, *short)}))


def _earlier(path: Path) -> tuple[ImageReport, ...]:
    if not path.exists():
        return ()
    try:
        return RunReport.model_validate_json(path.read_text()).images
    except ValidationError:
        # Written by another version: its images are not listed again, their own folders stay.
        log.warning("%s is not of this version and is written anew", path)
        return ()
