"""The blend against a slow one, written from the rule: every px of the whole image, one after another."""

from __future__ import annotations

from itertools import pairwise, product
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from schemas.heatmap import Coverage, TileStatus
from schemas.run import MapGrid
from tests.test_workers.store_samples import map_grid, shifted_boxes
from workers.stitching.blend import HELD, blend_block, coverage_block
from workers.stitching.importance import Importance, cell_importance


def slow_axis(
    pixel: int, downsample: int, start: int, stop: int, centres: list[float], importance: list[float]
) -> tuple[NDArray[np.float64], float] | None:
    """Weights of the cells and the importance of one px of one axis of one tile; None where it is silent."""
    centre = (pixel + 0.5) * downsample
    if not start <= centre < stop:
        return None
    cells = len(centres)
    step = centres[1] - centres[0] if cells > 1 else float("inf")
    hats = np.eye(cells)
    place = centre - start
    if downsample > step:
        low = max(pixel * downsample, start) - start
        high = min((pixel + 1) * downsample, stop) - start
        knots = np.unique([low, *(c for c in centres if low < c < high), high])
        weights = np.array(
            [np.trapezoid(np.interp(knots, centres, hat), knots) / (high - low) for hat in hats]
        )
    else:
        weights = np.array([np.interp(place, centres, hat) for hat in hats])
    share = float(weights @ importance)
    if cells > 1 and not centres[0] <= place <= centres[-1]:
        share *= HELD
    return weights, share


def slow_heatmap(
    size: tuple[int, ...],
    downsample: tuple[int, ...],
    boxes: NDArray[np.int64],
    maps: NDArray[np.float32],
    grid: MapGrid,
    importance: tuple[NDArray[np.float64], ...],
) -> NDArray[np.float64]:
    out = np.full(size, np.nan)
    centres = [
        [first + k * step for k in range(n)]
        for first, step, n in zip(grid.first_centre_l0, grid.cell_l0, grid.shape, strict=True)
    ]
    # of each axis, what each of its px hears from each tile
    parts = [
        [
            [
                slow_axis(px, downsample[a], box[0][a], box[1][a], centres[a], importance[a].tolist())
                for box in boxes.tolist()
            ]
            for px in range(size[a])
        ]
        for a in range(len(size))
    ]
    for pixel in product(*(range(n) for n in size)):
        numerator = denominator = 0.0
        for tile, said in enumerate(zip(*(parts[a][px] for a, px in enumerate(pixel)), strict=True)):
            heard = [part for part in said if part is not None]
            if len(heard) < len(size):
                continue
            value, share = maps[tile].astype(np.float64), 1.0
            for weights, factor in heard:
                value = np.tensordot(weights, value, axes=(0, 0))
                share *= factor
            numerator += share * float(value)
            denominator += share
        if denominator > 0:
            out[pixel] = numerator / denominator
    return out


CASES = {
    "abutting": ((37, 29), (12, 10), (12, 10), (4, 3), 2, 0.0),
    "overlapping": ((41, 33), (16, 12), (7, 5), (4, 4), 2, 0.0),
    "off-centre cells": ((40, 31), (16, 16), (11, 9), (4, 4), 1, 2.7),
    "cells past the tile": ((40, 31), (16, 16), (11, 9), (4, 4), 1, -5.0),
    "finer than the heatmap": ((43, 37), (16, 16), (9, 11), (8, 8), 5, 0.6),
    "one cell": ((37, 29), (12, 10), (7, 5), (1, 1), 2, 0.0),
    "volume": ((11, 13, 9), (6, 8, 5), (3, 5, 4), (3, 2, 1), 1, 0.0),
    "coarse volume": ((14, 13, 9), (6, 8, 5), (3, 5, 4), (6, 4, 5), 2, 0.2),
    "past the edge": ((21, 19), (16, 16), (16, 16), (4, 4), 2, 0.0),
}
Case = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, float]


def setup(
    case: Case, kind: Importance, pad: bool = False
) -> tuple[
    tuple[int, ...],
    tuple[int, ...],
    NDArray[np.int64],
    NDArray[np.float32],
    MapGrid,
    tuple[NDArray[np.float64], ...],
]:
    shape, tile, stride, cells, downsample, shift = case
    if pad:
        starts = np.array(list(product(*(range(0, n, s) for n, s in zip(shape, stride, strict=True)))))
        boxes = np.minimum(np.stack([starts, starts + np.array(tile)], axis=1), np.array(shape))
    else:
        boxes = shifted_boxes(shape, tile, stride)
    boxes = boxes[np.arange(len(boxes)) % 5 != 3]  # some tiles were not computed
    grid = map_grid(tile, cells, shift)
    maps = np.random.default_rng(1).normal(size=(len(boxes), *cells)).astype(np.float32)
    size = tuple(-(-n // downsample) for n in shape)
    return size, (downsample,) * len(shape), boxes, maps, grid, cell_importance(kind, grid, tile)


def whole(size: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array([[0] * len(size), size], dtype=np.int64)


@pytest.mark.parametrize("kind", ["flat", "hann", "gaussian"])
@pytest.mark.parametrize("name", CASES)
def test_blend_equals_the_slow_one(name: str, kind: Importance) -> None:
    size, downsample, boxes, maps, grid, importance = setup(CASES[name], kind, pad=name == "past the edge")
    expected = slow_heatmap(size, downsample, boxes, maps, grid, importance)
    found = blend_block(whole(size), downsample, boxes, maps, grid, importance)
    assert found.dtype == np.float32
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "hann", "gaussian"])
@pytest.mark.parametrize("name", CASES)
def test_a_constant_stays_constant_across_seams(name: str, kind: Importance) -> None:
    size, downsample, boxes, maps, grid, importance = setup(CASES[name], kind)
    found = blend_block(whole(size), downsample, boxes, np.full_like(maps, 7.25), grid, importance)
    np.testing.assert_allclose(found[np.isfinite(found)], 7.25, rtol=1e-6)


def test_where_a_tile_interpolates_it_outweighs_one_that_only_holds() -> None:
    grid = map_grid((16, 16), (2, 2))
    boxes = np.array([[[0, 0], [16, 16]], [[0, 12], [16, 28]]], dtype=np.int64)
    maps = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 5.0)]).astype(np.float32)
    found = blend_block(
        np.array([[0, 0], [16, 28]]), (1, 1), boxes, maps, grid, cell_importance("flat", grid, (16, 16))
    )
    # column 12: beyond the first tile's last cell centre (12) and before the second's first (16): both hold
    assert found[8, 12] == pytest.approx(3.0)
    assert found[8, 5] == 1.0
    wide = np.array([[[0, 0], [16, 16]], [[0, 7], [16, 23]]], dtype=np.int64)
    found = blend_block(
        np.array([[0, 0], [16, 23]]), (1, 1), wide, maps, grid, cell_importance("flat", grid, (16, 16))
    )
    # column 12: the second tile interpolates (its first centre is at 11)
    assert found[8, 12] == pytest.approx((1.0 * HELD + 5.0) / (HELD + 1.0))


@given(st.sampled_from(sorted(CASES)), st.data())
@settings(max_examples=40, deadline=None)
def test_any_partition_into_blocks_gives_the_same_bits(name: str, data: st.DataObject) -> None:
    size, downsample, boxes, maps, grid, importance = setup(CASES[name], "hann")
    expected = blend_block(whole(size), downsample, boxes, maps, grid, importance)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in size]
    pieces = list(product(*(list(pairwise(c)) for c in cuts)))
    found = np.empty_like(expected)
    for piece in data.draw(st.permutations(pieces)):
        block = np.array(piece).T
        found[tuple(slice(a, b) for a, b in piece)] = blend_block(
            block, downsample, boxes, maps, grid, importance
        )
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("limit", ["BATCH_PX", "SLAB_PX"])
@pytest.mark.parametrize("name", ["overlapping", "coarse volume"])
def test_tiles_resampled_together_or_alone_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: str
) -> None:
    size, downsample, boxes, maps, grid, importance = setup(CASES[name], "hann")
    expected = blend_block(whole(size), downsample, boxes, maps, grid, importance)
    monkeypatch.setattr(f"workers.stitching.blend.{limit}", 1)
    found = blend_block(whole(size), downsample, boxes, maps, grid, importance)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["flat", "hann", "gaussian"])
@pytest.mark.parametrize("shift", [0.0, -40.0, 40.0])
def test_importance_is_never_zero_and_highest_inside(kind: Importance, shift: float) -> None:
    (factor,) = cell_importance(kind, _one_axis(7, shift), (224,))
    assert (factor > 0).all()
    assert factor.max() <= 1
    assert factor[3] == factor.max() or shift


def _one_axis(cells: int, shift: float) -> MapGrid:
    step = 224 / cells
    return MapGrid(
        shape=(cells,),
        cell_px=(step,),
        first_centre_px=(step / 2 + shift,),
        cell_l0=(step,),
        first_centre_l0=(step / 2 + shift,),
        source="receptive_field",
    )


def test_coverage_says_why() -> None:
    shape, downsample = (21, 20), (2, 2)
    boxes = np.array(
        [[[0, 0], [8, 8]], [[0, 6], [8, 14]], [[4, 4], [12, 12]], [[12, 0], [21, 8]]], dtype=np.int64
    )
    status = np.array([TileStatus.DONE, TileStatus.LEFT_OUT, TileStatus.FAILED, TileStatus.DONE], np.uint8)
    size = (11, 10)
    expected = np.full(size, Coverage.BACKGROUND, np.uint8)
    for px in product(*(range(n) for n in size)):
        centre = [(i + 0.5) * 2 for i in px]
        inside = {
            int(s)
            for s, (a, b) in zip(status, boxes.tolist(), strict=True)
            if all(p <= c < q for p, c, q in zip(a, centre, b, strict=True))
        }
        if any(c >= n for c, n in zip(centre, shape, strict=True)):
            expected[px] = Coverage.OUTSIDE
        elif TileStatus.FAILED in inside:
            expected[px] = Coverage.FAILED
        elif TileStatus.DONE in inside:
            expected[px] = Coverage.EVALUATED
        elif TileStatus.LEFT_OUT in inside:
            expected[px] = Coverage.LEFT_OUT
    assert {*expected.ravel().tolist()} == {1, 2, 3, 4, 5}
    for start, stop in (((0, 0), size), ((3, 2), (9, 10)), ((5, 0), (11, 3))):
        found = coverage_block(np.array([start, stop]), downsample, boxes, status, shape)
        assert np.array_equal(found, expected[start[0] : stop[0], start[1] : stop[1]])


def test_coverage_of_a_pending_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tiles that touch the block are not computed"):
        coverage_block(
            np.array([[0, 0], [4, 4]]), (1, 1), np.array([[[0, 0], [4, 4]]]), np.zeros(1, np.uint8), (4, 4)
        )


@pytest.mark.parametrize(("tile", "downsample", "overlap"), [(224, 8, 0.0), (224, 8, 0.5), (448, 4, 0.0)])
def test_a_big_block(tile: int, downsample: int, overlap: float) -> None:
    cells = tile // 32
    side = 2048 * downsample
    stride = round(tile * (1 - overlap))
    boxes = shifted_boxes((side, side), (tile, tile), (stride, stride))
    grid = map_grid((tile, tile), (cells, cells))
    maps = np.ones((len(boxes), cells, cells), np.float32)
    importance = cell_importance("hann", grid, (tile, tile))
    began = perf_counter()
    found = blend_block(whole((2048, 2048)), (downsample,) * 2, boxes, maps, grid, importance)
    print(f"{len(boxes)} tiles of {cells} x {cells} cells, one channel: {perf_counter() - began:.2f} s")
    assert np.isfinite(found).all()
