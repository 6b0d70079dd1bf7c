"""Slides for a classifier of whole slides: what is planted decides the label, and some of it speaks against.

Each slide holds *lesions* and *look-alikes* (the distractors of `workers.synthetic.tissue`), equal in size, density and stain,
told apart by the direction of their nuclei; and *mixed* foci as dense as both, whose nuclei point everywhere. The label is
the kind, lesion or look-alike, that covers more: lesions are evidence for the class `lesion`, look-alikes evidence against
it on the very same slide, mixed foci stand out and say nothing. The number of foci, their radii and the number of mixed
ones are drawn alike for both labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workers.synthetic.slides import write_slide
from workers.synthetic.tissue import DIRECTIONS_DEG, DISTRACTOR, LESION, MIXED, Planted

CLASSES = ("look-alike", "lesion")
"""Labels, in the order of the logits."""
KINDS = (DISTRACTOR, LESION)
"""What each class is of."""
SLIDE_PX = 2048
MORE, MIXED_FOCI = (2, 4), (2, 3)
"""Least and most foci of the kind that wins, and of mixed ones; of the kind that loses from one to one fewer than wins."""
RADIUS_PX = (50.0, 110.0)
MARGIN = 1.3
"""Least ratio of the areas of the two kinds."""


@dataclass(frozen=True)
class CohortSlide:
    """One slide of the cohort; each is a patient's of its own."""

    name: str
    label: int
    planted: tuple[Planted, ...]

    def write(self, folder: Path, seed: int, size: int = SLIDE_PX) -> tuple[Path, Path]:
        """Write `<name>.tiff` and `<name>.truth.tiff`; their paths."""
        slide, truth = slide_paths(folder, self.name)
        number = int(self.name.rpartition("-")[2])
        write_slide(slide, truth, size=size, seed=(seed, 3, number), planted=self.planted)
        return slide, truth


def slide_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a slide of the cohort and its truth lie."""
    return folder / f"{name}.tiff", folder / f"{name}.truth.tiff"


def cohort(count: int, seed: int) -> tuple[CohortSlide, ...]:
    """`count` slides, classes in turn; equal seeds give equal cohorts, and the first slides of a longer one are those of a shorter."""
    return tuple(
        CohortSlide(f"slide-{i:02d}", i % 2, _foci(i % 2, np.random.default_rng((seed, 4, i))))
        for i in range(count)
    )


def _foci(label: int, rng: np.random.Generator) -> tuple[Planted, ...]:
    while True:
        more = int(rng.integers(MORE[0], MORE[1] + 1))
        fewer = int(rng.integers(1, more))
        mixed = int(rng.integers(MIXED_FOCI[0], MIXED_FOCI[1] + 1))
        radii = rng.uniform(*RADIUS_PX, more + fewer + mixed)
        if np.square(radii[:more]).sum() >= MARGIN * np.square(radii[more : more + fewer]).sum():
            break
    kinds = [KINDS[label]] * more + [KINDS[1 - label]] * fewer + [MIXED] * mixed
    foci = [Planted(k, float(r), DIRECTIONS_DEG[k]) for k, r in zip(kinds, radii, strict=True)]
    return tuple(sorted(foci, key=lambda focus: -focus.radius_px))


def write_cohort(
    folder: Path,
    slides: Sequence[CohortSlide],
    seed: int,
    *,
    size: int = SLIDE_PX,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write slides and truths into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for done, slide in enumerate(slides):
        slide.write(folder, seed, size)
        if progress is not None:
            progress(done + 1, len(slides))


def write_cases(path: Path, slides: Sequence[CohortSlide], folder: Path, trained: int) -> None:
    """The CSV that training reads: the first `trained` slides to learn from, the others held out.

    Parameters
    ----------
    folder
        Where the slides are, relative to the CSV's own folder.
    """
    lines = ["image,label,patient,split"]
    for i, slide in enumerate(slides):
        image, _ = slide_paths(folder, slide.name)
        lines.append(f"{image},{CLASSES[slide.label]},{slide.name},{'train' if i < trained else 'test'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
