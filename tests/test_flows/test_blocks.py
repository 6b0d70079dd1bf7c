"""The order of blocks: each handed out once, never before what it is made from."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flows.blocks import BlockOrder
from schemas.run import BlockTask
from workers.stitching.grid import all_blocks, block_dependencies, children, heatmap_grid


@pytest.mark.parametrize("seed", range(8))
def test_every_block_is_handed_out_once_and_after_its_parts(seed: int) -> None:
    chance = random.Random(seed)
    grid = heatmap_grid((9000, 13000), 1)
    boxes = np.array(
        [[[y, x], [y + 700, x + 700]] for y in range(0, 8300, 700) for x in range(0, 12300, 700)], np.int64
    )
    waits = block_dependencies(grid, boxes, 5, len(boxes))
    units = list(range(-(-len(boxes) // 5)))
    finished = set(chance.sample(units, 7))
    every = [BlockTask(level=lv, block=b) for lv in range(len(grid.levels)) for b in all_blocks(grid, lv)]
    written = {t for t in every if t.level == 0 and waits[t.block] <= finished and chance.random() < 0.5}
    order = BlockOrder(grid, waits, [t for t in every if t not in written], finished)
    done_units, given = set(finished), []
    queue = order.ready()
    left = [u for u in units if u not in finished]
    chance.shuffle(left)
    while queue or left:
        if queue and (not left or chance.random() < 0.5):
            task = queue.pop(chance.randrange(len(queue)))
            assert task not in written
            if task.level == 0:
                assert waits[task.block] <= done_units
            else:
                parts = {
                    BlockTask(level=task.level - 1, block=b) for b in children(grid, task.level, task.block)
                }
                assert parts <= written
            written.add(task)
            given.append(task)
            queue += order.block_done(task)
        else:
            unit = left.pop()
            done_units.add(unit)
            queue += order.unit_done(unit)
    assert written == set(every)
    assert len(given) == len(set(given))
    assert order.done == order.total == len(every)
