from __future__ import annotations

from itertools import product
from time import perf_counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_workers.store_samples import shifted_boxes, tiny_grid
from workers.stitching.grid import (
    all_blocks,
    block_box,
    block_dependencies,
    blocks_touched,
    children,
    heatmap_grid,
    parent,
)


def test_levels_are_ceil_halves_until_a_chunk_holds_them() -> None:
    grid = heatmap_grid((9000, 7001), 2)
    assert grid.levels == ((4500, 3501), (2250, 1751), (1125, 876), (563, 438), (282, 219))
    assert grid.shards == ((2048, 2048), (2048, 2048), (1536, 1024), (1024, 512), (512, 512))
    assert grid.chunk == (512, 512)
    volume = heatmap_grid((1, 400, 300), 1)
    assert volume.levels == ((1, 400, 300), (1, 200, 150), (1, 100, 75))
    assert volume.shards == ((128, 256, 256), (128, 256, 256), (128, 128, 128))


def test_an_axis_shorter_than_the_downsample_is_one_px_with_its_centre_inside() -> None:
    assert heatmap_grid((3, 400, 400), 8).downsample == (3, 8, 8)
    assert heatmap_grid((3, 400, 400), 8).levels[0] == (1, 50, 50)


@given(st.lists(st.integers(1, 90), min_size=2, max_size=3), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_children_cover_their_parent_exactly_once(sides: list[int], downsample: int) -> None:
    grid = tiny_grid(tuple(sides), downsample)
    for level in range(1, len(grid.levels)):
        found = [c for b in all_blocks(grid, level) for c in children(grid, level, b)]
        assert sorted(found) == all_blocks(grid, level - 1)
        for block in all_blocks(grid, level):
            box = block_box(grid, level, block)
            for child in children(grid, level, block):
                low, high = block_box(grid, level - 1, child)
                assert parent(grid, level - 1, child) == block
                assert (low % 2 == 0).all()
                assert (low // 2 >= box[0]).all()
                assert (-(-high // 2) <= box[1]).all()


@given(
    st.lists(st.integers(5, 70), min_size=2, max_size=3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_dependencies_equal_the_comparison_of_every_tile_with_every_block(
    sides: list[int], downsample: int, unit: int, left_out: int
) -> None:
    shape = tuple(sides)
    grid = tiny_grid(shape, downsample)
    boxes = shifted_boxes(shape, (9,) * len(shape), (7,) * len(shape))
    planned = max(len(boxes) - left_out, 0)
    found = block_dependencies(grid, boxes, unit, planned)
    assert list(found) == all_blocks(grid, 0)
    for block in product(*(range(n) for n in grid.blocks(0))):
        start, stop = block_box(grid, 0, block) * np.array(grid.downsample)
        expected = {
            i // unit
            for i, (a, b) in enumerate(boxes[:planned].tolist())
            if all(p < t and q > s for p, q, s, t in zip(a, b, start, stop, strict=True))
        }
        assert found[block] == expected


def test_no_tiles_touch_no_blocks() -> None:
    grid = tiny_grid((40, 40))
    row, block = blocks_touched(grid, np.empty((0, 2, 2), np.int64))
    assert len(row) == len(block) == 0
    assert set(map(len, block_dependencies(grid, np.empty((0, 2, 2), np.int64), 4, 0).values())) == {0}


def test_a_hundred_thousand_tiles_are_sorted_quickly() -> None:
    side = 100_000
    boxes = shifted_boxes((side, side), (320, 320), (315, 315))
    assert len(boxes) > 100_000
    began = perf_counter()
    found = block_dependencies(heatmap_grid((side, side), 16), boxes, 256, len(boxes))
    print(f"{len(boxes)} tiles, {len(found)} blocks: {perf_counter() - began:.2f} s")
    assert set().union(*found.values()) == set(range(-(-len(boxes) // 256)))
