"""Labelled bags: the CSV that lists them, patients kept apart, features read when needed."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import SourceError, SpecError
from schemas.frozen import canonical_json

COLUMNS = ("image", "label", "patient", "split", "features")
SPLITS = ("train", "val", "test")
HELD_OUT = 5
"""One patient in so many validates, or tests where there is one fold."""
CACHE_BYTES = 2 * 2**30
"""Features kept in memory between epochs; beyond it they are read again."""


@dataclass(frozen=True)
class Case:
    """One slide: what it is called, its class, whose it is."""

    image: str
    label: int
    patient: str
    split: str = ""
    """`train`, `val`, `test`, or empty where the split is not given."""
    features: str = ""
    """Where its features are, as the CSV says it, relative to the CSV; may be empty."""


@dataclass(frozen=True)
class Fold:
    """Indices of cases; no patient is in two of the three."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def read_cases(path: str | Path, classes: Sequence[str] = ()) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases of a CSV with the columns `image,label,patient[,split][,features]`, and the names of the classes.

    Parameters
    ----------
    path
        UTF-8 with a header line. Paths in it are relative to it.
    classes
        Order of the labels; none: numbers by value, else by name.

    Raises
    ------
    SpecError
        The file or a line is not as described, an image is listed twice, fewer than two classes, a label that is none of
        `classes`, a patient on both sides of the given split.
    """
    path = Path(path)
    lines = _lines(path)
    found = {line["label"] for _, line in lines}
    numbers = all(label.lstrip("-").isdigit() for label in found)
    names = tuple(classes) or tuple(sorted(found, key=int if numbers else None))
    if not found <= set(names) or len(names) < 2:
        msg = (
            f"{path}: labels {', '.join(sorted(found))}; expected at least two classes, of {', '.join(names)}"
        )
        raise SpecError(msg)
    cases = []
    for number, line in lines:
        split = {"validation": "val"}.get(line.get("split", ""), line.get("split", ""))
        if "split" in line and split not in SPLITS:
            msg = (
                f"{path}, line {number}: split is {split!r}; expected {', '.join(SPLITS)}, or no such column"
            )
            raise SpecError(msg)
        image, features = (_beside(path, line.get(key, "")) for key in ("image", "features"))
        cases.append(Case(image, names.index(line["label"]), line["patient"], split, features))
    _check(path, cases)
    return tuple(cases), names


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            rows.fieldnames = columns = [c.strip() for c in rows.fieldnames or ()]
            read = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: cannot be read as CSV ({error}); expected UTF-8 text with a header line"
        raise SpecError(msg) from error
    if not set(COLUMNS[:3]) <= set(columns) <= set(COLUMNS) or not read:
        msg = f"{path}: columns {', '.join(columns)}, {len(read)} rows; expected image, label, patient, and at most split, features"
        raise SpecError(msg)
    lines = []
    for number, row in read:
        if None in row or any(v is None for v in row.values()):
            msg = f"{path}, line {number}: expected {len(columns)} values ({', '.join(columns)})"
            raise SpecError(msg)
        line = {k: v.strip() for k, v in row.items()}
        if empty := [k for k in COLUMNS[:3] if not line[k]]:
            msg = f"{path}, line {number}: {', '.join(empty)} is empty"
            raise SpecError(msg)
        lines.append((number, line))
    return lines


def _beside(path: Path, name: str) -> str:
    return name if not name or "://" in name else str(path.parent / Path(name).expanduser())


def _check(path: Path, cases: Sequence[Case]) -> None:
    images = [case.image for case in cases]
    if twice := sorted({image for image in images if images.count(image) > 1}):
        msg = f"{path}: listed more than once: {', '.join(twice)}; one line a slide"
        raise SpecError(msg)
    sides: dict[str, set[str]] = {}
    for case in cases:
        sides.setdefault(case.patient, set()).add(case.split)
    if torn := sorted(patient for patient, splits in sides.items() if len(splits) > 1):
        msg = f"{path}: on more than one side of the split: patient {', '.join(torn)}; all slides of a patient belong on one"
        raise SpecError(msg)


def make_folds(cases: Sequence[Case], count: int, seed: int) -> tuple[Fold, ...]:
    """Folds in which no patient is in two parts; classes are spread evenly over them, by patient.

    The split of the CSV where it has one (a single fold; without `val` one patient in five of `train` is taken for it).
    Else `count` parts, each tested once; of the others one patient in five validates. `count` 1: the first of five.

    Raises
    ------
    SpecError
        Too few patients of a class, or a given split without `train` or `test`.
    """
    everyone = range(len(cases))
    if cases[0].split:
        by_side = {side: tuple(i for i in everyone if cases[i].split == side) for side in SPLITS}
        if not by_side["train"] or not by_side["test"]:
            msg = "the column split has no train or no test slides; both are needed"
            raise SpecError(msg)
        if by_side["val"]:
            return (Fold(by_side["train"], by_side["val"], by_side["test"]),)
        return (held_out(cases, by_side["train"], by_side["test"], seed),)
    parts = _dealt(cases, everyone, count if count > 1 else HELD_OUT, seed)
    if count > 1 and not all(parts):
        msg = f"the patients of a class do not fill {count} folds; ask for fewer"
        raise SpecError(msg)
    folds = []
    for test in parts[: count if count > 1 else 1]:
        rest = sorted(set(everyone) - set(test))
        folds.append(held_out(cases, rest, test, seed))
    return tuple(folds)


def held_out(cases: Sequence[Case], rest: Iterable[int], test: Iterable[int], seed: int) -> Fold:
    """`rest` parted into train and validation, one patient in five of each class for the latter."""
    parts = _dealt(cases, rest, HELD_OUT, seed + 1)
    train = sorted(i for part in parts[1:] for i in part)
    return Fold(tuple(train), tuple(sorted(parts[0])), tuple(sorted(test)))


def _dealt(cases: Sequence[Case], chosen: Iterable[int], count: int, seed: int) -> list[list[int]]:
    """Cases in `count` parts: the patients of each class shuffled, then dealt one by one, the first part first."""
    slides: dict[str, list[int]] = {}
    for i in chosen:
        slides.setdefault(cases[i].patient, []).append(i)
    by_class: dict[int, list[str]] = {}
    for patient in sorted(slides):
        labels = [cases[i].label for i in slides[patient]]
        by_class.setdefault(max(labels, key=lambda c: (labels.count(c), -c)), []).append(patient)
    parts: list[list[int]] = [[] for _ in range(count)]
    generator = np.random.default_rng(seed)
    turn = 0
    for label in sorted(by_class):
        patients = [by_class[label][k] for k in generator.permutation(len(by_class[label]))]
        if len(patients) < 2:
            msg = f"class {label} has {len(patients)} patient here; at least two are needed to train and to check"
            raise SpecError(msg)
        if len(patients) < count:  # every class is in the first part
            turn = 0
        for patient in patients:
            parts[turn % count] += slides[patient]
            turn += 1
    return parts


class Bags:
    """Features of the cases as tensors, read when asked for, kept in memory up to a limit."""

    def __init__(
        self, cases: Sequence[Case], read: Callable[[Case], NDArray[Any]], cache_bytes: int = CACHE_BYTES
    ) -> None:
        """`read` gives `(N, D)` features of a case."""
        self.cases = tuple(cases)
        self.labels = np.array([case.label for case in cases], np.int64)
        self._read = read
        self._left = cache_bytes
        self._kept: dict[int, Tensor] = {}
        self.width = 0
        """D, known once checked; `tiles` and `digest` too."""
        self.tiles = 0
        self.digest = ""

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Tensor:
        """`(N, D)` float32."""
        if index in self._kept:
            return self._kept[index]
        bag = torch.from_numpy(np.ascontiguousarray(self._read(self.cases[index]), np.float32))
        if bag.nbytes <= self._left:
            self._left -= bag.nbytes
            self._kept[index] = bag
        return bag

    def check(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every bag once: what cannot be trained on is said before any training, and what it is gets a digest.

        Raises
        ------
        SourceError
            An empty bag, features that are not `(tiles, numbers)` or not finite, or of another width than the first.
        """
        content = hashlib.sha256()
        for i, case in enumerate(self.cases):
            bag = self[i]
            if bag.ndim != 2 or not bag.shape[0] or not bag.shape[1]:
                msg = f"{case.image}: features of shape {tuple(bag.shape)}; expected (tiles, numbers a tile), at least one tile"
                raise SourceError(msg)
            self.width = self.width or bag.shape[1]
            if bag.shape[1] != self.width:
                msg = (
                    f"{case.image}: {bag.shape[1]} numbers a tile; {self.cases[0].image} has {self.width}. "
                    "One head reads the features of one encoder"
                )
                raise SourceError(msg)
            bad = int((~torch.isfinite(bag)).any(1).sum())
            if bad:
                msg = f"{case.image}: {bad} of {len(bag)} tiles have features that are not finite; leave them out of the bag"
                raise SourceError(msg)
            self.tiles += len(bag)
            content.update(canonical_json([vars(case), len(bag)]).encode())
            content.update(bag.numpy().tobytes())
            if progress is not None:
                progress(i + 1, len(self))
        self.digest = content.hexdigest()
