"""Fit a bag head: Adam, cosine learning rate, early stopping, a checkpoint after every epoch that resumes bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import ModelError, StoreError
from schemas.frozen import digest
from schemas.training import FitSpec
from workers.training.bags import Bags, Fold
from workers.training.losses import LOSSES, needs_every_class

STEP_BAGS = 16
"""Bags a step of a loss that needs several."""


class Learner(Protocol):
    """What is fitted: a module that holds a head and whatever teaches it."""

    @property
    def head(self) -> nn.Module:
        """What is kept in the end: `(N, D)` -> `(C,)` logits."""
        ...

    def step(self, h: Tensor, done: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A training pass over one bag, `done` of the epochs over: `(C,)` logits, and a scalar that is added to the loss."""
        ...

    def stepped(self, done: float) -> None:
        """Called after each step of the optimiser."""
        ...


class Plain(nn.Module):
    """A head taught by the labels alone."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def step(self, h: Tensor, done: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.head(h), h.new_zeros(())

    def stepped(self, done: float) -> None:
        """Nothing else learns."""


@dataclass
class History:
    """Losses by epoch, and which epoch's weights were kept."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The first epoch (from 0) of lowest validation loss."""
        return int(np.argmin(self.validation))


Progress = Callable[[int, int, History], None]
"""Called with (epochs done, epochs at most, history) after each."""


def class_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """`n / (C n_c)`, by which every class weighs the same; 0 of a class that is not there."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor([len(labels) / (classes * n) if n else 0.0 for n in counts], dtype=torch.float32)


def cosine(start: float, stop: float, done: float) -> float:
    """From `start` to `stop` by half a cosine, `done` 0 to 1."""
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    learner: nn.Module,
    bags: Bags,
    fold: Fold,
    spec: FitSpec,
    classes: int,
    *,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> History:
    """Train in place; leave the learner's head in `eval` with the weights of the epoch of lowest validation loss.

    Parameters
    ----------
    learner
        A `Learner`.
    bags, fold
        What to learn from, and what to stop by.
    classes
        C.
    checkpoint
        File written after each epoch; where it exists, training goes on from it, to the same weights as in one go.
    identity
        What the checkpoint must be of besides `spec` and `fold`: head, data.

    Raises
    ------
    ModelError
        The loss is no longer finite.
    StoreError
        The checkpoint is of another training.
    """
    teach: Learner = learner  # type: ignore[assignment]  # a module that is one
    device = device or torch.device("cpu")
    learner.to(device)
    optimiser = torch.optim.Adam(
        [p for p in learner.parameters() if p.requires_grad],
        lr=spec.learning_rate,
        weight_decay=spec.weight_decay,
    )
    loss_of = LOSSES[spec.loss]
    weights = None
    if spec.class_weights == "balanced":
        weights = class_weights(bags.labels[list(fold.train)], classes).to(device)
    history, best = History(), {k: v.clone() for k, v in teach.head.state_dict().items()}
    key = digest(
        {"spec": spec.model_dump(mode="json"), "fold": [fold.train, fold.validation], "of": identity}
    )
    if checkpoint is not None and checkpoint.exists():
        history, best = _resume(checkpoint, key, learner, optimiser, device)
    while len(history.train) < spec.epochs and len(history.train) - _kept(history) < spec.patience:
        epoch = len(history.train)
        done = epoch / spec.epochs
        for group in optimiser.param_groups:
            group["lr"] = cosine(spec.learning_rate, 0.0, done)
        losses: list[float] = []
        learner.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # dropout draws from the global source: seeded by epoch, a resumed training draws the same
            torch.manual_seed(_seed(spec.seed, epoch))
            generator = torch.Generator().manual_seed(_seed(spec.seed, epoch) + 1)
            for chosen in _steps(bags.labels, fold.train, spec, generator):
                passes = [teach.step(bags[i].to(device), done, generator) for i in chosen]
                labels = torch.from_numpy(bags.labels[chosen]).to(device)
                loss = loss_of(torch.stack([p[0] for p in passes]), labels, weights)
                loss = loss + torch.stack([p[1] for p in passes]).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                teach.stepped(done)
                losses.append(loss.item())
        history.train.append(float(np.mean(losses)))
        logits = predict(teach.head, bags, fold.validation, device)
        held = torch.from_numpy(bags.labels[list(fold.validation)])
        history.validation.append(loss_of(logits, held, None if weights is None else weights.cpu()).item())
        if not (math.isfinite(history.train[-1]) and math.isfinite(history.validation[-1])):
            msg = f"epoch {epoch + 1}: the loss is {history.train[-1]:g} in training, {history.validation[-1]:g} in validation; try a lower learning rate"
            raise ModelError(msg)
        if history.best == epoch:
            best = {k: v.clone() for k, v in teach.head.state_dict().items()}
        if checkpoint is not None:
            _save(checkpoint, key, learner, optimiser, history, best)
        if progress is not None:
            progress(epoch + 1, spec.epochs, history)
    teach.head.load_state_dict(best)
    teach.head.eval()
    return history


@torch.no_grad()
def predict(head: nn.Module, bags: Bags, chosen: Sequence[int], device: torch.device | None = None) -> Tensor:
    """`(n, C)` logits of some bags, in evaluation mode, on the CPU."""
    head.eval()
    return torch.stack([head(bags[i].to(device or torch.device("cpu"))).cpu() for i in chosen])


def _kept(history: History) -> int:
    """Epochs up to the best one."""
    return history.best + 1 if history.validation else 0


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _steps(
    labels: NDArray[np.int64], train: Sequence[int], spec: FitSpec, generator: torch.Generator
) -> Iterator[list[int]]:
    """Every training bag once, in random order; where the loss needs it, some of every class in each step."""
    mixed = needs_every_class(spec.loss)
    size = spec.bags or (STEP_BAGS if mixed else 1)
    order = [train[k] for k in torch.randperm(len(train), generator=generator).tolist()]
    if not mixed:
        yield from (order[k : k + size] for k in range(0, len(order), size))
        return
    by_class = [[i for i in order if labels[i] == c] for c in np.unique(labels[order])]
    steps = min(-(-len(order) // size), *(len(members) for members in by_class))
    dealt = [np.array_split(np.array(members), steps) for members in by_class]
    for parts in zip(*dealt, strict=True):
        yield np.concatenate(parts).tolist()


def _save(
    path: Path, key: str, learner: nn.Module, optimiser: torch.optim.Optimizer, history: History, best: dict[str, Tensor]
) -> None:  # fmt: skip
    state = {
        "key": key,
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "train": history.train,
        "validation": history.validation,
        "best": best,
    }
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def _resume(
    path: Path, key: str, learner: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[History, dict[str, Tensor]]:
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["key"] != key:
        msg = f"{path}: a checkpoint of another training (settings, data or head differ); choose another folder, or --fresh"
        raise StoreError(msg)
    learner.load_state_dict(state["learner"])
    optimiser.load_state_dict(state["optimiser"])
    return History(state["train"], state["validation"]), state["best"]
