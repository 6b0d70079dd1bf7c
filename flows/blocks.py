"""Which blocks may be written now: a block waits for the units that touch it, a coarser one for its children."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from schemas.heatmap import HeatmapGrid
from schemas.run import BlockTask
from workers.stitching.grid import Block, all_blocks, children


class BlockOrder:
    """Keeps what every unwritten block still waits for.

    Parameters
    ----------
    waits
        For each level-0 block, the units whose tiles touch it.
    pending
        Blocks that no earlier run wrote.
    units_done
        Units that an earlier run finished.
    """

    def __init__(
        self,
        grid: HeatmapGrid,
        waits: Mapping[Block, Iterable[int]],
        pending: Sequence[BlockTask],
        units_done: set[int],
    ) -> None:
        self._grid = grid
        self._pending = {(task.level, task.block) for task in pending}
        self._left: dict[tuple[int, Block], set[object]] = {}
        self._waiters: dict[object, list[tuple[int, Block]]] = {}
        for level, block in self._pending:
            on: set[object] = set()
            if level == 0:
                on |= set(waits[block]) - units_done
            else:
                on |= {(level - 1, child) for child in children(grid, level, block)} & self._pending
            self._left[level, block] = on
            for thing in on:
                self._waiters.setdefault(thing, []).append((level, block))
        self.total = sum(len(all_blocks(grid, level)) for level in range(len(grid.levels)))

    @property
    def done(self) -> int:
        """Blocks written so far, by earlier runs too."""
        return self.total - len(self._pending)

    def ready(self) -> list[BlockTask]:
        """Pending blocks that wait for nothing, before any unit of this run is done."""
        return _tasks(key for key, on in self._left.items() if not on)

    def unit_done(self, unit: int) -> list[BlockTask]:
        """Note a finished (or given-up) unit; the blocks that this releases."""
        return self._release(unit)

    def block_done(self, task: BlockTask) -> list[BlockTask]:
        """Note a written block; the coarser block that this releases, if any."""
        self._pending.discard((task.level, task.block))
        return self._release((task.level, task.block))

    def _release(self, thing: object) -> list[BlockTask]:
        released = []
        for key in self._waiters.pop(thing, []):
            self._left[key].discard(thing)
            if not self._left[key]:
                released.append(key)
        return _tasks(released)


def _tasks(keys: Iterable[tuple[int, Block]]) -> list[BlockTask]:
    return [BlockTask(level=level, block=block) for level, block in sorted(keys)]
