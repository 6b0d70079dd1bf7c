"""What the viewer sends of pixels: slides, heat and volumes, against plain reads of the same stores and files."""

from __future__ import annotations

import gzip
import io
from itertools import product
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.heatmap import Coverage, HeatmapSpec
from schemas.image import ReadOptions
from schemas.run import HeatmapInfo
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from tests.test_workers.store_samples import tiny_grid
from tests.test_workers.test_export_nifti import OBLIQUE, source, turned_affine
from tests.test_workers.viewer_runs import CHUNK, SLIDE, VOLUME, made_run, random_values
from workers.export.nifti import write_nifti
from workers.readers import open_image
from workers.readers.overview import choose_level
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.viewer import deepzoom, pictures, volumes
from workers.viewer.heat import Heatmaps
from workers.viewer.sources import Origin, Sources

DATA = Path(__file__).parents[1] / "data"
SVS = str(DATA / "CMU-1-Small-Region.svs")
BAD_TILE = str(DATA / "slides_bad/CMU-1-Small-Region.one-bad-tile.svs")
PATHS = [str(DATA / "boxes_4levels.tiff"),
         str(DATA / "XYC_coordinate_grid.lzw.ome.tiff"), SLIDE]  # fmt: skip


def split(body: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    n = shape[0] * shape[1]
    assert len(body) == 5 * n
    values, codes = np.frombuffer(body[: 4 * n], "<f4"), np.frombuffer(body[4 * n :], np.uint8)
    return values.reshape(shape), codes.reshape(shape)


def test_heat_tiles_are_the_store_bit_for_bit(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    store = HeatmapStore.open(folder / "heatmap.ome.zarr")
    heatmaps, tiles = Heatmaps(), 0
    assert len(store.grid.levels) == 3
    for level, shape in enumerate(store.grid.levels):
        for kind, channel in product(("mean", "peak"), (0, 1)):
            image = store.peak(level) if kind == "peak" and level else store.image(level)
            expected, codes = np.asarray(image[channel]), np.asarray(store.coverage(level, channel)[...])
            for y, x in product(*(range(-(-n // CHUNK)) for n in shape)):
                made = heatmaps.tile(store.path, channel, kind, level, y, x)  # type: ignore[arg-type]
                at = np.s_[y * CHUNK : (y + 1) * CHUNK, x * CHUNK : (x + 1) * CHUNK]
                values, coverage = split(made.body, expected[at].shape)
                assert values.tobytes() == expected[at].tobytes()
                assert np.array_equal(coverage, codes[at])
                assert np.array_equal(np.isfinite(values), coverage == Coverage.EVALUATED)
                assert store.info.run_id[:16] in made.etag
                tiles += 1
    assert tiles == 4 * (12 + 4 + 1)
    for level, y, x, channel in ((3, 0, 0, 0), (0, 99, 0, 0), (0, 0, 0, 2)):
        with pytest.raises(HTTPException) as refused:
            heatmaps.tile(store.path, channel, "mean", level, y, x)
        assert refused.value.status_code == 404


def test_a_block_that_is_not_written_is_nothing_to_keep(tmp_path: Path) -> None:
    info = HeatmapInfo(
        run_id="1" * 64, tiles_id="2" * 64, spec=HeatmapSpec(), grid=tiny_grid((40, 40)), channels=(SIGNED,),
        spacing=(0.5, 0.5), spacing_unit="um",
    )  # fmt: skip
    store = HeatmapStore.create(tmp_path / "h", info)
    heatmaps = Heatmaps()
    made = heatmaps.tile(store.path, 0, "mean", 0, 1, 1)
    values, codes = split(made.body, (8, 8))
    assert np.isnan(values).all()
    assert (codes == Coverage.PENDING).all()
    assert made.etag == ""
    block = np.arange(256, dtype=np.float32).reshape(16, 16)
    store.write_block(0, (0, 0), np.full((16, 16), Coverage.EVALUATED, np.uint8), [block])
    made = heatmaps.tile(store.path, 0, "mean", 0, 1, 1)
    assert np.array_equal(split(made.body, (8, 8))[0], block[8:, 8:])
    assert made.etag
    store.clear_blocks(np.array([[[0, 0], [4, 4]]]))
    again = heatmaps.tile(store.path, 0, "mean", 0, 1, 1)
    assert np.isnan(split(again.body, (8, 8))[0]).all()
    assert again.etag == ""


def levels_of(reader: Reader) -> list[tuple[int, int, int]]:
    """Tiles of some levels: the first, one inside, the last of an axis."""
    shape = reader.meta.shape_l0
    found, top = [], deepzoom.level_count(shape) - 1
    for level in sorted({0, 5, top - 2, top}):
        counts = [-(-n // deepzoom.TILE) for n in deepzoom.level_shape(shape, level)]
        found += [(level, y, x) for y, x in product(*({0, 1 % n, n - 1} for n in counts))]
    return found


@pytest.mark.parametrize("uri", PATHS)
def test_deep_zoom_tiles_are_plain_reads(uri: str) -> None:
    reader = open_image(uri, ReadOptions(mpp_um=0.5))
    height, width = reader.meta.shape_l0
    top = deepzoom.level_count((height, width)) - 1
    assert 2 ** (top - 1) < max(height, width) <= 2**top
    assert deepzoom.level_shape((height, width), top) == (height, width)
    assert deepzoom.level_shape((height, width), 0) == (1, 1)
    for level, y, x in levels_of(reader):
        assert deepzoom.has_tile((height, width), level, y, x)
        step = 2 ** (top - level)
        first = [max(i * 254 - 1, 0) for i in (y, x)]
        last = [min((i + 1) * 254 + 1, -(-n // step)) for i, n in zip((y, x), (height, width), strict=True)]
        shape = tuple(b - a for a, b in zip(first, last, strict=True))
        pixels, _ = deepzoom.tile_pixels(reader, level, y, x)
        assert pixels.shape[1:] == shape
        box = Box(frame="l0", start=tuple(a * step for a in first), stop=tuple(b * step for b in last))
        source_level = choose_level(reader.meta, (float(step),) * 2)
        plain, inside = reader.read(box, shape, source_level)
        # Read in parts where it is too much for one: rounded apart by a grey level at most.
        apart = np.abs(pixels[:, inside].astype(int) - plain[:, inside]).max(initial=0)
        assert apart <= int(deepzoom.needed_px(reader, level) > deepzoom.SPLIT_PX)
        picture = deepzoom.rgb(pixels, None)
        sent = np.asarray(Image.open(io.BytesIO(deepzoom.jpeg(picture))), np.int16)
        assert abs(sent.mean() - picture.mean()) < 3
    assert not deepzoom.has_tile((height, width), top + 1, 0, 0)
    assert not deepzoom.has_tile((height, width), 0, 0, 1)
    reader.close()


def test_the_last_px_of_a_level_is_no_white_fringe(tmp_path: Path) -> None:
    Image.new("RGB", (1025, 1025), (10, 20, 30)).save(tmp_path / "dark.png")
    reader = open_image(str(tmp_path / "dark.png"), ReadOptions(mpp_um=1.0))
    for level in range(deepzoom.level_count((1025, 1025))):
        n = -(-deepzoom.level_shape((1025, 1025), level)[0] // 254)
        assert (deepzoom.tile_pixels(reader, level, n - 1, n - 1)[0][0] == 10).all()


def test_a_slide_without_coarse_levels_is_seen_through_an_overview(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_image(SVS)
    origin = Origin(SVS, "s.svs", reader.meta.identity, ReadOptions())
    sources = Sources()
    monkeypatch.setattr("workers.readers.overview.OVERVIEW_PX", 40_000)
    small = sources.overview(origin, reader)
    assert small is sources.overview(origin, reader)
    assert len(small.meta.levels) == 2
    for level in (3, 6):
        direct, through = (deepzoom.tile_pixels(r, level, 0, 0)[0].astype(int) for r in (reader, small))
        assert direct.shape == through.shape
        assert np.abs(direct - through).mean() < 12


def test_a_damaged_spot_is_chequered_and_the_rest_of_its_tiles_is_drawn() -> None:
    sound, damaged = open_image(SVS), open_image(BAD_TILE)
    top = deepzoom.level_count(sound.meta.shape_l0) - 1
    counts = [-(-n // deepzoom.TILE) for n in sound.meta.shape_l0]
    lost_px = 0
    for level, places in ((top, list(product(*map(range, counts)))), (top - 4, [(0, 0)])):
        for y, x in places:
            expected, nothing = deepzoom.tile_pixels(sound, level, y, x)
            assert not nothing.any()
            try:
                pixels, lost = deepzoom.tile_pixels(damaged, level, y, x)
            except SourceError:
                lost_px += expected[0].size
                continue
            lost_px += int(lost.sum()) * 4 ** (top - level)
            # Read in parts and made smaller: rounded apart by a grey level at most.
            apart = np.abs(pixels.astype(int) - expected)[:, ~lost].max(initial=0)
            assert apart <= int(level < top)
            drawn = deepzoom.rgb(pixels, None, lost)
            assert set(np.unique(drawn[lost])) <= set(deepzoom.LOST_GREYS)
            assert (drawn == deepzoom.rgb(pixels, None))[~lost].all()
        # The file's tile is 240 px square; what is given up around it ends within the smallest part read.
        assert 240**2 <= lost_px < (240 + 2 * deepzoom.LOST_PX * 2 ** (top - level)) ** 2
        lost_px = 0
    sound.close()
    damaged.close()


def test_a_slide_of_any_numbers_is_drawn_in_one_window() -> None:
    pixels = np.array([[[0.0, 5.0, 10.0, np.nan]]], np.float32)
    assert deepzoom.rgb(pixels, (0.0, 10.0))[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize(
    "affine", [turned_affine("LPS"), turned_affine("SAR"), OBLIQUE], ids=("LPS", "SAR", "oblique")
)
@pytest.mark.parametrize("downsample", [1, (2, 3, 1)])
def test_volumes_lie_on_the_source(
    tmp_path: Path, affine: Any, downsample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "s.nii.gz", affine)
    reader = open_image(str(path))
    shape = tuple(
        -(-n // d) for n, d in zip(reader.meta.shape_l0, np.broadcast_to(downsample, 3).tolist(), strict=True)
    )
    store = made_heatmap(
        tmp_path / "h.ome.zarr", reader.meta, downsample, random_values(shape), channels=(SIGNED, UNSIGNED)
    )
    monkeypatch.setattr(volumes, "SLAB_VOXELS", 400)
    original = cast("Any", nib.load(path))
    whole = cast("Any", nib.load(write_nifti(tmp_path / "w.nii.gz", store, reader))).get_fdata()
    for name, made, expected in (
        ("source", volumes.source_nifti(reader), original.get_fdata()),
        ("heat0", volumes.heat_nifti(reader, store, 0), whole[..., 0]),
        ("heat1", volumes.heat_nifti(reader, store, 1), whole[..., 1]),
        (
            "coverage",
            volumes.coverage_nifti(reader, store, 0),
            np.where(np.isfinite(whole[..., 0]), Coverage.EVALUATED, Coverage.BACKGROUND),
        ),
    ):
        parts = list(made)
        sent = tmp_path / f"{name}.nii.gz"
        sent.write_bytes(b"".join(parts))
        image = cast("Any", nib.load(sent))
        assert np.array_equal(image.affine, original.affine)
        assert image.shape == original.shape
        assert np.array_equal(image.get_fdata(), expected, equal_nan=True)
        assert b"Jane" not in gzip.decompress(sent.read_bytes())
    monkeypatch.setattr(volumes, "MOST_VOXELS", 1000)
    with pytest.raises(HTTPException) as refused:
        volumes.source_nifti(reader)
    assert refused.value.status_code == 413


@pytest.mark.parametrize(
    ("sform", "qform", "unit", "spacing"),
    [(0, 0, "mm", None), (1, 3, "mm", None), (2, 1, "micron", None), (0, 0, "micron", (3.0, 2.0, 1.5))],
    ids=("no orientation", "two placements", "micrometres", "spacing told"),
)
def test_a_volume_is_placed_once_and_in_mm(
    tmp_path: Path, sform: int, qform: int, unit: str, spacing: tuple[float, float, float] | None
) -> None:
    path = tmp_path / "s.nii.gz"
    affine = turned_affine("LPS")
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(7, 5, 6)).astype(np.float32), affine)
    image.set_qform(turned_affine("PIR"), qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    reader = open_image(str(path), ReadOptions(spacing_mm=spacing))
    sent = tmp_path / "sent.nii.gz"
    sent.write_bytes(b"".join(volumes.source_nifti(reader)))
    stored, original = (cast("Any", nib.load(p)) for p in (sent, path))
    assert (int(stored.header["qform_code"]), int(stored.header["sform_code"])) == (0, 2)
    assert stored.header.get_xyzt_units()[0] == "mm"
    assert nib.aff2axcodes(stored.affine) == nib.aff2axcodes(original.affine)
    np.testing.assert_array_equal(stored.get_fdata(), original.get_fdata())
    np.testing.assert_allclose(stored.header.get_zooms(), nib.affines.voxel_sizes(stored.affine), rtol=1e-6)
    turned = nib.as_closest_canonical(stored)
    np.testing.assert_allclose(turned.affine, np.array(reader.meta.affine), rtol=1e-6, atol=1e-6)
    size = 1e-3 if unit == "micron" else 1.0
    if spacing is None:
        np.testing.assert_allclose(stored.affine[:3], original.affine[:3] * size, rtol=1e-6, atol=1e-9)
    else:
        np.testing.assert_allclose(turned.header.get_zooms(), spacing[::-1], rtol=1e-6)


def test_pictures_are_small_and_show_the_heat(tmp_path: Path) -> None:
    for uri, across in ((SLIDE, 803 / 613), (VOLUME, 28 / 36)):
        folder = made_run(tmp_path, uri, 1 if uri == VOLUME else 4)
        store = HeatmapStore.open(folder / "heatmap.ome.zarr")
        reader = open_image(uri)
        plain = pictures.thumbnail(reader, 100, None)
        hot = pictures.overlay(reader, store, 0, 100, None)
        bare = pictures.overlay(None, store, 0, 100, None)
        assert plain.shape == hot.shape
        assert 50 < max(plain.shape) <= 100
        assert plain.shape[1] / plain.shape[0] == pytest.approx(across, rel=0.1)
        assert (hot != plain).any()
        assert np.ptp(bare.reshape(-1, 3), axis=0).max() > 60
