"""Which blocks may be written now: a block waits for the units that touch it, a coarser one for its children."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from schemas.run import BlockTask

Block = tuple[int, ...]


class BlockOrder:
    """Keeps what every unwritten block still waits for.

    Parameters
    ----------
    blocks
        Number of blocks an axis, by level.
    waits
        For each level-0 block, the units whose tiles touch it.
    written
        Blocks an earlier run wrote, by level.
    """

    def __init__(
        self,
        blocks: tuple[tuple[int, ...], ...],
        waits: Mapping[Block, Iterable[int]],
        written: Mapping[int, set[Block]],
        units_done: set[int],
    ) -> None:
        self._waits = {block: set(units) - units_done for block, units in waits.items()}
        self._of_unit: dict[int, list[Block]] = {}
        for block, units in self._waits.items():
            for unit in units:
                self._of_unit.setdefault(unit, []).append(block)
        self._blocks = blocks
        self._written = {level: set(written.get(level, set())) for level in range(len(blocks))}
        self._issued: set[tuple[int, Block]] = set()

    @property
    def total(self) -> int:
        """Blocks of all levels."""
        count = 0
        for shape in self._blocks:
            product = 1
            for n in shape:
                product *= n
            count += product
        return count

    @property
    def done(self) -> int:
        return sum(len(blocks) for blocks in self._written.values())

    def ready(self) -> list[BlockTask]:
        """Blocks that can be written now and were not handed out before."""
        found = [(0, block) for block, units in self._waits.items() if not units]
        for level in range(1, len(self._blocks)):
            found += [
                (level, parent)
                for parent in {self._parent(level, child) for child in self._written[level - 1]}
                if self._children(level, parent) <= self._written[level - 1]
            ]
        return self._issue(found)

    def unit_done(self, unit: int) -> list[BlockTask]:
        """Note a finished (or given-up) unit; the level-0 blocks that this releases."""
        released = []
        for block in self._of_unit.pop(unit, []):
            self._waits[block].discard(unit)
            if not self._waits[block]:
                released.append((0, block))
        return self._issue(released)

    def block_done(self, task: BlockTask) -> list[BlockTask]:
        """Note a written block; the coarser block that this releases, if any."""
        self._written[task.level].add(task.block)
        level = task.level + 1
        if level == len(self._blocks):
            return []
        parent = self._parent(level, task.block)
        complete = self._children(level, parent) <= self._written[task.level]
        return self._issue([(level, parent)] if complete else [])

    def _parent(self, level: int, child: Block) -> Block:
        finer, coarser = self._blocks[level - 1], self._blocks[level]
        return tuple(min(c // 2, n - 1) if f > 1 else 0 for c, f, n in zip(child, finer, coarser, strict=True))

    def _children(self, level: int, parent: Block) -> set[Block]:
        finer = self._blocks[level - 1]
        found: set[Block] = {()}
        for p, n in zip(parent, finer, strict=True):
            found = {(*head, c) for head in found for c in (2 * p, 2 * p + 1) if c < n}
        return found

    def _issue(self, blocks: list[tuple[int, Block]]) -> list[BlockTask]:
        fresh = [(lv, b) for lv, b in blocks if b not in self._written[lv] and (lv, b) not in self._issued]
        self._issued.update(fresh)
        return [BlockTask(level=level, block=block) for level, block in sorted(fresh)]
