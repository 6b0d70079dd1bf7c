"""The demo of bags: slides whose label is known to hang on what was planted, two heads trained, their decisions explained."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.demo import explain_all, side_by_side, timed
from flows.embedding import embed_batch
from flows.progress import Event
from flows.tables import Scores, print_table
from flows.train import run_training
from schemas.bag import InsideSpec
from schemas.errors import SourceError
from schemas.run import ExplainRequest, ImageReport, PoolSettings, RunReport
from schemas.training import MHIM, FitSpec, HeadSpec, TrainReport, TrainRequest
from workers.cam.bag_methods import BAG_METHODS
from workers.cam.methods import method
from workers.evaluator import planted_lesion_scores, tile_evidence_scores
from workers.export.contact import Outline, write_contact_sheet
from workers.export.overview import write_overview
from workers.metrics.planted import AGAINST, DISTRACTOR, FOR, LESION, MIXED, NOT_MIXED, evidence_scores
from workers.readers import open_image
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.synthetic.cohort import CLASSES, CohortSlide, cohort, slide_paths, write_cases, write_cohort
from workers.synthetic.models import train_tile_encoder

SLIDES, TRAINED = 40, 24
"""Slides in all, and those of them that are learned from."""
HEADS = {
    "abmil": HeadSpec(head="abmil", args={"hidden": 32, "size": 16}),
    "mhim": HeadSpec(head="abmil", args={"hidden": 32, "size": 16}, mhim=MHIM["v1"]),
}
TITLES = {"abmil": "ABMIL", "mhim": "MHIM-ABMIL"}
WAYS = {
    "constant": "with the attention held constant",
    "through": "through the attention: a tile of less evidence than the bag's mean counts against",
}
FIT = FitSpec(learning_rate=3e-3)
HELD, THROUGH = InsideSpec(attention="constant"), InsideSpec()
RUNS: dict[str, tuple[str, InsideSpec]] = {
    "abmil": ("abmil", HELD), "mhim": ("mhim", HELD), "abmil-through": ("abmil", THROUGH)
}  # fmt: skip
"""What is explained: by which head, and whether through its attention. Through it, a tile that speaks for the class less than
the bag's mean does counts against it: the gradient of a weighted mean. The same head is explained both ways, to show it."""
INSIDE = ("hirescam", "layercam")
CHAINED = "hirescam"
"""What is held against the expectation: in units of the slide's logit."""
TARGET = "lesion"
EXPECTED = 0.85
"""AUROC of lesion pixels by the chained map, on each slide; it must be above that of every map of tiles, too."""
OUTLINES = (
    Outline("lesion: for", (LESION,), "solid"),
    Outline("look-alike: against", (DISTRACTOR,), "dotted"),
    Outline("mixed: says nothing", (MIXED,), "dashed"),
)
DRAWN = ("attention", "contribution", CHAINED)
"""On the overview, which has no room for all."""


def run_mil_demo(
    out: Path, methods: tuple[str, ...], pool: PoolSettings, seed: int, direct: bool
) -> RunReport:
    """Run the demo of bags into `out`; the report of what was explained in the end."""
    slides = cohort(SLIDES, seed)
    inputs, models = out / "inputs", out / "models"
    inputs.mkdir(parents=True, exist_ok=True)
    print(
        f"making {SLIDES} slides, and an encoder of tiles from others: it learns eight directions of nuclei, no slide's label ...",
        flush=True,
    )
    card, *_ = side_by_side(
        (_make_encoder, (models / "encoder", seed)),
        (_make_slides, (inputs, slides[::2], seed)),
        (_make_slides, (inputs, slides[1::2], seed)),
    )
    assert card is not None
    paths = [slide_paths(inputs, slide.name)[0] for slide in slides]
    print("embedding their tiles ...", flush=True)
    side_by_side(*((embed, (card, paths[part::2], out / "features")) for part in (0, 1)))
    csv = out / "slides.csv"
    write_cases(csv, slides, Path(inputs.name), TRAINED)
    print(
        f"training two heads on {TRAINED} slides and their labels, {SLIDES - TRAINED} held out ...",
        flush=True,
    )
    heads = side_by_side(
        *((train_one, (csv, card, out / "features", models / name, name, seed)) for name in HEADS)
    )
    trained = dict(zip(HEADS, heads, strict=True))
    print_table(heads_table(trained))
    shown = slides[TRAINED : TRAINED + 2]
    asked = [
        request_of(
            [slide_paths(inputs, s.name)[0] for s in shown],
            trained[head].card,
            out / "run" / name,
            methods,
            inside,
        )
        for name, (head, inside) in RUNS.items()
    ]
    lines: list[str] = []
    report = timed(
        "explained two held-out slides, by each head and by one a second way",
        lambda: explain_all(asked, pool, direct),
        lines,
    )
    print("\n".join(lines), flush=True)
    if report.exit_code:
        return report
    print(f"\nAUROC of raw signed maps for {TARGET!r}, on {' / '.join(s.name for s in shown)} (seed {seed})")
    document: dict[str, Any] = {}
    pictures = []
    for k, (name, (head, inside)) in enumerate(RUNS.items()):
        title = f"{TITLES[head]}, inside the tiles {WAYS[inside.attention]}"
        found = [
            measured(image, *slide_paths(inputs, slide.name))
            for image, slide in zip(report.images[2 * k : 2 * k + 2], shown, strict=True)
        ]
        print_table(maps_table(title, found))
        document[name] = {"slides": trained[head].figures["auroc"].model_dump()} | {
            one.slide.stem: {"tiles": one.tiles, "pixels": one.pixels} for one in found
        }
        print("\n".join(verdict(one) for one in found), flush=True)
        pictures += [path for one in found for path in draw(one, title)]
    (out / "mil.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    print("\nTo look at:")
    for path in [*(models / name / "learning.png" for name in HEADS), *pictures, out / "mil.json"]:
        print(f"  {path}")
    return report


@dataclass(frozen=True)
class Measured:
    """One slide that was explained, and how well each map found what was planted."""

    image: ImageReport
    slide: Path
    truth: Path
    tiles: Scores
    """By label, a value a tile."""
    pixels: Scores

    @property
    def folder(self) -> Path:
        return Path(self.image.output)


def measured(image: ImageReport, slide: Path, truth: Path) -> Measured:
    """Hold every map of a slide against the truth."""
    folder = Path(image.output)
    pixels = planted_lesion_scores(slide, truth, folder, evidence_scores)
    return Measured(image, slide, truth, tile_evidence_scores(truth, folder), pixels)


def request_of(
    images: list[Path], card: str, out: Path, methods: tuple[str, ...], inside: InsideSpec
) -> ExplainRequest:
    """Every bag method, and maps inside every tile."""
    return ExplainRequest(
        images=tuple(map(str, images)),
        model=card,
        out=str(out),
        bag_methods=tuple(BAG_METHODS),
        methods=tuple(dict.fromkeys([CHAINED, *(method(m).info.name for m in methods or INSIDE)])),
        targets=(TARGET,),
        inside=inside,
    )


def train_one(
    csv: Path, card: Path, features: Path, out: Path, name: str, seed: int, fit: FitSpec = FIT
) -> tuple[TrainReport, list[str]]:
    """One of `HEADS`, by the trainer that users have."""
    request = TrainRequest(
        csv=str(csv),
        model=str(card),
        out=str(out),
        features=str(features),
        classes=CLASSES,
        head=HEADS[name],
        fit=fit.model_copy(update={"seed": seed}),
        folds=1,
    )
    lines: list[str] = []
    report = timed(f"trained {TITLES[name]}", lambda: run_training(request, _silent), lines)
    return report, lines


def heads_table(trained: dict[str, TrainReport]) -> Table:
    """How well the heads tell held-out slides apart."""
    table = Table(title="held-out slides", title_justify="left", box=None)
    for column in ("head", "slides", "AUROC", "95 % interval", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for name, report in trained.items():
        cells = []
        for figure in (report.figures["auroc"], report.figures["accuracy"]):
            value, low, high = (math.nan if v is None else v for v in (figure.value, figure.low, figure.high))
            cells += [f"{value:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(TITLES[name], str(len(report.tested)), *cells)
    return table


def maps_table(title: str, found: list[Measured]) -> Table:
    """AUROC by map and question, tile by tile and pixel by pixel; a number a slide."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("map")
    for question in (FOR, AGAINST, NOT_MIXED):
        for what in ("tiles", "pixels"):
            table.add_column(f"{question}: {what}", justify="right", max_width=16)
    for label in found[0].pixels:
        name, channel, _ = label.partition(":")
        cells = [
            " / ".join(f"{scores[label][question]:.3f}" for scores in level if label in scores) or "-"
            for question in (FOR, AGAINST, NOT_MIXED)
            for level in ([one.tiles for one in found], [one.pixels for one in found])
        ]
        inside = bool(channel) and name not in BAG_METHODS
        table.add_row(f"{name}, inside the tiles" if inside else name, *cells)
    return table


def verdict(one: Measured) -> str:
    """Whether the chained map reached what is expected of it on a slide."""
    chained = one.pixels[f"{CHAINED}:{TARGET}"][FOR]
    painted = {n: one.pixels[f"{n}:{TARGET}"][FOR] for n in BAG_METHODS if f"{n}:{TARGET}" in one.pixels}
    best = max(painted, key=painted.__getitem__)
    reached = "reached" if chained >= EXPECTED and chained > painted[best] else "MISSED"
    return (
        f"{one.slide.stem}: lesion pixels by the chained map {chained:.3f}, expected at least {EXPECTED:.2f} and above the best map "
        f"of tiles ({best} {painted[best]:.3f}): {reached}"
    )


def draw(one: Measured, title: str) -> list[Path]:
    """The overview with the maps that tell most, and a contact sheet of all."""
    heatmap = HeatmapStore.open(one.folder / "heatmap.ome.zarr")
    names = [channel.method for channel in heatmap.info.channels]
    reader, truth = open_image(str(one.slide)), open_image(str(one.truth))
    try:
        overview = write_overview(
            one.folder / "overview.png",
            reader,
            heatmap,
            TilesStore.open(one.folder / "tiles.zarr").info,
            [names.index(name) for name in DRAWN],
        )
        captions = {
            label: "pixels: "
            + ", ".join(
                f"{s[q]:.2f} {w}" for q, w in ((FOR, "for"), (AGAINST, "against"), (NOT_MIXED, "for/mixed"))
            )
            for label, s in one.pixels.items()
        }
        assert one.image.bag is not None
        notes = [
            f"{title}. {one.image.bag.line}.",
            "AUROC of pixels: lesions higher than all other tissue (for), look-alikes lower than all other tissue (against), lesions "
            "higher than mixed foci. Attention and probabilities have no sign: they cannot say against.",
        ]
        sheet = write_contact_sheet(
            one.folder / "methods.png", reader, truth, heatmap, OUTLINES, captions, notes
        )
    finally:
        reader.close()
        truth.close()
    return [overview, sheet]


def _make_encoder(folder: Path, seed: int) -> tuple[Path | None, list[str]]:
    lines: list[str] = []
    return timed("trained an encoder of tiles", lambda: train_tile_encoder(folder, seed), lines), lines


def _make_slides(folder: Path, slides: tuple[CohortSlide, ...], seed: int) -> tuple[Path | None, list[str]]:
    lines: list[str] = []
    timed(f"wrote {len(slides)} slides", lambda: write_cohort(folder, slides, seed), lines)
    return None, lines


def embed(card: Path, images: list[Path], out: Path) -> tuple[None, list[str]]:
    """Embed the tiles of slides, as `gigacam embed` does.

    Raises
    ------
    SourceError
        A slide has a tile without features.
    """
    request = ExplainRequest(images=tuple(map(str, images)), model=str(card), out=str(out))
    lines: list[str] = []
    report = timed(
        f"embedded {len(images)} slides",
        lambda: embed_batch(request, PoolSettings(kind="serial", threads=1), _silent),
        lines,
    )
    for image in report.images:
        if image.status != "complete":
            raise SourceError(image.error or f"{image.image}: {image.status}")
    return None, lines


def _silent(event: Event) -> None:
    """Two processes at once have one terminal."""
