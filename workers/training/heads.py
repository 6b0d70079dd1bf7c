"""Train a bag head, judge it on patients it has not seen, and write it down as a model card."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from schemas.errors import SpecError
from schemas.frozen import digest
from schemas.model import BagSpec, ModelCard, OutputSpec
from schemas.training import FitSpec, HeadSpec
from workers.metrics.classification import Estimate, evaluate_classifier
from workers.models.card import LoadedCard, write_card
from workers.models.heads.head import BagHead
from workers.models.heads.registry import HEADS, build_head
from workers.training.bags import Bags, Fold, held_out, make_folds
from workers.training.mhim import Mhim, tile_scores
from workers.training.mil import History, Plain, fit, predict

DROPOUT = 0.25
"""Of the projected features while training, unless `args` says otherwise; as in the MHIM-MIL baselines."""
WEIGHTS = "head.safetensors"

Tell = Callable[[str, int, int, History], None]
"""Called with (name of the fit, epochs done, epochs at most, history) after each epoch."""


@dataclass(frozen=True)
class Trained:
    """A head, and how well heads like it do."""

    head: BagHead
    args: dict[str, Any]
    """What it was built with."""
    histories: dict[str, History]
    """By name of the fit, in order."""
    tested: tuple[int, ...]
    """Cases that the figures are of."""
    probability: NDArray[np.float64]
    """`(n, C)` of them, each from a head that saw no slide of the patient."""
    figures: dict[str, Estimate]


def head_args(spec: HeadSpec) -> dict[str, Any]:
    """What the head is built with, `DROPOUT` included where it has one.

    Raises
    ------
    SpecError
        No head of this name.
    """
    if spec.head not in HEADS:
        msg = f"--head {spec.head!r} is none of {', '.join(HEADS)}"
        raise SpecError(msg)
    takes = inspect.signature(HEADS[spec.head]).parameters
    return ({"dropout": DROPOUT} if "dropout" in takes else {}) | spec.args


def check_head(spec: HeadSpec, classes: int) -> bool:
    """Whether the head reads its tiles in an order.

    Raises
    ------
    SpecError, ModelError
        No head of this name, arguments that it does not take, or MHIM with a head that it cannot train.
    """
    head = build_head(spec.head, 8, classes, head_args(spec))
    if spec.mhim is not None:
        tile_scores(head, torch.zeros(1, head.features), spec.mhim.edition)
    return head.ordered


def fit_head(
    bags: Bags,
    fold: Fold,
    head: HeadSpec,
    spec: FitSpec,
    classes: int,
    *,
    name: str = "head",
    device: torch.device | None = None,
    folder: Path | None = None,
    tell: Tell | None = None,
) -> tuple[BagHead, dict[str, History]]:
    """Train one head on one fold; with `head.mhim` a plain one first, which becomes the teacher.

    Parameters
    ----------
    bags
        Checked: their width is the head's.
    folder
        Where a checkpoint `<name>.pt` is kept after each epoch; a training cut short goes on from there.

    Returns
    -------
    The head in evaluation mode on the CPU, and the histories of the fits by name.
    """

    def new(seed: int) -> BagHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_head(head.head, bags.width, classes, head_args(head))

    def run(learner: Plain | Mhim, name: str) -> History:
        return fit(
            learner,
            bags,
            fold,
            spec,
            classes,
            device=device,
            checkpoint=None if folder is None else folder / f"{name}.pt",
            identity=digest([head.model_dump(mode="json"), bags.digest]),
            progress=None if tell is None else lambda done, total, history: tell(name, done, total, history),
        )

    check_head(head, classes)
    plain = new(spec.seed)
    if head.mhim is None:
        history = run(Plain(plain), name)
        return plain.cpu(), {name: history}
    histories = {f"{name} teacher": run(Plain(plain), f"{name} teacher")}
    student = new(spec.seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed + 2)
        learner = Mhim(plain.cpu(), student, head.mhim)
    histories[name] = run(learner, name)
    return student.cpu(), histories


def train_head(
    bags: Bags,
    head: HeadSpec,
    spec: FitSpec,
    classes: int,
    folds: int,
    *,
    device: torch.device | None = None,
    folder: Path | None = None,
    tell: Tell | None = None,
) -> Trained:
    """Cross-validate, then fit the head that is kept.

    With one fold (a given split, or `folds` 1) the head that was tested is the one kept. Else a last one is fitted on all
    patients, but for those it stops by, and the figures are those of the heads of the folds.

    Parameters
    ----------
    bags
        Checked.
    device
        None: a CUDA device where there is one.
    folder, tell
        See `fit_head`.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = make_folds(bags.cases, folds, spec.seed)
    histories: dict[str, History] = {}
    tested: list[int] = []
    logits = []
    for k, fold in enumerate(parts):
        name = "head" if len(parts) == 1 else f"fold {k + 1}"
        found, told = fit_head(
            bags, fold, head, spec, classes, name=name, device=device, folder=folder, tell=tell
        )
        histories |= told
        tested += fold.test
        logits.append(predict(found, bags, fold.test))
    if len(parts) > 1:
        fold = held_out(bags.cases, range(len(bags)), (), spec.seed)
        found, told = fit_head(bags, fold, head, spec, classes, device=device, folder=folder, tell=tell)
        histories |= told
    probability = torch.softmax(torch.cat(logits).double(), 1).numpy()
    patients = np.array([bags.cases[i].patient for i in tested])
    figures = evaluate_classifier(probability, bags.labels[tested], patients, seed=spec.seed)
    return Trained(found, head_args(head), histories, tuple(tested), probability, figures)


def write_head(
    folder: Path, trained: Trained, head: HeadSpec, encoder: LoadedCard, classes: Sequence[str], encoder_digest: str
) -> Path:  # fmt: skip
    """Write the weights and a `model.toml` of encoder and head; the encoder's own files stay where they are.

    Parameters
    ----------
    folder
        Exists.
    encoder
        The card the features come from; a head it has already is replaced.
    encoder_digest
        Of the encoder, where the features say whose they are; else empty.

    Returns
    -------
    The card's path.
    """
    weights = folder / WEIGHTS
    part = weights.with_name(weights.name + ".part")
    save_file({k: v.contiguous() for k, v in trained.head.state_dict().items()}, part)
    os.replace(part, weights)
    card = encoder.card
    moved = {
        key: os.path.relpath(encoder.folder / value, folder)
        for key in ("weights", "trunk", "tail", "config")
        if (value := getattr(card.network, key))
    }
    bag = BagSpec(
        head=head.head,
        weights=WEIGHTS,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        features=trained.head.features,
        args=trained.args,
        order="row_col" if trained.head.ordered else "any",
        encoder_digest=encoder_digest,
    )
    values = card.model_dump(by_alias=True) | {
        "name": f"{card.name}-{head.head}",
        "network": card.network.model_copy(update=moved).model_dump(),
        "output": OutputSpec(kind="logits", classes=tuple(classes), default_target="predicted").model_dump(),
        "bag": bag.model_dump(),
    }
    path = folder / "model.toml"
    write_card(path, ModelCard.model_validate(values))
    return path
