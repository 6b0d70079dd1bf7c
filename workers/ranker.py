"""Which channels of the explained layer speak for each target, over the tiles that score it highest."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.evidence import Evidence
from schemas.heatmap import TileStatus
from schemas.model import ChannelName
from schemas.run import RankTask, Report
from workers.cam.explain import Explained
from workers.cam.targets import functionals
from workers.cam.view import Batch, View
from workers.cam.words import evidence, importance, names_of
from workers.explainer import ExplainInit, TileComputer, open_planned
from workers.models.card import load_card
from workers.pool import Task

IMPORTANCE = "importance"


class Ranker:
    """Ranks the channels of one image's explained layer once all its tiles have scores."""

    def __init__(self, init: ExplainInit) -> None:
        self._store = open_planned(init.tiles, init.tiles_id)
        self._card = init.model
        self._tiles = TileComputer(self._store.info, init)

    def run(self, task: Task) -> Report:
        """Read the best tiles of each target again and rank; the result is in the report, the store is not touched."""
        if not isinstance(task, RankTask):
            msg = f"a ranker ranks channels; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        # Read anew: a model that is loaded already may be of before its channels were named.
        names = names_of(load_card(self._card).card.cam, self._store.info.spec.cam.layer)
        ranked = tuple(
            found
            for t in range(len(self._tiles.targets))
            if (found := self._rank(t, task.tiles, names)) is not None
        )
        return Report(
            stage="rank", key=task.key, task=task, seconds=time.perf_counter() - began, evidence=ranked
        )

    def _rank(self, target: int, tiles: int, names: Mapping[int, ChannelName]) -> Evidence | None:
        """None where no tile has a finite gradient."""
        rows = self._best(target, tiles)
        if not len(rows):
            return None
        asked = self._tiles.targets[target]

        def weights(x: Tensor, part: slice) -> Explained:
            batch = Batch(
                net := self._tiles.model.net,
                x,
                net.forward(x, differentiable=True),
                torch.from_numpy(rows[part]),
            )
            (functional,), index = functionals(batch.scores, [asked], batch.reading.symbols)
            found = importance(View(batch, functional, retain=False))[:, None]
            return Explained(batch.scores.float(), index, {IMPORTANCE: found}, {})

        found = self._tiles.compute(self._store.boxes(rows), rows, weights).arrays.maps[IMPORTANCE][:, 0]
        finite = found[np.isfinite(found).all(1)]
        if not len(finite):
            return None
        return evidence(asked.name, torch.from_numpy(finite), names)

    def _best(self, target: int, tiles: int) -> NDArray[np.int64]:
        """Rows of the computed tiles that score the target highest, best first."""
        done = np.flatnonzero(self._store.statuses() == TileStatus.DONE)
        scores = torch.from_numpy(self._store.scores()[done])
        (weights,), _ = functionals(scores, [self._tiles.targets[target]])
        best = (scores * weights).sum(1).argsort(descending=True, stable=True)[:tiles]
        return np.asarray(done[best.numpy()], dtype=np.int64)

    def expect(self, task: Task) -> None:
        """Nothing can be read ahead: which tiles they are hangs on scores."""

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self._tiles.close()
