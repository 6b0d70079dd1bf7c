from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import yaozarrs
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image, ImageLabel, Labels

from schemas.errors import StoreError
from schemas.heatmap import HeatmapSpec
from schemas.run import BlockTask, HeatmapInfo
from tests.test_workers.store_samples import (
    SPACING,
    heatmap_info,
    map_grid,
    shifted_boxes,
    tiles_info,
    tiny_grid,
    tree,
)
from workers.stitching.grid import block_box, heatmap_grid
from workers.store.heatmap import HeatmapStore

SHAPES = {2: (45, 37), 3: (19, 35, 22)}


def sample(ndim: int = 2, spec: HeatmapSpec | None = None, batch: int = 4) -> HeatmapInfo:
    shape = SHAPES[ndim]
    tile = (8,) * ndim
    boxes = shifted_boxes(shape, tile, tile)
    tiles = tiles_info(boxes, shape, map_grid(tile, (2,) * ndim), batch=batch)
    return heatmap_info(tiles, tiny_grid(shape), spec)


def block_values(store: HeatmapStore, task: BlockTask) -> tuple[NDArray[np.uint8], list[NDArray[np.float32]]]:
    start, stop = block_box(store.grid, task.level, task.block)
    rng = np.random.default_rng([task.level, *task.block])
    codes = rng.choice(np.array([1, 1, 1, 2, 3, 5], np.uint8), tuple((stop - start).tolist()))
    channels = []
    for _ in store.info.channels:
        values = rng.normal(size=codes.shape).astype(np.float32)
        values[codes != 1] = np.nan
        channels.append(values)
    return codes, channels


def write(store: HeatmapStore, task: BlockTask) -> None:
    codes, channels = block_values(store, task)
    store.write_block(task.level, task.block, codes, channels, channels if task.level else ())


def finish(store: HeatmapStore) -> HeatmapStore:
    for task in store.pending_blocks():
        write(store, task)
    store.publish([(-3.0, 3.0)] * 4, [(-1.0, 1.0)] * 4)
    return store


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("done", [False, True])
def test_both_validators_accept_it_at_any_time(tmp_path: Path, ndim: int, done: bool) -> None:
    store = HeatmapStore.create(tmp_path / "heatmap.ome.zarr", sample(ndim), "a slide")
    if done:
        finish(store)
    for part in ("", "peak"):
        yaozarrs.validate_zarr_store(str(store.path / part))
        model = Image.from_zarr(zarr.open_group(store.path / part, mode="r", use_consolidated=False))
        assert len(model.ome_attributes.multiscales[0].datasets) == len(store.grid.levels) - bool(part)
    labels = Labels.from_zarr(zarr.open_group(store.path / "labels", mode="r", use_consolidated=False))
    assert labels.ome_attributes.labels == ["coverage"]
    yaozarrs.validate_zarr_store(str(store.path / "labels" / "coverage"))
    label = ImageLabel.from_zarr(
        zarr.open_group(store.path / "labels" / "coverage", mode="r", use_consolidated=False)
    )
    assert len(label.ome_attributes.multiscales[0].datasets) == len(store.grid.levels)


def test_the_full_sized_grid_passes_too(tmp_path: Path) -> None:
    info = sample().model_copy(update={"grid": heatmap_grid((5000, 7001), 2)})
    store = HeatmapStore.create(tmp_path / "heatmap.ome.zarr", info)
    yaozarrs.validate_zarr_store(str(store.path))
    assert store.image(0).shards == (1, 2048, 2048)
    assert store.image(0).chunks == (1, 512, 512)
    assert store.image(3).shards == (1, 512, 512)


@pytest.mark.parametrize("ndim", [2, 3])
def test_metadata_places_px_centres(tmp_path: Path, ndim: int) -> None:
    info = sample(ndim)
    grid = tiny_grid(SHAPES[ndim], 2)
    store = HeatmapStore.create(tmp_path / "h", info.model_copy(update={"grid": grid}), "a slide")
    raw = json.loads((store.path / "zarr.json").read_text())["attributes"]
    scales = raw["ome"]["multiscales"][0]
    assert scales["name"] == "a slide"
    assert scales["type"] == "nanmean"
    assert [a["name"] for a in scales["axes"]] == ["c", "z", "y", "x"][:1] + ["z", "y", "x"][-ndim:]
    assert {a.get("unit") for a in scales["axes"][1:]} == {"micrometer" if ndim == 2 else "millimeter"}
    assert "unit" not in scales["axes"][0]
    for level, dataset in enumerate(scales["datasets"]):
        scale, shift = dataset["coordinateTransformations"]
        assert scale["scale"] == [1.0, *(s * 2 * 2**level for s in SPACING[ndim])]
        # the centre of heatmap px 0, seen from the centre of level-0 px 0
        assert shift["translation"] == pytest.approx([0.0, *(s * (2**level - 0.5) for s in SPACING[ndim])])
        array = store.image(level)
        assert array.metadata.dimension_names == tuple(a["name"] for a in scales["axes"])
        assert array.shape == (4, *grid.levels[level])
    peak = json.loads((store.path / "peak" / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
    assert peak["type"] == "absmax"
    assert peak["datasets"] == scales["datasets"][1:]
    assert raw["gigacam"]["registration"] == {
        "slide_level0_size": list(SHAPES[ndim]),
        "downsample": [2] * ndim,
        "origin_px": [0] * ndim,
        "convention": "corner",
    }


def test_channels_always_have_a_window(tmp_path: Path) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    labels = ["gradcam:tumour", "gradcam:rest", "layercam:tumour", "layercam:rest"]
    for shown in ((0.0, 1.0, 0.0, 1.0), (-3.0, 3.0, -1.0, 1.0)):
        for part in ("", "peak"):
            raw = json.loads((store.path / part / "zarr.json").read_text())["attributes"]["ome"]
            channels = raw["omero"]["channels"]
            assert [c["label"] for c in channels] == labels
            assert {tuple(c["window"][k] for k in ("min", "max", "start", "end")) for c in channels} == {
                shown
            }
            assert len({c["color"] for c in channels}) == 4
        if not store.info.complete:
            finish(store)
    again = HeatmapStore.open(store.path).info
    assert again == store.info
    assert again.complete
    assert again.display == ((-1.0, 1.0),) * 4


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_written_comes_back(tmp_path: Path, ndim: int) -> None:
    store = finish(HeatmapStore.create(tmp_path / "h", sample(ndim)))
    again = HeatmapStore.open(store.path)
    for level in range(len(again.grid.levels)):
        for block in again.done_blocks(level):
            start, stop = block_box(again.grid, level, block).tolist()
            region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            codes, channels = block_values(again, BlockTask(level=level, block=block))
            assert np.array_equal(again.coverage(level)[region], codes)
            for c, values in enumerate(channels):
                assert np.array_equal(again.image(level)[(c, *region)], values, equal_nan=True)
                if level:
                    assert np.array_equal(again.peak(level)[(c, *region)], values, equal_nan=True)
    assert again.pending_blocks() == []


def test_blocks_are_pending_until_their_entry(tmp_path: Path) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    tasks = store.pending_blocks()
    assert [t.level for t in tasks] == sorted(t.level for t in tasks)
    assert len(tasks) == 9 + 4 + 1 + 1
    write(store, tasks[4])
    assert store.done_blocks(0) == {tasks[4].block}
    assert store.is_done(0, tasks[4].block)
    assert store.pending_blocks() == [t for t in tasks if t != tasks[4]]
    with pytest.raises(StoreError, match="14 blocks are not written"):
        store.publish([(0, 1)] * 4, [(0, 1)] * 4)


@pytest.mark.parametrize(
    "fault", ["small", "dtype", "channels", "many", "finite", "missing", "block", "level", "peaks"]
)
def test_a_block_that_is_not_whole_is_refused_and_stays_pending(tmp_path: Path, fault: str) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    level, block = (1, (0, 0)) if fault == "peaks" else (0, (0, 1))
    codes, channels = block_values(store, BlockTask(level=level, block=block))
    match = "unaligned|channels|finite|has no block"
    if fault == "small":
        codes, channels = codes[:-1], [c[:-1] for c in channels]
    elif fault == "dtype":
        channels[2] = channels[2].astype(np.float64)
    elif fault == "channels":
        channels.pop()
    elif fault == "many":
        channels.append(channels[0])
    elif fault == "finite":
        channels[1][codes != 1] = 0.0
    elif fault == "missing":
        channels[1][:] = np.nan
    elif fault == "block":
        block = (0, 3)
    elif fault == "level":
        level = 9
    with pytest.raises(StoreError, match=match):
        store.write_block(level, block, codes, channels)
    assert not any(store.done_blocks(n) for n in range(len(store.grid.levels)))


def test_a_write_that_cuts_a_shard_is_refused(tmp_path: Path) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    for region in ((0, slice(0, 8), slice(0, 16)), (0, slice(8, 24), slice(0, 16))):
        values = np.zeros(tuple(s.stop - s.start for s in region if isinstance(s, slice)), np.float32)
        with pytest.raises(StoreError, match="unaligned write"):
            store._write_region("0", region, values)
    edge = np.zeros((13, 5), np.float32)
    assert store._write_region("0", (0, slice(32, 45), slice(32, 37)), edge) == edge.nbytes


def test_clearing_takes_the_ancestors_along(tmp_path: Path) -> None:
    store = finish(HeatmapStore.create(tmp_path / "h", sample()))
    boxes = np.array([[[14, 17], [20, 20]]], dtype=np.int64)  # blocks (0, 1) and (1, 1)
    cleared = store.clear_blocks(boxes)
    assert [(t.level, t.block) for t in cleared] == [
        (3, (0, 0)),
        (2, (0, 0)),
        (1, (0, 0)),
        (0, (1, 1)),
        (0, (0, 1)),
    ]
    assert not HeatmapStore.open(store.path).info.complete
    assert sorted(map(str, store.pending_blocks())) == sorted(map(str, cleared))
    assert store.clear_blocks(np.empty((0, 2, 2), np.int64)) == []


def test_the_same_run_resumes(tmp_path: Path) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    write(store, store.pending_blocks()[3])
    (store.path / "0" / "c.77.partial").write_bytes(b"half")
    again = HeatmapStore.create(tmp_path / "h", sample())
    assert len(again.pending_blocks()) == 14
    assert not list(store.path.rglob("*.partial"))


def test_the_same_tiles_stitched_otherwise_replace_it(tmp_path: Path) -> None:
    finish(HeatmapStore.create(tmp_path / "h", sample()))
    store = HeatmapStore.create(tmp_path / "h", sample(spec=HeatmapSpec(importance="flat")))
    assert len(store.pending_blocks()) == 15
    assert not store.info.complete
    assert np.isnan(store.image(0)[:]).all()
    assert list(tmp_path.iterdir()) == [store.path]


def test_other_tiles_are_refused_unless_fresh(tmp_path: Path) -> None:
    finish(HeatmapStore.create(tmp_path / "h", sample()))
    before = tree(tmp_path / "h")
    with pytest.raises(StoreError, match=r"holds a heatmap of other tiles.*--fresh"):
        HeatmapStore.create(tmp_path / "h", sample(batch=2))
    assert tree(tmp_path / "h") == before
    HeatmapStore.create(tmp_path / "h", sample(batch=2), fresh=True)
    assert tree(tmp_path / "h.old-1") == before


def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "scan.dcm").write_bytes(b"x")
    with pytest.raises(StoreError, match="carries no gigacam ledger"):
        HeatmapStore.create(tmp_path / "h", sample(), fresh=True)
    with pytest.raises(StoreError, match="no heatmap"):
        HeatmapStore.open(tmp_path / "absent")


def test_a_heatmap_of_one_level_has_no_peak(tmp_path: Path) -> None:
    info = sample()
    for changed in (
        info.model_copy(update={"grid": tiny_grid(SHAPES[2], 8)}),
        info.model_copy(update={"spec": HeatmapSpec(peak=False)}),
    ):
        store = HeatmapStore.create(tmp_path / str(len(changed.grid.levels)), changed)
        assert not store.has_peak
        assert not (store.path / "peak").exists()
        for task in store.pending_blocks():
            codes, channels = block_values(store, task)
            store.write_block(task.level, task.block, codes, channels)
        store.publish([(0, 1)] * 4, [(0, 1)] * 4)
        yaozarrs.validate_zarr_store(str(store.path))


def test_dask_reads_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = finish(HeatmapStore.create(tmp_path / "h", sample()))
    read: list[Any] = []
    get = zarr.Array.__getitem__

    def watched(self: Any, selection: Any) -> Any:
        read.append(selection)
        return get(self, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", watched)
    whole, one = store.as_dask(), store.as_dask(1, 2)
    assert isinstance(whole, da.Array)
    assert whole.shape == (4, 45, 37)
    assert whole.chunksize == (1, 16, 16)
    assert one.shape == (23, 19)
    assert read == []
    assert float(da.nanmax(whole[1, :16, :16]).compute()) == np.nanmax(
        block_values(store, BlockTask(level=0, block=(0, 0)))[1][1]
    )
    assert len(read) == 1


def test_a_window_cannot_be_infinite(tmp_path: Path) -> None:
    store = HeatmapStore.create(tmp_path / "h", sample())
    for task in store.pending_blocks():
        write(store, task)
    with pytest.raises(ValueError, match="finite"):
        store.publish([(0.0, float("inf"))] * 4, [(0.0, 1.0)] * 4)
    assert not HeatmapStore.open(store.path).info.complete
