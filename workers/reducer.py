"""The first pass of methods that need the whole image: groups of units summed, then solved once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.explanation import SolvedState
from schemas.frozen import Frozen
from schemas.run import GroupTask, Report, SolveTask
from workers.cam.reduce import collect, solve
from workers.explainer import ExplainInit, TileComputer, open_planned
from workers.pool import Task
from workers.store.reductions import Reductions, group_rows


class Collector:
    """Sums groups of units; kept from task to task.

    The tiles of a group are added in the order of the plan, in float64, whichever worker does it. A tile that cannot be
    read, or whose activations are not finite, is left out; explaining it will say why.
    """

    def __init__(self, init: ExplainInit) -> None:
        self._store = open_planned(init.tiles, init.tiles_id)
        self._sums = Reductions(self._store.path, self._store.info, "r+")
        self._tiles = TileComputer(self._store.info, init)

    def run(self, task: Task) -> Report:
        """Sum over all tiles of a group and write its chunks."""
        if not isinstance(task, GroupTask):
            msg = f"a collector sums groups; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        rows = group_rows(task.group, self._store.info)
        parts = {"decode": 0.0, "compute": 0.0}
        notes: list[str] = []
        failed = 0
        sums: dict[str, Tensor] = {}
        seeds = torch.from_numpy(rows)
        for first, pixels, bad in self._tiles.reader.batches(self._store.boxes(rows), parts):
            clock = time.perf_counter()
            good = [i for i in range(len(pixels)) if i not in bad]
            for name, part in self._add(pixels, good, seeds[first : first + len(pixels)], notes).items():
                sums[name] = sums[name] + part if name in sums else part
            failed += len(bad)
            parts["compute"] += time.perf_counter() - clock
        clock = time.perf_counter()
        written = self._sums.write_group(task.group, {name: s.cpu().numpy() for name, s in sums.items()})
        return Report(
            stage="collect",
            key=task.key,
            task=task,
            done=len(rows) - failed,
            failed=failed,
            seconds=time.perf_counter() - began,
            seconds_by={**parts, "write": time.perf_counter() - clock},
            bytes_written=written,
            notes=tuple(dict.fromkeys(notes)),
            device=self._tiles.device,
        )

    def expect(self, task: Task) -> None:
        """Begin to decode the first mini-batch of a group."""
        if isinstance(task, GroupTask):
            self._tiles.reader.expect(self._store.boxes(group_rows(task.group, self._store.info)))

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self._tiles.close()

    def _add(
        self, pixels: NDArray[Any], good: Sequence[int], seeds: Tensor, notes: list[str]
    ) -> dict[str, Tensor]:
        """What a mini-batch adds; on out-of-memory, in halves, which is noted since it changes the bits."""
        found = self._attempt(pixels, good, seeds)
        if found is not None:
            return found
        torch.cuda.empty_cache()
        half = -(-len(pixels) // 2)
        notes.append(f"out of device memory at batch {len(pixels)}: summed in halves")
        a = self._add(pixels[:half], [i for i in good if i < half], seeds[:half], notes)
        b = self._add(pixels[half:], [i - half for i in good if i >= half], seeds[half:], notes)
        return {name: a[name] + b[name] for name in a}

    def _attempt(self, pixels: NDArray[Any], good: Sequence[int], seeds: Tensor) -> dict[str, Tensor] | None:
        """None where device memory ran out: on return all that it held is free."""
        try:
            x = self._tiles.model.prepare(pixels)
            methods = list(self._store.info.reductions)
            return collect(self._tiles.model.net, x, self._tiles.targets, methods, good, seeds)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            return None


class SolveInit(Frozen):
    """The store of an image whose groups are summed."""

    tiles: str
    tiles_id: str
    """Of the store that was planned: another one in its place is refused."""
    threads: int = 1


class Solver:
    """Turns the sums of a method into its state, on the CPU."""

    def __init__(self, init: SolveInit) -> None:
        self._info = open_planned(init.tiles, init.tiles_id).info
        self._sums = Reductions(Path(init.tiles), self._info, "r+")
        self._threads = init.threads

    def run(self, task: Task) -> Report:
        """Solve one method.

        Raises
        ------
        StoreError
            A group is not yet summed.
        """
        if not isinstance(task, SolveTask):
            msg = f"a solver solves methods; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        torch.set_num_threads(self._threads)
        info = self._info
        per_target = info.reductions[task.method].per_target
        targets = info.spec.cam.targets if per_target else ("",)
        cells = int(np.prod(info.grids[task.method].shape))
        states, numbers = [], []
        for index, target in enumerate(targets):
            total = torch.from_numpy(self._sums.total(task.method, index))
            (found,) = solve(task.method, total[None])
            states.append(found.state.numpy())
            numbers.append(
                SolvedState(
                    method=task.method,
                    target=target,
                    tiles=round(found.cells / cells),
                    planned=info.planned,
                    explained=found.explained,
                    doubtful=found.doubtful,
                )
            )
        written = self._sums.write_state(task.method, np.stack(states), numbers)
        return Report(
            stage="solve",
            key=task.key,
            task=task,
            seconds=time.perf_counter() - began,
            bytes_written=written,
        )

    def expect(self, task: Task) -> None:
        """Nothing is read ahead: the sums are large."""

    def close(self) -> None:
        """Nothing is held open."""
