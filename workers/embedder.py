"""One unit of tiles: pixels in, features out, to the store."""

from __future__ import annotations

import time

from schemas.run import Report, UnitTask
from workers.explainer import ExplainInit, TileComputer, open_planned
from workers.pool import Task
from workers.store.bags import Bag


class Embedder:
    """Embeds units of one image; kept from task to task."""

    def __init__(self, init: ExplainInit) -> None:
        self._store = open_planned(init.tiles, init.tiles_id)
        self._bag = Bag(self._store.path, self._store.info, "r+")
        self._tiles = TileComputer(self._store.info, init)
        self._unit: int | None = None
        """Being computed, or the last that was: a hint of it comes too late."""

    def run(self, task: Task) -> Report:
        """Embed every tile of the unit and write its chunks; a tile that has no features is recorded."""
        if not isinstance(task, UnitTask):
            msg = f"an embedder computes units; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        self._unit = task.unit
        rows = self._store.unit_rows(task.unit)
        found = self._tiles.compute(self._store.boxes(rows), rows, lambda x, _: self._tiles.embedded(x))
        clock = time.perf_counter()
        written = self._bag.write_unit(rows, found.arrays.scores, found.errors)
        return Report(
            stage="embed",
            key=task.key,
            task=task,
            done=len(rows) - len(found.errors),
            failed=len(found.errors),
            seconds=time.perf_counter() - began,
            seconds_by={**found.seconds_by, "write": time.perf_counter() - clock},
            bytes_written=written,
            notes=found.notes,
            device=self._tiles.device,
        )

    def expect(self, task: Task) -> None:
        """Begin to decode the first mini-batch of a unit."""
        if isinstance(task, UnitTask) and task.unit != self._unit:
            self._tiles.reader.expect(self._store.boxes(self._store.unit_rows(task.unit)))

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self._tiles.close()
