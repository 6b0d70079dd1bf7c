from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from schemas.errors import StoreError
from schemas.explanation import MapFlag
from schemas.heatmap import TileStatus
from schemas.run import TilesInfo
from tests.test_workers.store_samples import fill_unit, map_grid, shifted_boxes, tiles_info, tree, unit_values
from workers.store.layout import ERROR_TABLE
from workers.store.rows import ERROR_BYTES
from workers.store.tiles import TilesStore, differing_fields

SHAPE = (30, 26)
BOXES = shifted_boxes(SHAPE, (8, 8), (7, 7))
GRID = map_grid((8, 8), (3, 3))


def sample(planned: int = 14, **more: Any) -> TilesInfo:
    return tiles_info(BOXES, SHAPE, GRID, planned=planned, **more)


def filled(path: Path, failed: tuple[int, ...] = ()) -> TilesStore:
    store = TilesStore.create(path, sample(), BOXES)
    for unit in store.pending_units():
        fill_unit(store, unit, failed)
    return store


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    assert len(BOXES) == 20
    store = filled(tmp_path / "tiles.zarr", failed=(5,))
    again = TilesStore.open(tmp_path / "tiles.zarr")
    assert again.info == sample()
    assert np.array_equal(again.boxes(), BOXES)
    assert again.statuses().tolist() == [1] * 5 + [2] + [1] * 8 + [3] * 6
    assert np.array_equal(again.done_rows(), again.statuses() == 1)
    assert again.pending_units() == []
    assert again.counts().model_dump() == {"planned": 14, "done": 13, "failed": 1, "left_out": 6}
    rows = np.array([2, 3, 4, 6, 13])
    for target in (0, 1):
        found = again.maps_of("layercam", target, rows)
        for row, values in zip(rows.tolist(), found, strict=True):
            expected = unit_values(store.info, row // 4, len(store.unit_rows(row // 4)))[1]["layercam"]
            assert np.array_equal(values, expected[row % 4, target])
    assert again.statuses_of(np.array([5, 6, 19])).tolist() == [2, 1, 3]
    assert np.isnan(again.maps_of("gradcam", 0, np.array([5, 14, 19]))).all()
    assert np.isnan(again.scores()[[5, 14]]).all()
    assert np.isfinite(again.scores()[4]).all()
    assert again.target_index()[[4, 5, 14]].tolist() == [[0, 1], [-1, -1], [-1, -1]]
    (failure,) = again.failures()
    assert (failure.tile, failure.reason) == (5, "tile 5 unreadable")
    assert failure.box.start == tuple(BOXES[5, 0])
    assert failure.box.frame == "l0"


def test_the_arrays_are_those_of_the_contract(tmp_path: Path) -> None:
    filled(tmp_path / "tiles.zarr")
    group = zarr.open_group(tmp_path / "tiles.zarr", mode="r")
    found = {name: (str(a.dtype), a.shape, a.chunks[0]) for name, a in _arrays(group)}
    assert found == {
        "box": ("int64", (20, 2, 2), 20),
        "status/explain": ("uint8", (20,), 4),
        "error": ("uint8", (20,), 4),
        "error_text": ("uint8", (20, ERROR_BYTES), 4),
        "scores": ("float32", (20, 2), 4),
        "target_index": ("int32", (20, 2), 4),
        "device": ("uint8", (20,), 4),
        "flags/gradcam": ("uint8", (20, 2), 4),
        "flags/layercam": ("uint8", (20, 2), 4),
        "maps/gradcam": ("float32", (20, 2, 3, 3), 4),
        "maps/layercam": ("float32", (20, 2, 3, 3), 4),
    }


def _arrays(group: zarr.Group, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, member in group.members():
        found += (
            [(prefix + name, member)]
            if isinstance(member, zarr.Array)
            else _arrays(member, f"{prefix}{name}/")
        )
    return found


def test_flags_and_devices_are_counted_over_computed_tiles(tmp_path: Path) -> None:
    store = TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES)
    n = len(store.unit_rows(0))
    maps = {name: np.zeros((n, 2, 3, 3), np.float32) for name in ("gradcam", "layercam")}
    flags = {name: np.zeros((n, 2), np.uint8) for name in maps}
    flags["gradcam"][:3, 1] = MapFlag.EMPTY | MapFlag.CONSTANT
    flags["layercam"][0, 0] = MapFlag.DOUBTFUL
    scores, index = np.zeros((n, 2), np.float32), np.zeros((n, 2), np.int32)
    assert store.devices() == ()
    store.write_unit(0, scores, index, maps, {1: "read: torn"}, flags, "cuda")
    # the tile that failed counts for nothing
    assert store.flag_counts() == {"gradcam empty": 2, "gradcam constant": 2, "layercam doubtful": 1}
    assert TilesStore.open(tmp_path / "tiles.zarr").devices() == ("cuda",)


def test_reasons_keep_their_code_and_whole_characters(tmp_path: Path) -> None:
    store = TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES)
    scores, maps = unit_values(store.info, 0, 4)
    index = np.zeros((4, 2), np.int32)
    long = "ä" * ERROR_BYTES
    store.write_unit(0, scores, index, maps, {0: f"{ERROR_TABLE[2]} in layer4", 3: long})
    store.fail_unit(1, "worker died 3 times")
    reasons = {f.tile: f.reason for f in store.failures()}
    assert reasons[0] == "the network gave values that are not finite in layer4"
    assert reasons[3] == "ä" * (ERROR_BYTES // 2)
    assert reasons[4] == "given up by the pool: worker died 3 times"
    group = zarr.open_group(store.path, mode="r")
    error: Any = group["error"]
    assert error.attrs["table"] == list(ERROR_TABLE)
    assert error[:8].tolist() == [2, 0, 0, 1, 3, 3, 3, 3]


def test_the_same_request_resumes_and_only_pending_units_are_left(tmp_path: Path) -> None:
    store = TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES)
    assert store.pending_units() == [0, 1, 2, 3]
    fill_unit(store, 2)
    assert TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES).pending_units() == [0, 1, 3]


def test_a_moved_image_resumes_at_its_new_place(tmp_path: Path) -> None:
    fill_unit(TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES), 0)
    TilesStore.create(tmp_path / "tiles.zarr", sample(uri="/elsewhere/a.tif"), BOXES)
    store = TilesStore.open(tmp_path / "tiles.zarr")
    assert store.info.image.uri == "/elsewhere/a.tif"
    assert store.pending_units() == [1, 2, 3]


def test_another_request_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    filled(tmp_path / "tiles.zarr")
    before = tree(tmp_path)
    other = sample(batch=2, targets=("tumour", "fat"))
    with pytest.raises(StoreError) as caught:
        TilesStore.create(tmp_path / "tiles.zarr", other, BOXES)
    message = str(caught.value)
    assert str(tmp_path / "tiles.zarr") in message
    assert (
        "batch (there 4, asked 2); cam.targets (there ['tumour', 'rest'], asked ['tumour', 'fat'])" in message
    )
    assert "--fresh" in message
    assert "grid" not in message
    assert tree(tmp_path) == before


def test_differing_fields_are_dotted_and_symmetric() -> None:
    a = {"x": {"y": 1, "z": [1, 2]}, "w": 0}
    assert differing_fields(a, {"x": {"y": 1, "z": [1, 3]}, "w": 0}) == ["x.z (there [1, 2], asked [1, 3])"]
    assert differing_fields(a, {"x": {"y": 1, "z": [1, 2]}}) == ["w (there 0, asked None)"]
    assert differing_fields(a, a) == []


def test_the_same_request_with_other_boxes_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "tiles.zarr")
    with pytest.raises(StoreError, match=r"plans other tiles \(boxes differ"):
        TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES + 1)
    with pytest.raises(StoreError, match="planned, units"):
        TilesStore.create(tmp_path / "tiles.zarr", sample(planned=8), BOXES)


def test_fresh_moves_aside_and_loses_nothing(tmp_path: Path) -> None:
    filled(tmp_path / "tiles.zarr")
    first = tree(tmp_path / "tiles.zarr")
    store = TilesStore.create(tmp_path / "tiles.zarr", sample(batch=2), BOXES, fresh=True)
    assert store.pending_units() == [0, 1, 2, 3]
    assert tree(tmp_path / "tiles.zarr.old-1") == first
    TilesStore.create(tmp_path / "tiles.zarr", sample(batch=2), BOXES, fresh=True)
    assert (tmp_path / "tiles.zarr.old-2").is_dir()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", ["notes.txt", "zarr.json"])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path, content: str, fresh: bool) -> None:
    path = tmp_path / "tiles.zarr"
    path.mkdir()
    (path / content).write_text('{"attributes": {}}')
    with pytest.raises(StoreError, match="carries no gigacam ledger"):
        TilesStore.create(path, sample(), BOXES, fresh=fresh)
    assert tree(tmp_path) == {f"tiles.zarr/{content}": b'{"attributes": {}}'}


def test_an_absent_store_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no tiles store"):
        TilesStore.open(tmp_path / "tiles.zarr")


def test_a_store_of_another_version_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "tiles.zarr")
    raw = store.info.model_dump(mode="json")
    zarr.open_group(store.path, mode="r+").attrs["gigacam"] = {**raw, "unknown": 1}
    with pytest.raises(StoreError, match="not of this version"):
        TilesStore.open(store.path)


def test_an_image_without_tiles(tmp_path: Path) -> None:
    boxes = np.empty((0, 2, 2), np.int64)
    info = tiles_info(boxes, SHAPE, GRID)
    store = TilesStore.create(tmp_path / "tiles.zarr", info, boxes)
    assert store.pending_units() == []
    assert store.counts().planned == 0
    assert store.failures() == ()
    assert store.maps_of("gradcam", 0, np.empty(0, np.int64)).shape == (0, 3, 3)
    assert TilesStore.create(tmp_path / "tiles.zarr", info, boxes).boxes().shape == (0, 2, 2)


@pytest.mark.parametrize("fault", ["scores", "maps", "method", "nan", "unit"])
def test_a_unit_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, fault: str) -> None:
    store = TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES)
    before = tree(tmp_path)
    scores, maps = unit_values(store.info, 0, 4)
    index, unit = np.zeros((4, 2), np.int32), 0
    if fault == "scores":
        scores = scores[:3]
    elif fault == "maps":
        maps["layercam"] = maps["layercam"][..., :2]
    elif fault == "method":
        del maps["layercam"]
    elif fault == "nan":
        maps["gradcam"][2, 1, 0, 0] = np.nan
    else:
        unit = 4
    with pytest.raises(StoreError, match=str(store.path)):
        store.write_unit(unit, scores, index, maps, {})
    assert tree(tmp_path) == before


def test_retrying_failed_tiles_ends_in_the_store_without_a_failure(tmp_path: Path) -> None:
    filled(tmp_path / "good")
    store = filled(tmp_path / "bad", failed=(1, 6, 13))
    assert np.array_equal(store.failed_boxes(), BOXES[[1, 6, 13]])
    assert tree(tmp_path / "bad") != tree(tmp_path / "good")
    retried = store.retry_boxes()
    store.reset_failed()
    # a retry may fail where there was no failure before: the whole unit is computed again
    assert np.array_equal(retried, BOXES[store.statuses() == TileStatus.PENDING])
    assert len(retried) > 3
    assert store.pending_units() == [0, 1, 3]
    assert store.retry_boxes().shape == (0, 2, 2)
    for unit in store.pending_units():
        fill_unit(store, unit)
    assert tree(tmp_path / "bad") == tree(tmp_path / "good")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", range(11))
def test_killed_between_any_two_writes_a_second_run_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    filled(tmp_path / "whole", failed=(5,))
    store = TilesStore.create(tmp_path / "torn", sample(), BOXES)
    fill_unit(store, 0)
    count = 0
    write = zarr.Array.__setitem__

    def fail_at(self: Any, selection: Any, value: NDArray[Any]) -> None:
        nonlocal count
        if count == writes:
            (store.path / "maps" / "gradcam" / "c.0123abcd.partial").write_bytes(b"half")
            raise Killed
        count += 1
        write(self, selection, value)

    def run(store: TilesStore) -> None:
        for unit in (1, 2):
            fill_unit(store, unit, (5,))

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", fail_at)
        with pytest.raises(Killed):
            run(store)
    again = TilesStore.create(tmp_path / "torn", sample(), BOXES)
    assert again.pending_units() == ([1, 2, 3] if writes < 10 else [2, 3])
    for unit in again.pending_units():
        fill_unit(again, unit, (5,))
    assert tree(tmp_path / "torn") == tree(tmp_path / "whole")


def test_killed_while_being_made_leaves_no_half_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.zarr"
    with monkeypatch.context() as patch:
        # a real kill runs no cleanup either
        patch.setattr("workers.store.folders.shutil.rmtree", lambda *_, **__: None)
        patch.setattr(zarr.Array, "__setitem__", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            TilesStore.create(path, sample(), BOXES)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    TilesStore.create(path, sample(), BOXES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_store_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "tiles.zarr")
    before = tree(tmp_path)
    monkeypatch.setattr("workers.store.tiles.read_ledger", lambda *_: None)
    with pytest.raises(StoreError, match="appeared while it was being made"):
        TilesStore.create(tmp_path / "tiles.zarr", sample(), BOXES)
    assert tree(tmp_path) == before
