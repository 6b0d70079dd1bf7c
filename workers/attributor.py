"""The whole bag in one task: what the head says of it, and what each tile has to do with that."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.bag import AttributeTask, BagReport, InsideSpec
from schemas.errors import ModelError, SourceError
from schemas.frozen import Frozen
from schemas.run import Report
from workers.cam.bag import BagView
from workers.cam.bag_methods import attribute
from workers.cam.targets import functionals, predicted_name, resolve
from workers.explainer import open_planned
from workers.models.bags import load_head
from workers.models.card import load_card, resolved
from workers.pool import Task
from workers.store.bags import Bag, Inside


class AttributeInit(Frozen):
    """The store of an image whose tiles are embedded, and the model."""

    tiles: str
    tiles_id: str
    """Of the store that was planned: another one in its place is refused."""
    model: str
    """Path of the model card."""
    encoder: str
    """How the features are known to be this encoder's."""
    threads: int = 1


class Attributor:
    """Predicts a bag and attributes its decision, on the CPU."""

    def __init__(self, init: AttributeInit) -> None:
        store = open_planned(init.tiles, init.tiles_id)
        self._info = store.info
        self._bag = Bag(Path(init.tiles), store.info, "r+")
        self._init = init
        self._loaded = load_card(init.model)
        if resolved(self._loaded.card)["bag"] != store.info.spec.card["bag"]:
            msg = f"{init.model}: [bag] changed since the run was planned; restore it, or explain again with --fresh"
            raise ModelError(msg)
        self._head = load_head(self._loaded)

    def run(self, task: Task) -> Report:
        """Predict and attribute the bag of all tiles that have features.

        Raises
        ------
        SourceError
            No tile has features.
        ModelError
            The head gives values that are not finite.
        StoreError
            A unit is not embedded yet.
        """
        if not isinstance(task, AttributeTask):
            msg = f"an attributor takes bags; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        torch.set_num_threads(self._init.threads)
        info, cam, output = self._info, self._info.spec.cam, self._loaded.card.output
        rows = self._bag.rows()
        if not len(rows):
            planned = np.arange(info.planned, dtype=np.int64)
            first = next(iter(self._bag.errors(planned).values()), "no tile is planned")
            msg = f"{info.image.uri}: the bag is empty: none of {info.planned} tiles has features, the first since: {first}"
            raise SourceError(msg)
        h = torch.from_numpy(self._bag.features(rows))
        with torch.no_grad():
            logits: Tensor = self._head(h)
        if not logits.isfinite().all():
            msg = f"{self._init.model}: the bag head gives {logits.tolist()} for {info.image.uri}; expected finite values"
            raise ModelError(msg)
        targets = resolve(cam.targets, output, len(info.classes))
        weights, index = functionals(logits[None], targets)
        view = BagView(self._head, h, torch.cat(weights))
        clock = time.perf_counter()
        found = attribute(view, cam.bag_methods)
        relevance = {name: one.relevance.cpu().numpy() for name, one in found.items()}
        for name, values in relevance.items():
            if bad := len(rows) - int(np.isfinite(values).all(axis=1).sum()):
                msg = f"{info.image.uri}: bag method {name} has no value for {bad} of {len(rows)} tiles"
                raise ModelError(
                    msg + ("; a bag of one tile has none left without it" if len(rows) == 1 else "")
                )
        chosen, written = None, 0
        if cam.methods:
            chosen = choose(next(iter(relevance.values())), cam.inside)
            constant = cam.inside.attention == "constant"
            for t in range(len(targets)):
                gradient = view.gradient(t, constant=constant)
                written += self._bag.write_gradient(t, rows, gradient.float().numpy())
        (target_index,) = index.tolist()
        report = BagReport(
            classes=info.classes,
            logits=tuple(logits.double().tolist()),
            predicted=predicted_name(logits, output),
            target_index=tuple(target_index),
            tiles=len(rows),
            planned=info.planned,
            inside=0 if chosen is None else int((chosen == Inside.RELEVANT).sum()),
            sampled=0 if chosen is None else int((chosen == Inside.SAMPLED).sum()),
            facts={name: one.facts for name, one in found.items() if one.facts},
            encoder=self._init.encoder,
        )
        written += self._bag.write_attribution(rows, relevance, chosen, report)
        return Report(
            stage="attribute",
            key=task.key,
            task=task,
            done=len(rows),
            seconds=time.perf_counter() - began,
            seconds_by={"head": clock - began, "methods+write": time.perf_counter() - clock},
            bytes_written=written,
        )

    def expect(self, task: Task) -> None:
        """Nothing is read ahead: there is one task."""

    def close(self) -> None:
        """Nothing is held open."""


def choose(relevance: NDArray[np.float32], inside: InsideSpec) -> NDArray[np.uint8]:
    """Which tiles of a bag are explained inside.

    Parameters
    ----------
    relevance
        `(n, T)`; a tile counts by its largest magnitude.
    inside
        The shares asked for, of n, rounded up; of equally relevant tiles the first ones are taken.

    Returns
    -------
    ndarray
        `(n,)` `Inside`.
    """
    n = len(relevance)
    order = np.argsort(-np.abs(relevance).max(axis=1), kind="stable")
    top = int(np.ceil(inside.top * n))
    rest = np.sort(order[top:])
    sampled = min(len(rest), int(np.ceil(inside.sample * n)))
    chosen = np.full(n, Inside.NO, np.uint8)
    chosen[order[:top]] = Inside.RELEVANT
    chosen[np.random.default_rng(0).choice(rest, sampled, replace=False)] = Inside.SAMPLED
    return chosen
