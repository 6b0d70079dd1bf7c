"""One unit of a bag: each tile explained inside, in units of the slide's own score, by the chain rule."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import StoreError
from schemas.run import Report, UnitTask
from workers.explainer import ExplainInit, TileComputer, open_planned
from workers.imported import SAME_ENCODER, cosines
from workers.pool import Task
from workers.store.bags import Bag

SAME_EMBEDDING = 0.9999
"""Least cosine between a tile's features that were computed here and those computed again where it is explained."""


class InsideExplainer:
    """Explains units of one image's bag; kept from task to task.

    A tile's target is `<v, enc(x)>` with v the gradient of the slide's target by the tile's features.
    """

    def __init__(self, init: ExplainInit) -> None:
        self._store = open_planned(init.tiles, init.tiles_id)
        self._bag = Bag(self._store.path, self._store.info)
        cam = self._store.info.spec.cam
        self._every = cam.inside.every
        # Imported features are held against what they were accepted by.
        self._least = SAME_ENCODER if self._store.info.spec.grid.features_sha256 else SAME_EMBEDDING
        # Without maps there is nothing to read or to compute: the tiles' status follows from the bag.
        self._tiles = TileComputer(self._store.info, init) if cam.methods else None
        self._unit: int | None = None
        """Being computed, or the last that was: a hint of it comes too late."""

    def run(self, task: Task) -> Report:
        """Explain the unit's tiles that are asked for, and write its chunks.

        Raises
        ------
        StoreError
            The bag is not attributed yet.
        """
        if not isinstance(task, UnitTask):
            msg = f"an explainer computes units; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        self._unit = task.unit
        info = self._store.info
        report = self._bag.report()
        if report is None:
            msg = f"{self._store.path}: unit {task.unit} is to be explained before its bag is attributed; run again"
            raise StoreError(msg)
        rows = self._store.unit_rows(task.unit)
        errors = {i: f"not in the bag: {reason}" for i, reason in self._bag.errors(rows).items()}
        targets = len(info.spec.cam.targets)
        maps = {m: np.full((len(rows), targets, *g.shape), np.nan, np.float32) for m, g in info.grids.items()}
        flags = {m: np.zeros((len(rows), targets), np.uint8) for m in info.grids}
        seconds_by: dict[str, float] = {}
        notes: tuple[str, ...] = ()
        chosen = self._chosen(rows)
        device = ""
        tiles = self._tiles
        if tiles is not None and len(chosen) > len(errors.keys() & set(chosen.tolist())):
            of = rows[chosen]
            v, seeds = torch.from_numpy(np.nan_to_num(self._bag.gradient(of))), torch.from_numpy(of)
            found = tiles.compute(
                self._store.boxes(of), of, lambda x, part: tiles.inside(x, v[part], seeds[part])
            )
            reasons = {**_differing(found.arrays.scores, self._bag.features(of), self._least), **found.errors}
            errors = {**{int(chosen[i]): reason for i, reason in reasons.items()}, **errors}
            for method, values in found.arrays.maps.items():
                maps[method][chosen], flags[method][chosen] = values, found.arrays.flags[method]
            seconds_by, notes, device = found.seconds_by, found.notes, tiles.device
        outside = np.ones(len(rows), bool)
        outside[chosen] = False
        index = np.tile(np.array(report.target_index, np.int32), (len(rows), 1))
        clock = time.perf_counter()
        nothing = np.empty((len(rows), 0), np.float32)
        written = self._store.write_unit(task.unit, nothing, index, maps, errors, flags, device, outside)
        return Report(
            stage="explain",
            key=task.key,
            task=task,
            done=len(rows) - len(errors),
            failed=len(errors),
            seconds=time.perf_counter() - began,
            seconds_by={**seconds_by, "write": time.perf_counter() - clock},
            bytes_written=written,
            notes=notes,
            device=device,
        )

    def expect(self, task: Task) -> None:
        """Begin to decode the first mini-batch of a unit."""
        if isinstance(task, UnitTask) and task.unit != self._unit and self._tiles is not None:
            rows = self._store.unit_rows(task.unit)
            if len(chosen := self._chosen(rows)):
                self._tiles.reader.expect(self._store.boxes(rows[chosen]))

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        if self._tiles is not None:
            self._tiles.close()

    def _chosen(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `rows` of the tiles to compute: where all are, the failed ones too, in the batches they were embedded in."""
        if self._tiles is None:
            return np.empty(0, np.int64)
        return np.arange(len(rows)) if self._every else np.flatnonzero(self._bag.inside(rows))


def _differing(found: NDArray[np.float32], stored: NDArray[np.float32], least: float) -> dict[int, str]:
    """Place -> reason, of embeddings `(n, D)` whose cosine with those the bag was predicted from is below `least`."""
    near = cosines(found, stored)
    return {
        i: f"embedding differs: computed again it has cosine {near[i]:.6f} with the one in the bag; expected at least {least}"
        for i in np.flatnonzero(~(near >= least)).tolist()
    }
