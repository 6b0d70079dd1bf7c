from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
import zarr
from numpy.typing import NDArray

from schemas.errors import StoreError
from schemas.heatmap import Coverage, HeatmapSpec
from schemas.run import BlockTask, UnitTask
from tests.test_workers.store_samples import (
    fill_unit,
    heatmap_info,
    map_grid,
    shifted_boxes,
    tiles_info,
    tiny_grid,
    tree,
)
from tests.test_workers.test_stitching_blend import slow_heatmap
from workers.stitcher import Stitcher, StitchInit
from workers.stitching.grid import block_dependencies, children
from workers.stitching.importance import cell_importance
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    "slide": ((61, 75), (16, 16), (11, 11), (4, 4), 2),
    "fine slide": ((45, 37), (16, 16), (16, 16), (4, 4), 1),
    "volume": ((9, 22, 19), (5, 8, 8), (4, 6, 6), (2, 3, 3), 1),
}


FAILED = (1, 5)
Made = tuple[TilesStore, HeatmapStore, StitchInit]


def made_tiles(folder: Path, name: str) -> TilesStore:
    """The ledger of a case, nothing computed: some tiles left out, some places without any."""
    shape, tile, stride, cells, _ = CASES[name]
    boxes = shifted_boxes(shape, tile, stride)
    boxes = boxes[np.arange(len(boxes)) % 6 != 2]
    grid = map_grid(tile, cells, 0.7)
    info = tiles_info(boxes, shape, grid, planned=len(boxes) - 3, methods=("gradcam",))
    return TilesStore.create(folder / "tiles.zarr", info, boxes)


def fill(tiles: TilesStore, failed: tuple[int, ...] = FAILED) -> None:
    for unit in tiles.pending_units():
        fill_unit(tiles, unit, failed)


def made_heatmap(folder: Path, name: str, tiles: TilesStore, spec: HeatmapSpec | None = None) -> Made:
    info = heatmap_info(tiles.info, tiny_grid(CASES[name][0], CASES[name][4]), spec)
    heatmap = HeatmapStore.create(folder / "heatmap.ome.zarr", info, "image")
    return (
        tiles,
        heatmap,
        StitchInit(tiles=str(tiles.path), heatmap=str(heatmap.path), run_id=heatmap.info.run_id),
    )


def stitch(heatmap: HeatmapStore, init: StitchInit) -> None:
    stitcher = Stitcher(init)
    for task in heatmap.pending_blocks():
        stitcher.run(task)
    stitcher.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A case stitched without any disturbance; not to be written to."""

    @cache
    def make(name: str) -> Made:
        folder = tmp_path_factory.mktemp("whole")
        tiles = made_tiles(folder, name)
        fill(tiles)
        _, heatmap, init = made_heatmap(folder, name, tiles)
        stitch(heatmap, init)
        return tiles, heatmap, init

    return make


@pytest.mark.parametrize("name", CASES)
def test_the_heatmap_is_the_dense_accumulation_of_the_tile_maps(
    whole: Callable[[str], Made], name: str
) -> None:
    tiles, heatmap, _ = whole(name)
    info, shape = tiles.info, tiles.info.lattice.shape_l0
    done, failed = np.flatnonzero(tiles.done_rows()), tiles.failed_boxes()
    coverage = heatmap.coverage(0)[:]
    for i, channel in enumerate(heatmap.info.channels):
        cells = info.grids[channel.method]
        maps = tiles.maps_of(channel.method, info.spec.cam.targets.index(channel.target), done)
        expected = slow_heatmap(
            heatmap.grid.levels[0],
            heatmap.grid.downsample,
            tiles.boxes(done),
            maps,
            cells,
            cell_importance("hann", cells, info.lattice.tile_l0),
        )
        for pixel in np.ndindex(expected.shape):
            centre = (np.array(pixel) + 0.5) * np.array(heatmap.grid.downsample)
            for box in failed:
                if (box[0] <= centre).all() and (centre < box[1]).all():
                    expected[pixel] = np.nan
            if (centre >= np.array(shape)).any():
                expected[pixel] = np.nan
        np.testing.assert_allclose(heatmap.image(0)[i], expected, rtol=2e-6, atol=1e-6)
        assert np.array_equal(np.isfinite(expected), coverage == Coverage.EVALUATED)
    assert {1, 2, 3, 4} <= {*np.unique(coverage).tolist()}


@pytest.mark.parametrize("name", CASES)
def test_finite_means_evaluated_at_every_level_and_channel(whole: Callable[[str], Made], name: str) -> None:
    _, heatmap, _ = whole(name)
    assert len(heatmap.grid.levels) > 2
    for level in range(len(heatmap.grid.levels)):
        evaluated = heatmap.coverage(level)[:] == Coverage.EVALUATED
        assert (heatmap.coverage(level)[:] != Coverage.PENDING).all()
        for values in heatmap.image(level)[:]:
            assert np.array_equal(np.isfinite(values), evaluated)
        if level:
            for values in heatmap.peak(level)[:]:
                assert np.array_equal(np.isfinite(values), evaluated)
    yaozarrs.validate_zarr_store(str(heatmap.path))


def slow_levels(values: NDArray[np.float32], levels: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Mean of means, and peak of all of level 0, of each level, px by px."""
    out = [(values, values)]
    for level in range(1, levels):
        below = out[-1][0]
        size = tuple(-(-n // 2) for n in below.shape)
        mean, peak = np.full(size, np.nan, np.float32), np.full(size, np.nan, np.float32)
        for px in np.ndindex(*size):
            finer = below[tuple(slice(2 * i, 2 * i + 2) for i in px)].astype(np.float64)
            finest = values[tuple(slice(i << level, (i + 1) << level) for i in px)]
            if np.isfinite(finer).any():
                mean[px] = np.nanmean(finer)
                peak[px] = finest.ravel()[np.nanargmax(np.abs(finest))]
        out.append((mean, peak))
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_pyramid_is_that_of_the_whole_image(whole: Callable[[str], Made], name: str) -> None:
    _, heatmap, _ = whole(name)
    for channel in (0, 1):
        slow = slow_levels(heatmap.image(0)[channel], len(heatmap.grid.levels))
        for level in range(1, len(slow)):
            np.testing.assert_allclose(heatmap.image(level)[channel], slow[level][0], rtol=1e-6, atol=1e-7)
            assert np.array_equal(heatmap.peak(level)[channel], slow[level][1], equal_nan=True)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_any_number_of_stitchers_and_doing_it_twice_give_the_same_bytes(
    whole: Callable[[str], Made], tmp_path: Path, seed: int
) -> None:
    tiles, heatmap, _ = whole("slide")
    _, other, other_init = made_heatmap(tmp_path, "slide", tiles)
    stitchers = [Stitcher(other_init) for _ in range(3)]
    order = random.Random(seed)
    for level in range(len(other.grid.levels)):
        tasks = [t for t in other.pending_blocks() if t.level == level]
        order.shuffle(tasks)
        for task in tasks + tasks[:2]:
            report = order.choice(stitchers).run(task)
            assert report.task == task
            assert report.bytes_written > 0
            assert report.stage == ("downsample" if level else "stitch")
    assert tree(other.path) == tree(heatmap.path)


def test_a_block_can_be_stitched_as_soon_as_its_units_are_done(
    whole: Callable[[str], Made], tmp_path: Path
) -> None:
    tiles, heatmap, init = made_heatmap(tmp_path, "slide", made_tiles(tmp_path, "slide"))
    info, stitcher = tiles.info, Stitcher(init)
    waiting = block_dependencies(heatmap.grid, tiles.boxes(), info.spec.unit, info.planned)
    early = 0
    for unit in reversed(tiles.pending_units()):
        fill_unit(tiles, unit, FAILED)
        for block in [b for b, units in waiting.items() if unit in units]:
            waiting[block].discard(unit)
            if waiting[block]:
                with pytest.raises(StoreError, match="of its tiles are not computed"):
                    stitcher.run(BlockTask(level=0, block=block))
            else:
                stitcher.run(BlockTask(level=0, block=block))
                early += bool(tiles.pending_units())
    assert early > 0
    stitch(heatmap, init)
    assert tree(heatmap.path) == tree(whole("slide")[1].path)


def test_a_level_waits_for_the_one_below(whole: Callable[[str], Made], tmp_path: Path) -> None:
    _, heatmap, init = made_heatmap(tmp_path, "slide", whole("slide")[0])
    stitcher = Stitcher(init)
    for child in children(heatmap.grid, 1, (0, 0))[:-1]:
        stitcher.run(BlockTask(level=0, block=child))
    with pytest.raises(StoreError, match=r"level 1 block \(0, 0\) needs level 0 block"):
        stitcher.run(BlockTask(level=1, block=(0, 0)))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", [0, 1, 3, 4, 27])
def test_killed_between_any_two_writes_a_second_run_gives_the_same_bytes(
    whole: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    tiles, torn, init = made_heatmap(tmp_path, "slide", whole("slide")[0])
    count = 0
    write = zarr.Array.__setitem__

    def fail_at(self: Any, selection: Any, value: Any) -> None:
        nonlocal count
        if count == writes:
            raise Killed
        count += 1
        write(self, selection, value)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", fail_at)
        with pytest.raises(Killed):
            stitch(torn, init)
    again = HeatmapStore.create(torn.path, torn.info, "image")
    assert len(again.done_blocks(0)) == min(writes // 4, 6)
    stitch(again, StitchInit(tiles=str(tiles.path), heatmap=str(torn.path), run_id=torn.info.run_id))
    assert tree(torn.path) == tree(whole("slide")[1].path)


def test_retrying_failed_tiles_mends_exactly_what_they_touch(tmp_path: Path) -> None:
    tiles = made_tiles(tmp_path / "a", "slide")
    fill(tiles)
    _, heatmap, init = made_heatmap(tmp_path / "a", "slide", tiles)
    stitch(heatmap, init)
    heatmap.clear_blocks(tiles.retry_boxes())
    assert 0 < len(heatmap.done_blocks(0)) < 6
    tiles.reset_failed()
    fill(tiles, failed=())
    stitch(heatmap, init)
    good = made_tiles(tmp_path / "b", "slide")
    fill(good, failed=())
    _, expected, good_init = made_heatmap(tmp_path / "b", "slide", good)
    stitch(expected, good_init)
    assert tree(tiles.path) == tree(good.path)
    assert tree(heatmap.path) == tree(expected.path)


def test_an_image_without_tiles_is_background(tmp_path: Path) -> None:
    boxes = np.empty((0, 2, 2), np.int64)
    info = tiles_info(boxes, (40, 30), map_grid((4, 4), (2, 2)))
    TilesStore.create(tmp_path / "tiles.zarr", info, boxes)
    heatmap = HeatmapStore.create(tmp_path / "h", heatmap_info(info, tiny_grid((40, 30))))
    stitch(
        heatmap,
        StitchInit(tiles=str(tmp_path / "tiles.zarr"), heatmap=str(heatmap.path), run_id=heatmap.info.run_id),
    )
    for level in range(len(heatmap.grid.levels)):
        assert (heatmap.coverage(level)[:] == Coverage.BACKGROUND).all()
        assert np.isnan(heatmap.image(level)[:]).all()


def test_a_heatmap_of_other_tiles_is_refused(whole: Callable[[str], Made], tmp_path: Path) -> None:
    tiles, heatmap, _ = whole("slide")
    other = tiles_info(tiles.boxes(), tiles.info.lattice.shape_l0, tiles.info.grids["gradcam"], batch=2)
    TilesStore.create(tmp_path / "tiles.zarr", other, tiles.boxes())
    with pytest.raises(StoreError, match="made of tiles"):
        Stitcher(
            StitchInit(
                tiles=str(tmp_path / "tiles.zarr"), heatmap=str(heatmap.path), run_id=heatmap.info.run_id
            )
        )


def test_a_stitcher_takes_blocks_only(whole: Callable[[str], Made]) -> None:
    _, _, init = whole("slide")
    with pytest.raises(TypeError, match="takes blocks"):
        Stitcher(init).run(UnitTask(unit=0))


def test_the_blend_asked_for_is_the_one_used(whole: Callable[[str], Made], tmp_path: Path) -> None:
    tiles, heatmap, _ = whole("slide")
    _, flat, init = made_heatmap(tmp_path, "slide", tiles, HeatmapSpec(importance="flat"))
    stitch(flat, init)
    a, b = heatmap.image(0)[0], flat.image(0)[0]
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    assert np.nanmax(np.abs(a - b)) > 1e-3
