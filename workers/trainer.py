"""One training, from the request to the model card: features found, bags checked, heads fitted and judged."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ModelError, SourceError, StoreError
from schemas.frozen import digest
from schemas.image import stem_of
from schemas.model import BagSpec
from schemas.training import Figure, TrainReport, TrainRequest
from workers.metrics.classification import Estimate
from workers.models.card import LoadedCard, load_card, resolved
from workers.readers.features import ENCODER, SUFFIXES, read_features
from workers.store.bags import Bag
from workers.store.tiles import TilesStore
from workers.training.bags import Bags, Case, make_folds, read_cases
from workers.training.heads import Tell, Trained, check_head, train_head, write_head

REPORT, CHECKPOINTS = "train.json", ".gigacam-fits"
_STORE = "tiles.zarr"


class FeatureSource:
    """Finds and reads the features of cases, and learns whose they are."""

    def __init__(self, folder: str, encoder: LoadedCard, ordered: bool) -> None:
        """`folder`: where features lie that the CSV does not name; `ordered`: sort tiles by row, then column."""
        self._folder = Path(folder) if folder else None
        self._network = resolved(encoder.card)["network"]
        self._encoder = encoder
        self._ordered = ordered
        self.digests: set[str] = set()
        """Of the encoders; empty text where a file does not say."""

    def path(self, case: Case) -> Path:
        """Where a case's features are; SourceError where nowhere."""
        if case.features:
            return Path(case.features)
        stem = stem_of(Path(case.image.partition("?")[0]).name)
        found = []
        if self._folder is not None:
            found = [p for s in SUFFIXES if (p := self._folder / f"{stem}{s}").exists()]
            found += sorted(self._folder.glob(f"{stem}-*/{_STORE}"))
        if len(found) != 1:
            where = (
                f"{stem}.h5, {stem}.npy or {stem}-*/{_STORE} in {self._folder}" if self._folder else "none"
            )
            msg = f"{case.image}: {len(found)} places of its features found; expected one: {where}, or a column features in the CSV"
            raise SourceError(msg)
        return found[0]

    def __call__(self, case: Case) -> NDArray[Any]:
        """`(N, D)` features of a case."""
        path = self.path(case)
        if path.is_dir():
            store = TilesStore.open(path / _STORE if (path / _STORE).exists() else path)
            if store.info.spec.card["network"] != self._network:
                msg = (
                    f"{store.path}: its features are of another network than {self._encoder.path}; give the card they were made "
                    "with, or make them anew"
                )
                raise ModelError(msg)
            bag = Bag(store.path, store.info)
            rows = bag.rows()
            features: NDArray[Any] = bag.features(rows)
            corner: NDArray[Any] | None = store.boxes(rows)[:, 0]
            self.digests.add(store.info.spec.card.get("state_sha256", ""))
        else:
            found = read_features(path)
            features, corner = found.features, found.corner_l0
            self.digests.add(str(found.attributes.get(ENCODER, "")))
        if not self._ordered:
            return features
        if corner is None:
            msg = f"{path}: does not say where the tiles are, and the head reads them by row and column; positions are never invented"
            raise SourceError(msg)
        return features[np.lexsort(corner.T[::-1])]


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
    make_folds(cases, request.folds, request.fit.seed)
    source = FeatureSource(request.features, encoder, check_head(request.head, len(classes)))
    bags = Bags(cases, source)
    bags.check(reading)
    if len(source.digests) > 1:
        msg = f"{request.csv}: the features are of {len(source.digests)} encoders, or of some it is not known; one head reads one"
        raise SourceError(msg)
    out = Path(request.out)
    asked = request.model_dump(mode="json", exclude={"csv", "model", "out", "features"})
    identity = digest([asked, resolved(encoder.card), bags.digest, classes])
    done = earlier(out)
    if fresh:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    elif done is not None and done.identity == identity:
        return done, None
    elif done is not None:
        msg = f"{out}: holds another training ({done.request.csv}, {done.request.head.head}); choose another folder, or --fresh"
        raise StoreError(msg)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    trained = train_head(
        bags, request.head, request.fit, len(classes), request.folds, folder=out / CHECKPOINTS, tell=tell
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
    )
    part = out / f"{REPORT}.part"
    part.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    part.replace(out / REPORT)
    shutil.rmtree(out / CHECKPOINTS)
    return report, trained


def earlier(out: Path) -> TrainReport | None:
    """The report of a training that was finished in `out`."""
    path = out / REPORT
    return TrainReport.model_validate_json(path.read_bytes()) if path.exists() else None


def _figure(estimate: Estimate) -> Figure:
    value, low, high = (
        v if math.isfinite(v) else None for v in (estimate.value, estimate.low, estimate.high)
    )
    return Figure(value=value, low=low, high=high)
