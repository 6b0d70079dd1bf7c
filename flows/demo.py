"""The demo: data whose right answer is known, models trained on the spot, both explained, the maps measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from flows.progress import Lines
from flows.tables import Scores, class_words, demo_document, demo_table, print_table
from schemas.geometry import Box
from schemas.run import ExplainRequest, PoolSettings, RunReport
from workers.cam.methods import METHODS as TABLE
from workers.evaluator import planted_lesion_scores, rim_lesion_scores
from workers.export.contact import Outline, write_contact_sheet
from workers.metrics.planted import DISTRACTOR, LESION, RIM_MINUS, RIM_SHELL
from workers.readers import open_image
from workers.store.heatmap import HeatmapStore
from workers.synthetic.models import train_slide_model, train_volume_model
from workers.synthetic.slides import write_slide
from workers.synthetic.volumes import write_phantom
from workers.trust import Trust, busiest_window, survey

T = TypeVar("T")

ALL = "all"
"""Stands for every method there is."""

METHODS = ("gradcam", "hirescam", "layercam", "gradcampp", "xgradcam", "eigencam")
TARGETS = {"lesion against all other tissue": 0.95, "lesion against lesion + distractor": 0.95,
           "rim shell against everything": 0.85, "rim+ against rim- lesion voxels": 0.90}  # fmt: skip
"""What Grad-CAM is expected to reach on data made this way."""


SLIDE_VALUES, VOLUME_VALUES = (DISTRACTOR, LESION), (RIM_MINUS, RIM_SHELL)
"""What tiles are measured on: both classes of each network."""
TILES_EACH = 4
LIGHTER = {"sscam": "sscam+samples=3", "iscam": "iscam+samples=3"}
"""What stands for the slowest methods among all."""
BESIDE = {"normgrad_proper": "normgrad_layers+at=real+layers=features.denseblock1.denselayer2.layers.conv2"}
"""A method that needs a convolution is shown at one, beside what it says of the layer explained."""
SLIDE_OUTLINES = (Outline("lesion", (LESION,), "solid"), Outline("distractor", (DISTRACTOR,), "dotted"))
VOLUME_OUTLINES = (Outline("rim+ shell", (RIM_SHELL,), "solid"),
                   Outline("rim- lesion", (RIM_MINUS,), "dotted"))  # fmt: skip


def chosen_methods(asked: tuple[str, ...]) -> tuple[str, ...]:
    """The methods asked for, `all` written out; Grad-CAM comes first, asked for or not."""
    everything = [n for name in TABLE for n in (LIGHTER.get(name, name), BESIDE.get(name)) if n]
    named = [n for name in asked or METHODS for n in (everything if name == ALL else [name])]
    return tuple(dict.fromkeys(["gradcam", *named]))


def run_demo(
    out: Path, slide: str, methods: tuple[str, ...], pool: PoolSettings, seed: int, direct: bool
) -> RunReport:
    """Run the whole demo into `out`; returns the run's report."""
    inputs, models, run = out / "inputs", out / "models", out / "run"
    names = chosen_methods(methods)
    slide_path, truth_path = inputs / "slide.tiff", inputs / "slide.truth.tiff"
    volume_path, rim_path = inputs / "volume.nii.gz", inputs / "volume.truth.nii.gz"
    inputs.mkdir(parents=True, exist_ok=True)
    print("making a slide, a volume, and a network for each ...", flush=True)
    slide_card, volume_card = side_by_side(
        (_make_slide, (slide_path, truth_path, models / "slide", seed)),
        (_make_volume, (volume_path, rim_path, models / "volume", seed)),
    )
    print(
        f"measuring each method alone on {2 * TILES_EACH} tiles, both networks at once, one thread each ...",
        flush=True,
    )
    slide_trust, volume_trust = side_by_side(
        (_measure, (slide_card, slide_path, truth_path, SLIDE_VALUES, names, seed)),
        (_measure, (volume_card, volume_path, rim_path, VOLUME_VALUES, names, seed)),
    )
    region, overlap = "", 0.5
    if ALL in methods:
        region, overlap = str(inputs / "region.geojson"), 0.0
        _write_region(inputs / "region.geojson", busiest_window(str(truth_path), SLIDE_VALUES))
        print(
            "to stay within minutes, all methods see only the part of the slide in inputs/region.geojson, tiles do not "
            f"overlap, and {' and '.join(LIGHTER)} take 3 samples"
        )
    asked = [
        ExplainRequest(
            images=(str(slide_path),), model=str(slide_card), out=str(run), methods=_taken(slide_trust),
            targets=("lesion",), overlap=overlap, region=region,
        ),
        ExplainRequest(
            images=(str(volume_path),), model=str(volume_card), out=str(run), methods=_taken(volume_trust),
            targets=("rim+",), overlap=overlap, tissue="none",
        ),
    ]  # fmt: skip
    if slide:
        asked.append(
            ExplainRequest(images=(slide,), model=str(slide_card), out=str(run), methods=_taken(slide_trust))
        )
    lines: list[str] = []
    report = timed("explained both", lambda: explain_all(asked, pool, direct), lines)
    print("\n".join(lines), flush=True)
    for image in report.images:
        if image.status not in ("complete", "gaps"):
            print(f"{image.status}: {image.error}", file=sys.stderr)
            return report
    by_image = {image.image: Path(image.output) for image in report.images}
    slide_folder, volume_folder = by_image[str(slide_path)], by_image[str(volume_path)]
    print(f"\nAUROC of raw signed maps over evaluated pixels (models and data of seed {seed})")
    sheets = [
        _tell(slide_path, truth_path, slide_folder, planted_lesion_scores, slide_trust, SLIDE_OUTLINES),
        _tell(volume_path, rim_path, volume_folder, rim_lesion_scores, volume_trust, VOLUME_OUTLINES),
    ]
    print("\nTo look at:")
    for sheet in sheets:
        print(f"  {sheet}")
    for image in report.images:
        print(f"  {Path(image.output) / 'overview.png'}")
        print(f"  {Path(image.output) / 'heatmap.ome.zarr'}")
    return report


def _taken(trust: tuple[Trust, ...]) -> tuple[str, ...]:
    return tuple(row.method for row in trust if not row.reason)


def _measure(
    card: Path, image: Path, truth: Path, values: tuple[int, ...], names: tuple[str, ...], seed: int
) -> tuple[tuple[Trust, ...], list[str]]:
    lines: list[str] = []
    rows = timed(
        f"measured {len(names)} methods on {image.name}",
        lambda: survey(str(card), str(image), str(truth), values, names, TILES_EACH, seed),
        lines,
    )
    return rows, lines


def _write_region(path: Path, box: Box) -> None:
    """A box of a slide as GeoJSON, whose points are (x, y)."""
    (top, left), (bottom, right) = box.start, box.stop
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}), encoding="utf-8")


def _tell(
    image: Path, truth: Path, folder: Path, scores: Callable[[Path, Path, Path], Scores],
    trust: tuple[Trust, ...], outlines: tuple[Outline, ...],
) -> Path:  # fmt: skip
    """Print the table of one image's maps and draw their contact sheet; its path."""
    found = scores(image, truth, folder)
    print_table(demo_table(image.name, found, trust))
    document = demo_document(found, trust)
    (folder / "methods.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    _print_verdict(found)
    refused = [f"{row.method}: not applicable to this network: {row.reason}" for row in trust if row.reason]
    print("\n".join(refused), flush=True)
    rows = {row.method: row for row in trust}
    captions = {
        label: f"AUROC {' / '.join(f'{v:.2f}' for v in found[label].values())}, class {class_words(rows[label.rpartition(':')[0]])}"
        for label in found if ":" in label
    }  # fmt: skip
    notes = [
        f"AUROC: {' / '.join(next(iter(found.values())))}. Class: rank correlation of the maps for the two classes; 1 means that "
        "the map does not know which class is asked for. Dimmed: left out by choice.",
        *refused,
    ]
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    return write_contact_sheet(
        folder / "methods.png",
        open_image(str(image)),
        open_image(str(truth)),
        heatmap,
        outlines,
        captions,
        notes,
    )


def _make_slide(path: Path, truth: Path, model: Path, seed: int) -> tuple[Path, list[str]]:
    """Card of a 2-D network trained on other slides, and what was done in how long."""
    lines: list[str] = []
    timed("wrote a slide with planted lesions", lambda: write_slide(path, truth, seed=seed), lines)
    card = timed("trained a 2-D network", lambda: train_slide_model(model, seed=seed), lines)
    return card, lines


def _make_volume(path: Path, truth: Path, model: Path, seed: int) -> tuple[Path, list[str]]:
    """Card of a 3-D network trained on other volumes, and what was done in how long."""
    lines: list[str] = []
    timed("wrote a volume with rim lesions", lambda: write_phantom(path, truth, seed=seed), lines)
    card = timed("trained a 3-D network", lambda: train_volume_model(model, seed=seed), lines)
    return card, lines


def side_by_side(*calls: tuple[Callable[..., tuple[T, list[str]]], tuple[Any, ...]]) -> list[T]:
    """Run the calls in a process each, one thread a process: small networks gain little from a second one."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(len(calls), mp_context=multiprocessing.get_context("spawn")) as processes:
            running = [processes.submit(call, *args) for call, args in calls]
            results = []
            for future in running:
                result, lines = future.result()
                results.append(result)
                print("\n".join(f"  {line}" for line in lines), flush=True)
            return results
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def explain_all(asked: list[ExplainRequest], pool: PoolSettings, direct: bool) -> RunReport:
    """Explain all requests over one pool; the report holds their images, in order."""
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


def _print_verdict(table: Scores) -> None:
    """Whether the first method reached what is expected of Grad-CAM."""
    first, scores = next(iter(table.items()))
    for column, value in scores.items():
        verdict = "reached" if value >= TARGETS[column] else "MISSED"
        print(f"{first}: {column} {value:.3f}, expected at least {TARGETS[column]:.2f}: {verdict}")


def timed(what: str, do: Callable[[], T], lines: list[str]) -> T:
    """What `do` gives; a line says how long it took."""
    began = time.perf_counter()
    result = do()
    lines.append(f"{what} in {time.perf_counter() - began:.1f} s")
    return result
