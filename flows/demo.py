"""The demo: data whose right answer is known, models trained on the spot, both explained, the maps measured."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from flows.progress import Lines
from schemas.run import ExplainRequest, PoolSettings, RunReport
from workers.evaluator import planted_lesion_scores, rim_lesion_scores
from workers.synthetic.models import train_slide_model, train_volume_model
from workers.synthetic.slides import write_slide
from workers.synthetic.volumes import write_phantom

T = TypeVar("T")

METHODS = ("gradcam", "hirescam", "layercam", "gradcampp", "xgradcam", "eigencam")
TARGETS = {"lesion against all other tissue": 0.95, "lesion against lesion + distractor": 0.95,
           "rim shell against everything": 0.85, "rim+ against rim- lesion voxels": 0.90}  # fmt: skip
"""What Grad-CAM is expected to reach on data made this way."""


def run_demo(
    out: Path, slide: str, methods: tuple[str, ...], pool: PoolSettings, seed: int, direct: bool
) -> RunReport:
    """Run the whole demo into `out`; returns the run's report."""
    inputs, models, run = out / "inputs", out / "models", out / "run"
    names = ("gradcam", *(m for m in methods or METHODS if m != "gradcam"))
    slide_path, truth_path = inputs / "slide.tiff", inputs / "slide.truth.tiff"
    volume_path, rim_path = inputs / "volume.nii.gz", inputs / "volume.truth.nii.gz"
    inputs.mkdir(parents=True, exist_ok=True)
    slide_card, volume_card = _side_by_side(
        (_make_slide, (slide_path, truth_path, models / "slide", seed)),
        (_make_volume, (volume_path, rim_path, models / "volume", seed)),
    )
    asked = [
        ExplainRequest(
            images=(str(slide_path),), model=str(slide_card), out=str(run), methods=names,
            targets=("lesion",), overlap=0.5,
        ),
        ExplainRequest(
            images=(str(volume_path),), model=str(volume_card), out=str(run), methods=names,
            targets=("rim+",), overlap=0.5, tissue="none",
        ),
    ]  # fmt: skip
    if slide:
        asked.append(ExplainRequest(images=(slide,), model=str(slide_card), out=str(run), methods=names))
    lines: list[str] = []
    report = _timed("explained both", lambda: _explain_all(asked, pool, direct), lines)
    print("\n".join(lines), flush=True)
    for image in report.images:
        if image.status not in ("complete", "gaps"):
            print(f"{image.status}: {image.error}", file=sys.stderr)
            return report
    by_image = {image.image: Path(image.output) for image in report.images}
    print(f"\nAUROC of raw signed maps over evaluated pixels (models and data of seed {seed})")
    slide_folder, volume_folder = by_image[str(slide_path)], by_image[str(volume_path)]
    _print_scores(planted_lesion_scores(slide_path, truth_path, slide_folder))
    _print_scores(rim_lesion_scores(volume_path, rim_path, volume_folder))
    print("\nTo look at:")
    for image in report.images:
        print(f"  {Path(image.output) / 'overview.png'}")
        print(f"  {Path(image.output) / 'heatmap.ome.zarr'}")
    return report


def _make_slide(path: Path, truth: Path, model: Path, seed: int) -> tuple[Path, list[str]]:
    """Card of a 2-D network trained on other slides, and what was done in how long."""
    lines: list[str] = []
    _timed("wrote a slide with planted lesions", lambda: write_slide(path, truth, seed=seed), lines)
    card = _timed("trained a 2-D network", lambda: train_slide_model(model, seed=seed), lines)
    return card, lines


def _make_volume(path: Path, truth: Path, model: Path, seed: int) -> tuple[Path, list[str]]:
    """Card of a 3-D network trained on other volumes, and what was done in how long."""
    lines: list[str] = []
    _timed("wrote a volume with rim lesions", lambda: write_phantom(path, truth, seed=seed), lines)
    card = _timed("trained a 3-D network", lambda: train_volume_model(model, seed=seed), lines)
    return card, lines


def _side_by_side(*calls: tuple[Callable[..., tuple[Path, list[str]]], tuple[Any, ...]]) -> list[Path]:
    """Run the calls in a process each, one thread a process: small networks gain little from a second one."""
    print("making a slide, a volume, and a network for each ...", flush=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(len(calls), mp_context=multiprocessing.get_context("spawn")) as processes:
            running = [processes.submit(call, *args) for call, args in calls]
            cards = []
            for future in running:
                card, lines = future.result()
                cards.append(card)
                print("\n".join(f"  {line}" for line in lines), flush=True)
            return cards
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def _explain_all(asked: list[ExplainRequest], pool: PoolSettings, direct: bool) -> RunReport:
    told = Lines()
    if direct:
        from flows.batch import explain_batch

        reports = [explain_batch(request, pool, told) for request in asked]
    else:
        from flows.server import recorded

        with recorded(told, pool) as run:
            reports = [run(request, pool) for request in asked]
    images = tuple(image for report in reports for image in report.images)
    return reports[-1].model_copy(update={"images": images})


def _print_scores(table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    width = max(len(name) for name in table)
    print("\n" + " " * width + "  " + "  ".join(columns))
    for name, scores in table.items():
        print(f"{name:{width}}  " + "  ".join(f"{scores[c]:>{len(c)}.3f}" for c in columns))
    first = next(iter(table))
    for column in columns:
        verdict = "reached" if table[first][column] >= TARGETS[column] else "MISSED"
        print(
            f"{first}: {column} {table[first][column]:.3f}, expected at least {TARGETS[column]:.2f}: {verdict}"
        )


def _timed(what: str, do: Callable[[], T], lines: list[str]) -> T:
    began = time.perf_counter()
    result = do()
    lines.append(f"{what} in {time.perf_counter() - began:.1f} s")
    return result
