"""The demo: data whose right answer is known, models trained on the spot, both explained, the maps measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flows.progress import Lines
from schemas.geometry import Box
from schemas.grid import TissueSpec
from schemas.image import ReadOptions
from schemas.run import ExplainRequest, PoolSettings, RunReport
from workers.metrics.planted import at_pixel_centres, lesion_scores, rim_scores
from workers.readers import open_image
from workers.readers.overview import read_overview
from workers.store.heatmap import HeatmapStore
from workers.synthetic.models import train_slide_model, train_volume_model
from workers.synthetic.slides import write_slide
from workers.synthetic.volumes import write_phantom
from workers.tiling.tissue import tissue_mask

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
    _timed("writing a slide with planted lesions", lambda: write_slide(slide_path, truth_path, seed=seed))
    _timed("writing a volume with rim lesions", lambda: write_phantom(volume_path, rim_path, seed=seed))
    slide_card = _timed("training a 2-D network", lambda: train_slide_model(models / "slide", seed=seed))
    volume_card = _timed("training a 3-D network", lambda: train_volume_model(models / "volume", seed=seed))
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
    report = _timed("explaining", lambda: _explain_all(asked, pool, direct))
    for image in report.images:
        if image.status not in ("complete", "gaps"):
            print(f"{image.status}: {image.error}", file=sys.stderr)
            return report
    by_image = {image.image: Path(image.output) for image in report.images}
    print(f"\nAUROC of raw signed maps over evaluated pixels (models and data of seed {seed})")
    slide_folder, volume_folder = by_image[str(slide_path)], by_image[str(volume_path)]
    _print_scores(_slide_table(slide_path, truth_path, slide_folder))
    _print_scores(_volume_table(volume_path, rim_path, volume_folder))
    print("\nTo look at:")
    for image in report.images:
        print(f"  {Path(image.output) / 'overview.png'}")
        print(f"  {Path(image.output) / 'heatmap.ome.zarr'}")
    return report


def _explain_all(asked: list[ExplainRequest], pool: PoolSettings, direct: bool) -> RunReport:
    run: Callable[[ExplainRequest], RunReport]
    if direct:
        from flows.batch import explain_batch

        def run(request: ExplainRequest) -> RunReport:
            return explain_batch(request, pool, Lines())
    else:
        from flows.explain import explain as explain_flow

        def run(request: ExplainRequest) -> RunReport:
            found: RunReport = explain_flow(request, pool)
            return found

    reports = [run(request) for request in asked]
    images = tuple(image for report in reports for image in report.images)
    return reports[-1].model_copy(update={"images": images})


def _slide_table(slide: Path, truth: Path, folder: Path) -> dict[str, dict[str, float]]:
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    grid = heatmap.info.grid
    options = ReadOptions(mpp_um=heatmap.info.spacing[0])
    reader = open_image(str(slide), options)
    pixels, downsample, _ = read_overview(reader, spacing=(8.0, 8.0))
    reader.close()
    size = tuple(s * d for s, d in zip(heatmap.info.spacing, downsample, strict=True))
    mask = tissue_mask(pixels, size, TissueSpec()).mask
    shape, step = grid.levels[0], grid.downsample[0]
    tissue = at_pixel_centres(mask, downsample, shape, step).astype(bool)
    planted = at_pixel_centres(_whole(str(truth), options), (1.0, 1.0), shape, step)
    darkness = 255.0 - at_pixel_centres(pixels.mean(axis=0), downsample, shape, step)
    table = {
        channel.label: lesion_scores(_channel(heatmap, i), planted, tissue)
        for i, channel in enumerate(heatmap.info.channels)
    }
    seen = np.isfinite(_channel(heatmap, 0))
    table["raw darkness"] = lesion_scores(np.where(seen, darkness, np.nan), planted, tissue)
    return table


def _volume_table(volume: Path, truth: Path, folder: Path) -> dict[str, dict[str, float]]:
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    grid = heatmap.info.grid
    shape, step = grid.levels[0], grid.downsample[0]
    ones = (1.0,) * 3
    planted = at_pixel_centres(_whole(str(truth), ReadOptions()), ones, shape, step).astype(int)
    raw = at_pixel_centres(_whole(str(volume), ReadOptions()), ones, shape, step)
    table = {
        channel.label: rim_scores(_channel(heatmap, i), planted)
        for i, channel in enumerate(heatmap.info.channels)
    }
    table["raw intensity"] = rim_scores(np.where(np.isfinite(_channel(heatmap, 0)), raw, np.nan), planted)
    return table


def _whole(uri: str, options: ReadOptions) -> NDArray[Any]:
    """First channel of a small image at level 0."""
    reader = open_image(uri, options)
    shape = reader.meta.shape_l0
    box = Box(frame="l0", start=(0,) * len(shape), stop=shape)
    pixels, _ = reader.read(box, shape, 0)
    reader.close()
    first: NDArray[Any] = pixels[0]
    return first


def _channel(heatmap: HeatmapStore, index: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = heatmap.as_dask(0)[index].compute()
    return values


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


def _timed(what: str, do: Callable[[], T]) -> T:
    began = time.perf_counter()
    print(f"{what} ... ", end="", flush=True)
    result = do()
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    return result
