"""The frozen values: what they refuse, what they hash to, and that errors travel between processes."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import errors
from schemas.explanation import CamSpec, CellGeometry
from schemas.frozen import canonical_json, digest
from schemas.geometry import Box
from schemas.grid import GridSpec
from schemas.heatmap import COVERAGE_MERGE_ORDER, Coverage, HeatmapSpec
from schemas.image import ImageMeta, LevelMeta, ReadOptions, stem_of
from schemas.model import InputSpec, NetworkSpec
from schemas.run import ImageReport, MapGrid, RunReport, TilesSpec


def spec(**changes: object) -> TilesSpec:
    values: dict[str, object] = {
        "identity": "0" * 64,
        "read": ReadOptions(),
        "spacing": (0.5, 0.5),
        "card": {"name": "m"},
        "cam": CamSpec(methods=("gradcam",), targets=("tumour",), layer="layer4"),
        "grid": GridSpec(tile_px=(224, 224), spacing=(0.5, 0.5)),
        "unit": 256,
        "batch": 32,
    }
    return TilesSpec.model_validate(values | changes)


def test_values_cannot_be_changed_and_unknown_keys_are_errors() -> None:
    box = Box(frame="l0", start=(0, 0), stop=(2, 3))
    with pytest.raises(ValidationError, match="frozen"):
        box.start = (1, 1)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        ReadOptions.model_validate({"mpp": 0.5})


@pytest.mark.parametrize(
    ("start", "stop"), [((0, 0), (0, 3)), ((5, 0), (4, 3)), ((0, 0, 0), (1, 1)), ((0,), (4,))]
)
def test_an_empty_or_crooked_box_is_refused(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="box"):
        Box(frame="l0", start=start, stop=stop)


def test_boxes_share_a_pixel_or_do_not_and_frames_do_not_mix() -> None:
    a = Box(frame="l0", start=(0, 0), stop=(4, 4))
    assert a.shape == (4, 4)
    assert a.intersects(Box(frame="l0", start=(3, 3), stop=(9, 9)))
    assert not a.intersects(Box(frame="l0", start=(4, 0), stop=(9, 9)))
    with pytest.raises(ValueError, match="'l0' and 'hm'"):
        a.intersects(Box(frame="hm", start=(0, 0), stop=(4, 4)))


def test_equal_requests_have_equal_ids_and_every_field_counts() -> None:
    assert spec().tiles_id == spec().tiles_id
    assert len(spec().tiles_id) == 64
    changed = [
        spec(batch=16),
        spec(unit=128),
        spec(identity="1" * 64),
        spec(spacing=(0.5, 0.25)),
        spec(read=ReadOptions(time=1)),
        spec(card={"name": "n"}),
        spec(cam=CamSpec(methods=("gradcam",), targets=("benign",), layer="layer4")),
        spec(grid=GridSpec(tile_px=(224, 224), spacing=(0.5, 0.5), overlap=0.5)),
    ]
    assert len({s.tiles_id for s in [spec(), *changed]}) == 1 + len(changed)
    assert spec(read=ReadOptions(mpp_um=0.5)).tiles_id == spec().tiles_id
    flat, hann = (spec().run_id(HeatmapSpec(importance=i, downsample=8)) for i in ("flat", "hann"))
    assert flat != hann


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False))
)
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert digest(value) == digest(turned)
    assert digest(value) == hashlib.sha256(canonical_json(value).encode()).hexdigest()
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.svs", "a"),
        ("scan.nii.gz", "scan"),
        ("CMU 1.ome.tiff", "CMU_1"),
        ("s.ome.zarr", "s"),
        ("Größe(1).tif", "Gr__e_1_"),
        ("x" * 90 + ".svs", "x" * 64),
        (".hidden", ".hidden"),
        ("", "image"),
    ],
)
def test_the_stem_of_a_name_is_safe_in_a_path(name: str, stem: str) -> None:
    assert stem_of(name) == stem


def test_two_files_of_one_stem_have_two_folders() -> None:
    level = LevelMeta(shape=(4, 4), downsample=(1.0, 1.0))
    names = set()
    for fill in "ab":
        meta = ImageMeta(
            uri=f"{fill}/s.svs", stem="s", identity=fill * 64, kind="slide", format="f", channels=3,
            dtype="uint8", levels=(level,), spacing=(0.5, 0.5), spacing_source="x",
        )  # fmt: skip
        names |= {meta.image_id(), meta.image_id("hash")}
    assert names == {"s-aaaaaaaa", "s-bbbbbbbb", "aaaaaaaa", "bbbbbbbb"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "slide", "channels": 3, "tile": (64, 64)}, "needs mpp"),
        ({"kind": "volume", "channels": 1, "tile": (8, 8, 8), "mpp": 1.0}, "needs spacing_mm"),
        ({"kind": "slide", "channels": 3, "tile": (64, 64, 64), "mpp": 1.0}, "2 sizes"),
        ({"kind": "slide", "channels": 3, "tile": (64, 64), "mpp": 1.0, "mean": (1.0, 2.0)}, "1 or 3"),
        (
            {"kind": "slide", "channels": 3, "tile": (64, 64), "mpp": 1.0, "window": (5.0, 5.0)},
            "below the second",
        ),
        ({"kind": "slide", "channels": 3, "tile": (64, 64), "mpp": 1.0, "std": (0.0,)}, "above 0"),
    ],
)
def test_an_input_that_contradicts_itself_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        InputSpec.model_validate(values)


def test_weights_without_a_digest_are_refused() -> None:
    with pytest.raises(ValidationError, match="without sha256"):
        NetworkSpec(adapter="monai", name="ResNet", weights="w.safetensors")


def test_cells_are_carried_to_level_0_by_the_tile_s_own_scale() -> None:
    cells = CellGeometry(shape=(7, 7), cell_px=(32.0, 32.0), first_centre_px=(16.0, 0.5), source="grid")
    grid = MapGrid.of(cells, tile_l0=(448, 446), tile_px=(224, 223))
    assert grid.cell_l0 == (64.0, 64.0)
    assert grid.first_centre_l0 == (32.0, 1.0)


def test_every_coverage_code_has_its_place_in_the_merge() -> None:
    assert sorted(COVERAGE_MERGE_ORDER) == sorted(Coverage)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["complete", "complete"], 0),
        (["complete", "duplicate"], 0),
        (["complete", "gaps"], 1),
        (["failed", "complete"], 1),
        (["complete", "interrupted"], 130),
    ],
)
def test_the_exit_code_follows_the_images(states: list[str], code: int) -> None:
    images = tuple(ImageReport.model_validate({"image": str(i), "status": s}) for i, s in enumerate(states))
    assert RunReport(images=images, pool="serial", seconds=1.0, versions={}).exit_code == code


@pytest.mark.parametrize(
    "kind",
    [errors.SpecError, errors.SourceError, errors.ModelError, errors.StoreError, errors.WorkerLostError],
)
def test_errors_survive_pickling(kind: type[errors.GigacamError]) -> None:
    error = pickle.loads(pickle.dumps(kind("a.svs: found 3, expected 4; do this")))
    assert type(error) is kind
    assert error.message == str(error) == "a.svs: found 3, expected 4; do this"
    assert error.retryable is (kind is errors.WorkerLostError)
