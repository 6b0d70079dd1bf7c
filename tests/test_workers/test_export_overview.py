from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from schemas.geometry import Box
from schemas.heatmap import Coverage
from schemas.image import ImageMeta, LevelMeta
from schemas.run import MapGrid, TilesInfo
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from workers.export import contact, words
from workers.export.overlay import compose
from workers.export.overview import overview_figure, write_overview
from workers.export.planes import VIEWS, position_words
from workers.readers.opening import open_image
from workers.readers.region import read_region
from workers.store.heatmap import HeatmapStore

SLIDE = "procedural:slide?width=1201&height=1603&tissue=0.4&seed=3"
PREDICTED = SIGNED.model_copy(update={"target": "predicted", "target_index": None, "unit": "logit/cell"})


def tiles_of(*methods: str, axes: int = 2) -> TilesInfo:
    """Only what a legend asks of it."""
    grid = MapGrid(
        shape=(7,) * axes, cell_px=(32.0,) * axes, first_centre_px=(16.0,) * axes,
        cell_l0=(64.0,) * axes, first_centre_l0=(32.0,) * axes, source="grid",
    )  # fmt: skip
    return cast("TilesInfo", SimpleNamespace(grids=dict.fromkeys(methods, grid)))


def all_texts(figure: Figure) -> str:
    found = [t.get_text() for t in figure.texts]
    found += [t.get_text() for axes in figure.axes for t in axes.texts]
    return " ".join(found)


class ArrayReader:
    """A slide of one level held in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.meta = ImageMeta(
            uri="array", stem="array", identity="c" * 64, kind="slide", format="array", channels=3,
            dtype="uint8", levels=(LevelMeta(shape=pixels.shape[1:], downsample=(1.0, 1.0)),),
            spacing=(0.5, 0.5), spacing_source="test",
        )  # fmt: skip

    def read(self, box_l0: Box, shape_px: tuple[int, ...], level: int) -> tuple[Any, Any]:
        return read_region(self.meta, self._fetch, box_l0, shape_px, level)

    def _fetch(self, level: int, start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[Any, Any]:
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return self.pixels[(slice(None), *region)], tuple(map(float, start))

    def close(self) -> None:
        self.pixels = self.pixels[:, :0]


@pytest.mark.parametrize("shape", [(1501, 1003), (601, 1803)], ids=["beside", "below"])
def test_heat_lies_on_what_it_belongs_to_in_the_finished_picture(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """A black square in the slide and heat on the same level-0 pixels, found again in the rendered page."""
    square = (slice(352, 400), slice(816, 864))
    pixels = np.full((3, *shape), 235, np.uint8)
    pixels[(slice(None), *square)] = 0
    reader = ArrayReader(pixels)
    heat = np.zeros([-(-n // 8) for n in shape], np.float32)
    heat[44:50, 102:108] = 5
    store = made_heatmap(tmp_path / "a" / "h.ome.zarr", reader.meta, 8, heat[None])
    figure = overview_figure(reader, store)
    canvas = cast("Any", figure.canvas)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    marks = (page.max(axis=-1) < 60, page[..., 0] - page[..., 2] > 60)  # black; orange
    for axes, mark in zip(figure.axes[:2], marks, strict=True):
        box = axes.get_window_extent()
        top, left = page.shape[0] - round(box.y1), round(box.x0)
        part = mark[top : page.shape[0] - round(box.y0), left : round(box.x1)]
        above_scale_bar = part[4 : int(part.shape[0] * 0.85), 4:-4]
        found = np.argwhere(above_scale_bar).mean(axis=0) + 4.5
        expected = [(s.start + s.stop) / 2 / n * p for s, n, p in zip(square, shape, part.shape, strict=True)]
        np.testing.assert_allclose(found, expected, atol=1.5)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, HeatmapStore]]:
    """Six channels and every kind of coverage, under a long name."""
    reader = open_image(SLIDE)
    shape = (101, 76)
    values = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    values[0] *= 1e-5
    values[1] = np.abs(values[1])
    codes = np.full(shape, Coverage.EVALUATED, np.uint8)
    codes[:10], codes[20:30, 20:30], codes[60:, :20] = Coverage.PENDING, Coverage.FAILED, Coverage.LEFT_OUT
    codes[90:] = Coverage.BACKGROUND
    values[:, codes != Coverage.EVALUATED] = np.nan
    channels = (PREDICTED, UNSIGNED, SIGNED, SIGNED, UNSIGNED, PREDICTED)
    folder = tmp_path_factory.mktemp("many") / ("a_rather_long_name_" * 3 + "-1234abcd")
    folder.mkdir()
    yield reader, made_heatmap(folder / "h.ome.zarr", reader.meta, 16, values, codes, channels)
    reader.close()


def test_everything_one_has_to_know_is_written(many: tuple[Any, HeatmapStore]) -> None:
    reader, store = many
    text = all_texts(overview_figure(reader, store, tiles_of("hirescam")))
    for wanted in (
        "For research use only. Not for use in diagnostic procedures.",
        "a_rather_long_name_",
        "1201 × 1603 pixels of 0.5 µm",
        "logit per cell, × 10⁻",
        "no unit",
        "Target: tumour",
        "Target: the class predicted for each tile",
        "99.5 % of |value| over all",
        "99.5 % of values over all",
        "Orange speaks for the target, blue against it",
        "Native CAM cell 32 µm (7 × 7 cells a tile)",
        "All values: ",
        "failed: no value",
        "left out by choice",
        "background: not evaluated",
        "not computed yet",
        "Not drawn here: layercam:tumour, hirescam:predicted",
        "100 µm",
    ):
        assert wanted in text, wanted


def inner(box: Bbox) -> Bbox:
    return box.shrunk(0.98, 0.98)


@pytest.mark.parametrize("count", [1, 4])
def test_no_text_is_cropped_or_overlaps(many: tuple[Any, HeatmapStore], count: int) -> None:
    reader, store = many
    figure = overview_figure(reader, store, tiles_of("hirescam", "layercam"), range(count))
    canvas = cast("Any", figure.canvas)
    renderer = canvas.get_renderer()
    texts = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.texts]
    ticks = [
        (t.get_text(), t.get_window_extent(renderer))
        for axes in figure.axes
        for t in axes.get_xticklabels()
        if t.get_text()
    ]
    for name, box in texts + ticks:
        assert figure.bbox.x0 <= box.x0, name
        assert box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0, name
        assert box.y1 <= figure.bbox.y1, name
    for (a, first), (b, second) in combinations(texts + ticks, 2):
        assert not (inner(first).overlaps(inner(second))), (a, b)
    for axes in figure.axes:
        for name, box in texts:
            assert not axes.get_window_extent().overlaps(inner(box)), name


def test_a_legend_names_only_what_occurs_and_says_so_when_nothing_does(tmp_path: Path) -> None:
    reader = open_image(SLIDE)
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 16, np.full((1, 101, 76), np.nan, np.float32))
    text = all_texts(overview_figure(reader, store))
    assert "Nothing was evaluated" in text
    assert "background: not evaluated (100.0 %)" in text
    for absent in (
        "failed",
        "left out",
        "not computed",
        "evaluated: outlined",
        "Native CAM cell",
        "Not drawn",
    ):
        assert absent not in text


def test_before_publishing_the_window_is_that_of_what_is_drawn(tmp_path: Path) -> None:
    reader = open_image(SLIDE)
    heat = np.ones((1, 101, 76), np.float32)
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 16, heat, publish=False)
    text = all_texts(overview_figure(reader, store))
    assert "over the resolution drawn here" in " ".join(text.split())
    assert "This heatmap is not complete yet." in text


def test_a_large_slide_is_never_read_at_its_finest_heat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_image("procedural:slide?width=8000&height=4000&tissue=0.05&seed=1")
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 4, np.zeros((1, 1000, 2000), np.float32))
    used = []
    image = store.image

    def counted(level: int) -> Any:
        used.append(level)
        return image(level)

    monkeypatch.setattr(store, "image", counted)
    overview_figure(reader, store)
    assert used == [1]  # 8 level-0 px a heatmap px, 5 a picture px


def test_the_file_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    reader = open_image("procedural:slide?width=300&height=200")
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 16, np.ones((1, 13, 19), np.float32))
    first = write_overview(tmp_path / "a.png", reader, store).read_bytes()
    assert first == write_overview(tmp_path / "b.png", reader, store).read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"diagnostic" in first
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture(params=[1, 3], ids=["ds1", "ds3"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, HeatmapStore, np.ndarray]:
    """An LAS file with one hot voxel to the patient's right, front and top; spacing 1, 2, 4 mm (x, y, z)."""
    affine = np.array([[-1.0, 0, 0, 40], [0, 2, 0, -30], [0, 0, 4, 10], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).integers(0, 99, (61, 37, 22)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "v.nii.gz")
    reader = open_image(str(tmp_path / "v.nii.gz"))
    ds = request.param
    heat = np.zeros([-(-n // ds) for n in reader.meta.shape_l0], np.float32)
    at = tuple(int(n * share) for n, share in zip(heat.shape, (0.8, 0.75, 0.9), strict=True))
    heat[at] = -7
    store = made_heatmap(tmp_path / "v-1" / "h.ome.zarr", reader.meta, ds, heat[None])
    return reader, store, (np.array(at) + 0.5) * ds / reader.meta.shape_l0


def test_planes_are_radiological_at_physical_aspect_through_the_strongest_voxel(
    volume: tuple[Any, HeatmapStore, np.ndarray],
) -> None:
    reader, store, share = volume
    figure = overview_figure(reader, store, tiles_of("hirescam", axes=3))
    mm = [n * s for n, s in zip(reader.meta.shape_l0, reader.meta.spacing, strict=True)]
    for axes, view in zip(figure.axes[:3], VIEWS, strict=True):
        box = axes.get_window_extent()
        assert box.height / box.width == pytest.approx(mm[view.rows] / mm[view.columns], rel=1e-3)
        picture = np.asarray(axes.images[0].get_array()).astype(int)
        hot = np.argwhere(picture[..., 2] - picture[..., 0] > 60) + 0.5  # blue: the value is negative
        found = hot.mean(axis=0) / picture.shape[:2]
        # Right, front and head are at the left, top and top.
        np.testing.assert_allclose(found, [1 - share[view.rows], 1 - share[view.columns]], atol=0.01)
        assert [t.get_text() for t in axes.texts][:4] == list(view.edges)
    assert (VIEWS[0].edges, VIEWS[2].edges) == (("R", "L", "A", "P"), ("A", "P", "S", "I"))
    text = all_texts(figure)
    assert "For research use only" in text
    assert "strongest voxel: −7 at" in text
    voxel = share * reader.meta.shape_l0
    assert position_words(reader.meta, voxel.tolist()) in text
    world = np.asarray(reader.meta.affine) @ [*(voxel[::-1] - 0.5), 1]
    assert position_words(reader.meta, voxel.tolist()).startswith(f"R\N{NO-BREAK SPACE}{world[0]:.1f}")


def test_a_volume_without_orientation_has_no_letters_and_one_without_values_no_peak(tmp_path: Path) -> None:
    source = open_image("procedural:volume?shape=20,30,40")
    meta = source.meta.model_copy(update={"affine": None})
    reader = cast("Any", SimpleNamespace(meta=meta, read=source.read))
    store = made_heatmap(tmp_path / "h.ome.zarr", meta, 2, np.full((1, 10, 15, 20), np.nan, np.float32))
    figure = overview_figure(reader, store)
    assert "No voxel was evaluated" in all_texts(figure)
    assert [t.get_text() for t in figure.axes[1].texts] == []


@given(st.floats(1e-3, 1e6))
def test_scale_bars_have_round_lengths(most: float) -> None:
    size = words.nice_length(most)
    assert most * 0.39 < size <= most * (1 + 1e-6)
    assert float(f"{size:.0e}"[0]) in (1, 2, 5)


def test_numbers_and_lengths_are_written_for_people() -> None:
    assert words.number(-2.86e-05) == "−2.86\xa0×\xa010⁻⁵"
    assert words.number(0.25) == "0.25"
    assert (words.length(500, "um"), words.length(2000, "um"), words.length(50, "mm")) == (
        "500 µm",
        "2 mm",
        "50 mm",
    )
    assert words.sides((3.0, 1.0, 1.0), "mm") == "1 × 1 × 3 mm"
    assert [words.power_of_ten((-v, v)) for v in (1.0, 0.05, 2e-5, 3e4)] == [0, 0, -5, 4]
    assert math.isclose(2e-5 / 10 ** words.power_of_ten((0, 2e-5)), 2)


def test_a_contact_sheet_dims_what_each_map_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bag's relevance lies on every tile, the map inside on the left half alone."""
    reader = ArrayReader(np.full((3, 160, 240), 235, np.uint8))
    heat = np.ones((2, 20, 30), np.float32)
    inside = np.full((20, 30), Coverage.EVALUATED, np.uint8)
    inside[:, 15:], heat[1, :, 15:] = Coverage.LEFT_OUT, np.nan
    channels = (SIGNED.model_copy(update={"bag_method": "contribution"}), SIGNED)
    store = made_heatmap(
        tmp_path / "a" / "h.ome.zarr", reader.meta, 8, heat, channels=channels, inside=inside
    )
    drawn = []

    def seen(picture: Any, values: Any, coverage: Any, *rest: Any) -> Any:
        drawn.append(set(np.unique(coverage[:, 120:]).tolist()))
        return compose(picture, values, coverage, *rest)

    monkeypatch.setattr(contact, "compose", seen)
    contact.write_contact_sheet(tmp_path / "sheet.png", reader, reader, store, (), {})
    assert drawn == [{Coverage.EVALUATED}, {Coverage.LEFT_OUT}]
