"""One training, from the request to the model card: features found, bags checked, heads fitted and judged."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.errors import ModelError, SourceError, SpecError, StoreError
from schemas.frozen import digest
from schemas.image import stem_of
from schemas.model import BagSpec, OutputSpec
from schemas.run import TilesInfo
from schemas.training import Figure, TrainReport, TrainRequest
from workers.metrics.classification import Estimate
from workers.models.card import LoadedCard, load_card, resolved
from workers.readers.features import ENCODER, STORE, TILE, feature_places, read_features
from workers.store.bags import Bag
from workers.store.folders import move_aside
from workers.store.tiles import TilesStore, differing_fields
from workers.training.bags import Bags, Case, make_folds, read_cases
from workers.training.heads import Tell, Trained, check_head, train_head, write_head

REPORT, CHECKPOINTS = "train.json", ".gigacam-fits"
NOTES = 20
"""Slides with tiles that have no features, named one by one in the report."""
SIZE_TOLERANCE = 0.01
_BEGUN, _FRESH = "begun", "fresh"
"""File beside the checkpoints that says whose they are: the identity, and whether `fresh` began them."""

Features = tuple[NDArray[Any], NDArray[Any] | None]
"""`(N, D)` features, and `(N, axes)` level-0 corners of their tiles where they are known."""


class FeatureSource:
    """Finds and reads the features of cases, and learns whose they are."""

    def __init__(self, folder: str, encoder: LoadedCard, ordered: bool) -> None:
        """`folder`: where features lie that the CSV does not name; `ordered`: sort tiles by row, then column."""
        self._folder = Path(folder) if folder else None
        self._card = resolved(encoder.card)
        self._encoder = encoder
        self._ordered = ordered
        self.digests: set[str] = set()
        """Of the encoders; empty text where a file does not say."""
        self.precisions: set[str] = set()
        """That the features were computed with, where a store says it."""
        self.gaps: dict[str, str] = {}
        """Image -> how many of its tiles have no features, where some failed."""

    def path(self, case: Case) -> Path:
        """Where a case's features are, a file or a `tiles.zarr`; SourceError where nowhere."""
        if case.features:
            given = Path(case.features)
            return given / STORE if (given / STORE).exists() else given
        stem = stem_of(Path(case.image.partition("?")[0]).name)
        found = feature_places(self._folder, stem) if self._folder is not None else []
        if len(found) != 1:
            where = (
                f"{stem}.h5, {stem}.npy or {stem}-<8 hex>/{STORE} in {self._folder}"
                if self._folder
                else "none"
            )
            msg = f"{case.image}: {len(found)} places of its features found; expected one: {where}, or a column features in the CSV"
            raise SourceError(msg)
        return found[0]

    def check_apart(self, cases: Sequence[Case]) -> None:
        """SourceError where two cases have the same features: one bag could be on both sides of a fold."""
        images: dict[Path, list[str]] = {}
        for case in cases:
            images.setdefault(self.path(case).resolve(), []).append(case.image)
        for path, names in images.items():
            if len(names) > 1:
                msg = (
                    f"{path}: found as the features of {len(names)} slides: {', '.join(names)}; expected one: list a slide once, "
                    "and name the features of each in a column features of the CSV"
                )
                raise SourceError(msg)

    def __call__(self, case: Case) -> NDArray[Any]:
        """`(N, D)` features of a case."""
        path = self.path(case)
        features, corner = self._stored(path, case) if path.is_dir() else self._filed(path)
        if not self._ordered:
            return features
        if corner is None:
            msg = f"{path}: does not say where the tiles are, and the head reads them by row and column; positions are never invented"
            raise SourceError(msg)
        return features[np.lexsort(corner.T[::-1])]

    def _stored(self, path: Path, case: Case) -> Features:
        store = TilesStore.open(path)
        info = store.info
        if not info.features:
            msg = f"{path}: has no features: it is of an image whose tiles were explained, not embedded; give what gigacam embed made"
            raise SourceError(msg)
        self._check_made(path, info)
        bag = Bag(path, info)
        rows = bag.rows()
        if missing := info.planned - len(rows):
            self.gaps[case.image] = (
                f"{missing} of {info.planned} tiles of {case.image} have no features and are not in its bag"
            )
        self.digests.add(info.spec.card.get("state_sha256", ""))
        self.precisions.add(info.spec.cam.precision)
        return bag.features(rows), store.boxes(rows)[:, 0]

    def _filed(self, path: Path) -> Features:
        found = read_features(path)
        self._check_size(path, found.attributes)
        self.digests.add(str(found.attributes.get(ENCODER, "")))
        return found.features, found.corner_l0

    def _check_made(self, path: Path, info: TilesInfo) -> None:
        """The head is written down with the encoder's card: network and input must be those of the features."""
        made, asked = info.spec.card, self._card
        if made["network"] != asked["network"]:
            msg = (
                f"{path}: its features are of another network than {self._encoder.path}; give the card they were made "
                "with, or make them anew"
            )
            raise ModelError(msg)
        fields = differing_fields(
            {"input": made["input"], "tile": list(info.spec.grid.tile_px)},
            {"input": asked["input"], "tile": asked["input"]["tile"]},
        )
        if fields:
            msg = (
                f"{path}: its features were made otherwise than {self._encoder.path} says: {'; '.join(fields)}; give "
                "the card they were made with, or make them anew with this one and without --tile"
            )
            raise ModelError(msg)

    def _check_size(self, path: Path, said: dict[str, Any]) -> None:
        """What a file of ours says of its tiles' width must be what the card says; others say less, or in other words."""
        asked = self._encoder.card.input
        if TILE not in said or "mpp" not in said or asked.mpp is None:
            return
        mpp = float(said["mpp"])
        width = mpp * math.sqrt(math.prod(map(float, said[TILE])))
        expected = asked.mpp * math.sqrt(math.prod(asked.tile))
        if abs(width - expected) > max(mpp, SIZE_TOLERANCE * expected):
            msg = (
                f"{path}: its tiles are {width:.4g} um wide, those of {self._encoder.path} are {expected:.4g} um; give the card "
                "with the tile and mpp that they were made with, or make them anew"
            )
            raise ModelError(msg)


def train(
    request: TrainRequest,
    *,
    fresh: bool = False,
    reading: Callable[[int, int], None] | None = None,
    tell: Tell | None = None,
) -> tuple[TrainReport, Trained | None]:
    """Train, and write card, weights and report into `request.out`.

    Returns
    -------
    The report, and what it is of; None where the same training was already done there.

    Raises
    ------
    SpecError, SourceError, ModelError
        What is wrong with the request, a slide's features or the encoder's card; before any training.
    StoreError
        The folder holds another training, and `fresh` is not set.
    """
    began = time.perf_counter()
    encoder = load_card(request.model)
    cases, classes = read_cases(request.csv, request.classes)
    _check_classes(request.csv, classes)
    make_folds(cases, request.folds, request.fit.seed)
    source = FeatureSource(request.features, encoder, check_head(request.head, len(classes)))
    source.check_apart(cases)
    bags = Bags(cases, source)
    bags.check(reading)
    if len(source.digests) > 1:
        msg = f"{request.csv}: the features are of {len(source.digests)} encoders, or of some it is not known; one head reads one"
        raise SourceError(msg)
    if len(source.precisions) > 1:
        found = ", ".join(sorted(source.precisions))
        msg = f"{request.csv}: the features were computed with {found}; expected one precision: embed the slides of the others anew"
        raise SourceError(msg)
    out = Path(request.out)
    asked = request.model_dump(mode="json", exclude={"csv", "model", "out", "features"})
    identity = digest([asked, resolved(encoder.card), bags.digest, classes])
    done = earlier(out)
    if done is not None and not fresh:
        if done.identity == identity:
            return done, None
        msg = f"{out}: holds another training ({done.request.csv}, {done.request.head.head}); choose another folder, or --fresh"
        raise StoreError(msg)
    checkpoints = _checkpoints(out, identity, fresh)
    trained = train_head(
        bags, request.head, request.fit, len(classes), request.folds, folder=checkpoints, tell=tell
    )
    card = write_head(out, trained, request.head, encoder, classes, source.digests.pop())
    bag = load_card(card).card.bag
    assert isinstance(bag, BagSpec)
    report = TrainReport(
        request=request,
        identity=identity,
        classes=classes,
        slides=len(cases),
        patients=len({case.patient for case in cases}),
        tiles=bags.tiles,
        features=bags.width,
        tested=tuple(cases[i].image for i in trained.tested),
        figures={name: _figure(estimate) for name, estimate in trained.figures.items()},
        epochs={name: history.best + 1 for name, history in trained.histories.items()},
        card=str(card),
        sha256=bag.sha256,
        seconds=time.perf_counter() - began,
        notes=_notes(list(source.gaps.values())),
    )
    part = out / f"{REPORT}.part"
    part.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    part.replace(out / REPORT)
    shutil.rmtree(checkpoints)
    return report, trained


def earlier(out: Path) -> TrainReport | None:
    """The report of a training that was finished in `out`."""
    path = out / REPORT
    return TrainReport.model_validate_json(path.read_bytes()) if path.exists() else None


def _check_classes(csv: str, classes: tuple[str, ...]) -> None:
    """The card that is written in the end must be able to name them."""
    try:
        OutputSpec(kind="logits", classes=classes)
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        msg = f"{csv}: its labels are to be the classes of a model card: {said}; name them otherwise"
        raise SpecError(msg) from error


def _checkpoints(out: Path, identity: str, fresh: bool) -> Path:
    """Folder for the checkpoints of a training, with those that the same training left there when it was cut short.

    `fresh` moves the report of a finished training aside and deletes the checkpoints of every other one. Those that it
    began itself it goes on from: asked for again, a training that was cut short is resumed.

    Raises
    ------
    StoreError
        There are checkpoints of another training, and `fresh` is not set.
    """
    folder = out / CHECKPOINTS
    mark = folder / _BEGUN
    if (out / REPORT).exists():
        shutil.rmtree(folder, ignore_errors=True)
        move_aside(out / REPORT)
    begun = mark.read_text(encoding="utf-8").split() if mark.exists() else []
    if identity in begun and (_FRESH in begun or not fresh):
        return folder
    if not fresh and any(folder.glob("*.pt")):
        msg = f"{folder}: checkpoints of another training that was cut short; ask for the same again, choose another folder, or --fresh"
        raise StoreError(msg)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(f"{identity} {_FRESH if fresh else ''}", encoding="utf-8")
    return folder


def _notes(gaps: Sequence[str]) -> tuple[str, ...]:
    """A line a slide, up to a number of them."""
    more = len(gaps) - NOTES
    return (*gaps[:NOTES], *([f"{more} more slides have tiles without features"] if more > 0 else []))


def _figure(estimate: Estimate) -> Figure:
    value, low, high = (
        v if math.isfinite(v) else None for v in (estimate.value, estimate.low, estimate.high)
    )
    return Figure(value=value, low=low, high=high)
