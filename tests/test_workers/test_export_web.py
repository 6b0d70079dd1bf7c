"""State files of viewers in a browser, held against those viewers' own readers, and the layers of napari."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import jsonschema
import neuroglancer
import nibabel as nib
import numpy as np
import pytest

from schemas.errors import SourceError, SpecError
from schemas.heatmap import Coverage
from schemas.image import ReadOptions
from tests.test_workers.made_exports import heat_grid, made_context
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.layers import colour_map, heat_layers, show, source_layer
from workers.export.targets import EXPORTS, run_export
from workers.readers.arrays import array_reader
from workers.readers.reader import Reader
from workers.stitching import grid as grids

DATA = Path(__file__).resolve().parents[1] / "data"
SLIDE = "procedural:slide?width=2411&height=1803&seed=1"
URL = "http://127.0.0.1:8000/raw/0/"
HOT = (100, 31)
DOWNSAMPLE = 8


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> ExportContext:
    """Two channels, three levels."""
    values = np.zeros((2, *heat_grid((1803, 2411), DOWNSAMPLE)), np.float32)
    values[:, :3] = np.nan
    values[(slice(None), *HOT)] = 9
    channels = [SIGNED, UNSIGNED]
    folder = tmp_path_factory.mktemp("slide") / "image"
    with patch.dict(grids.CHUNK, {2: 128}), patch.dict(grids.SHARD, {2: 256}):
        return made_context(folder, SLIDE, DOWNSAMPLE, values, channels=channels, options={"url": URL})


def oblique(tmp_path: Path) -> Path:
    affine = np.array([[1.9, 0.3, -0.1, -20], [-0.25, 2.1, 0.4, 7], [0.2, -0.3, 2.9, 31], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 99, (12, 10, 9)).astype(np.int16), affine)
    nib.save(image, tmp_path / "v.nii.gz")
    return tmp_path / "v.nii.gz"


def test_neuroglancers_client_takes_the_state(slide: ExportContext) -> None:
    (path,) = run_export(EXPORTS["neuroglancer"], slide)
    said = json.loads(path.read_text())
    state = neuroglancer.ViewerState(said)
    assert [layer.name for layer in state.layers] == [c.label for c in slide.info.channels]
    assert state.layers[0].layer.source[0].url == f"{URL}image/heatmap.ome.zarr/|zarr3:"
    assert [layer.visible for layer in state.layers] == [True, False]
    assert neuroglancer.parse_url(neuroglancer.to_url(state)).to_json() == state.to_json()
    np.testing.assert_allclose(state.dimensions.scales, [s * 1e-6 for s in slide.info.spacing[::-1]])
    assert state.dimensions.names == ("x", "y")
    # NGFF's origin is the centre of the source's level-0 px 0; the middle lies half the other px away.
    np.testing.assert_allclose(state.position, [(2411 - 1) / 2, (1803 - 1) / 2])
    assert said["gigacam"]["run_id"] == slide.info.run_id
    assert "For research use only" in said["title"]

    for layer, row in zip(said["layers"], slide.info.channels, strict=True):
        assert "isnan(value)" in layer["shader"]
        stops = np.array(re.findall(r"vec3\(([\d.]+), ([\d.]+), ([\d.]+)\)", layer["shader"]), float)
        at = np.linspace(0, 1, 256)
        drawn = np.stack([np.interp(at, np.linspace(0, 1, len(stops)), band) for band in stops.T], axis=1)
        assert abs(255 * drawn - colours(row.signed)).max() < 3
    assert said["layers"][0]["shaderControls"]["heat"]["range"] == list(slide.info.display[0])


def test_vitessce_is_told_where_the_corner_is(slide: ExportContext) -> None:
    (path,) = run_export(EXPORTS["vitessce"], slide)
    said = json.loads(path.read_text())
    jsonschema.validate(said, json.loads((DATA / "vitessce-1.0.17.schema.json").read_text()))
    (file,) = said["datasets"][0]["files"]
    assert file["url"] == f"{URL}image/heatmap.ome.zarr"
    back = file["options"]["coordinateTransformations"][0]["translation"]
    own = dict(json.loads((slide.heatmap.path / "zarr.json").read_text()))["attributes"]["ome"][
        "multiscales"
    ][0]
    scale, shift = (
        t[k]
        for t, k in zip(
            own["datasets"][0]["coordinateTransformations"], ("scale", "translation"), strict=True
        )
    )
    # Vitessce draws px i from i * scale + translation; the heatmap's corner is the source's.
    corner = [s * h + t + b for s, h, t, b in zip(scale[1:], HOT, shift[1:], back[1:], strict=True)]
    np.testing.assert_allclose(
        corner, [h * DOWNSAMPLE * s for h, s in zip(HOT, slide.info.spacing, strict=True)]
    )
    assert "For research use only" in said["description"]
    space = said["coordinationSpace"]
    for view in said["layout"]:
        for kind, scope in view["coordinationScopes"].items():
            assert all(s in space[kind] for s in ([scope] if isinstance(scope, str) else scope))
    for name, scopes in space["metaCoordinationScopesBy"]["heat"].items():
        for kind, by in scopes.items():
            assert set(by) == set(space[name])
            assert {s for v in by.values() for s in ([v] if isinstance(v, str) else v)} <= set(space[kind])
    assert space["spatialLayerColormap"] == {"0": "rdbu", "1": "viridis"}


@pytest.mark.parametrize("url", ["", "ftp://host/x", "out"])
@pytest.mark.parametrize("name", ["neuroglancer", "vitessce"])
def test_an_address_is_needed(slide: ExportContext, name: str, url: str) -> None:
    options = slide.options.model_copy(update={"url": url})
    with pytest.raises(SpecError, match="--url"):
        run_export(EXPORTS[name], ExportContext.open(slide.folder, options))


def world(arguments: dict[str, Any], index: Sequence[float]) -> np.ndarray:
    """Where napari places a px: the affine over scale and translation."""
    place = np.array(arguments.get("scale", 1.0)) * index + arguments.get("translate", 0.0)
    return np.asarray(nib.affines.apply_affine(arguments.get("affine", np.eye(len(index) + 1)), place))


def test_napari_layers_lie_on_the_slide_and_are_lazy(slide: ExportContext) -> None:
    heat = heat_layers(slide)
    assert [kind for _, _, kind in heat] == ["image", "image", "labels"]
    levels, arguments, _ = heat[0]
    assert [level.shape for level in levels] == [tuple(s) for s in slide.info.grid.levels]
    assert levels[0][HOT].compute() == 9
    assert np.isnan(levels[0][0, 0].compute())
    planted_um = [((h + 0.5) * DOWNSAMPLE - 0.5) * s for h, s in zip(HOT, slide.info.spacing, strict=True)]
    np.testing.assert_allclose(world(arguments, HOT), planted_um)
    assert arguments["contrast_limits"] == slide.info.display[0]
    assert (arguments["units"], arguments["visible"]) == (("um", "um"), True)
    assert arguments["metadata"]["gigacam"]["run_id"] == slide.info.run_id

    with slide.source() as reader:
        reads = []

        def read(*asked: Any) -> Any:
            reads.append(asked)
            return reader.read(*asked)

        spied = cast("Reader", SimpleNamespace(meta=reader.meta, read=read))
        pyramid, own, kind = source_layer(spied, "slide")
        assert not reads, "nothing is read before it is shown"
        assert (kind, own["rgb"]) == ("image", True)
        assert [p.shape for p in pyramid] == [(1803, 2411, 3), (902, 1206, 3), (451, 603, 3)][: len(pyramid)]
        shown = pyramid[0][1000:1010, 2000:2010].compute()
        whole, _ = reader.read(*reads[0])
        assert len(reads) == 1
        np.testing.assert_array_equal(shown, np.moveaxis(whole, 0, -1)[1000 - reads[0][0].start[0] :, 2000 - reads[0][0].start[1] :][:10, :10])  # fmt: skip
        # the heat px's centre, as an index of the slide at full resolution
        index = [(h + 0.5) * DOWNSAMPLE - 0.5 for h in HOT]
        np.testing.assert_allclose(world(own, index), planted_um)


def test_napari_layers_of_an_oblique_volume_lie_in_the_patient(tmp_path: Path) -> None:
    path = oblique(tmp_path)
    hot, downsample = (1, 2, 3), 2
    values = np.zeros((1, 5, 5, 6), np.float32)
    values[(0, *hot)] = 4
    context = made_context(tmp_path / "image", path, downsample, values)
    layers = heat_layers(context)
    with context.source() as reader:
        layers.append(source_layer(reader, "volume"))
        centre = tuple((h + 0.5) * downsample - 0.5 for h in hot)
        expected = nib.affines.apply_affine(np.asarray(reader.meta.affine), centre[::-1])[::-1]
        np.testing.assert_allclose(world(layers[0][1], hot), expected)
        np.testing.assert_allclose(world(layers[-1][1], centre), expected)
        np.testing.assert_array_equal(layers[-1][0].compute(), cast("Any", nib.load(path)).get_fdata().T)
    assert layers[0][1]["units"] == ("mm",) * 3
    assert layers[0][0].shape == (5, 5, 6), "one level is no pyramid"


def test_napari_is_given_8_bits_in_one_window() -> None:
    """Floats from 0 to 1 are what it takes for colours; its own choice of a window would differ from block to block."""
    pixels = np.linspace(1_000, 60_000, 1500 * 1100).reshape(1500, 1100).astype(np.uint16)
    reader = array_reader(pixels, ReadOptions(mpp_um=0.5))
    pyramid, own, _ = source_layer(reader, "slide")
    shown = pyramid[0].compute()
    assert own["rgb"]
    assert pyramid[0].dtype == shown.dtype == np.uint8
    assert shown.shape == (1500, 1100, 3)
    low, high = np.percentile(pixels, [0.5, 99.5])
    expected = 255 * np.clip((pixels.astype(float) - low) / (high - low), 0, 1)
    assert np.abs(shown - expected[..., None]).max() < 2


def test_features_alone_have_no_source_to_show(slide: ExportContext) -> None:
    with slide.source() as reader:
        alone = cast("Reader", SimpleNamespace(meta=reader.meta.model_copy(update={"pixels": False})))
    with pytest.raises(SourceError, match="features alone have no pixels to show"):
        source_layer(alone, "slide")


def test_napari_says_why_of_maps_inside_some_tiles_too(tmp_path: Path) -> None:
    shape = heat_grid((1803, 2411), DOWNSAMPLE)
    values = np.zeros((2, *shape), np.float32)
    inside = np.full(shape, Coverage.EVALUATED, np.uint8)
    inside[HOT] = Coverage.LEFT_OUT
    values[(1, *HOT)] = np.nan
    channels = [SIGNED.model_copy(update={"bag_method": "contribution"}), SIGNED]
    context = made_context(tmp_path / "image", SLIDE, DOWNSAMPLE, values, channels=channels, inside=inside)
    labels = [(data, given["name"]) for data, given, kind in heat_layers(context) if kind == "labels"]
    assert [name.partition(":")[0] for _, name in labels] == ["coverage", "inside"]
    found = [np.asarray((data[0] if isinstance(data, list) else data)[HOT]) for data, _ in labels]
    assert found == [Coverage.EVALUATED, Coverage.LEFT_OUT]


@pytest.mark.parametrize("signed", [False, True])
def test_napari_colours_let_nothing_hide_the_tissue(signed: bool) -> None:
    table = colour_map(signed)
    assert table["colors"].shape == (256, 4)
    assert table["colors"][128 if signed else 0, 3] < 0.01
    assert table["colors"][255, 3] > 0.8
    assert table["nan_color"][3] == 0


def test_napari_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(SpecError, match=r"gigacam\[napari\]"):
        show([], "")


@pytest.mark.filterwarnings("ignore")  # napari's own
def test_napari_takes_the_layers(slide: ExportContext) -> None:
    layers = pytest.importorskip("napari.layers", reason="napari is an optional extra")
    planted = [((h + 0.5) * DOWNSAMPLE - 0.5) * s for h, s in zip(HOT, slide.info.spacing, strict=True)]
    with slide.source() as reader:
        *heat, coverage = [layers.Layer.create(*given) for given in heat_layers(slide)]
        assert [level.shape for level in heat[0].data] == [(226, 302), (113, 151), (57, 76)][
            : len(heat[0].data)
        ]
        image = layers.Layer.create(*source_layer(reader, "slide"))
        np.testing.assert_allclose(image.data_to_world([(h + 0.5) * DOWNSAMPLE - 0.5 for h in HOT]), planted)
        for made in heat:
            np.testing.assert_allclose(made.data_to_world(HOT), planted)
            at = tuple(round(v) for v in made.world_to_data(planted))
            assert np.asarray(made.data[0][at]) == 9
            assert made.colormap.map(np.array([np.nan, 1.0]))[:, 3].round(2).tolist() == [0, 0.85]
        assert np.asarray(coverage.data[0][HOT]) == 1
        assert {layer.units for layer in (image, *heat, coverage)} == {image.units}
