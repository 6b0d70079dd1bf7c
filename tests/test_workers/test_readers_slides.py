"""Slides: frames, levels, borders, pixel sizes and OpenSlide's latching errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import SourceError, SpecError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.readers import identity_of, open_image
from workers.readers.slide import SlideReader, level_origin

DATA = Path(__file__).parents[1] / "data"
BAD = DATA / "slides_bad"
MPP = ReadOptions(mpp_um=0.5)


def box(y0: int, x0: int, y1: int, x1: int) -> Box:
    return Box(frame="l0", start=(y0, x0), stop=(y1, x1))


@pytest.mark.parametrize(
    ("name", "options", "format_", "shape", "downsamples"),
    [
        ("CMU-1-Small-Region.svs", ReadOptions(), "openslide:aperio", (2967, 2220), [1]),
        ("CMU-1-Small-Region.pyramid3.tiff", ReadOptions(), "openslide:generic-tiff", (2967, 2220), [1, 2.0003, 4.0020]),
        ("CMU-1-Small-Region.wrong-mpp.tiff", MPP, "openslide:generic-tiff", (2967, 2220), [1]),
        ("boxes_4levels.tiff", MPP, "openslide:generic-tiff", (250, 300), [1, 2, 4.0161, 8.0863]),
        ("small_16x16.svs", ReadOptions(), "openslide:aperio", (16, 16), [1]),
        ("camelyon_lowres_multiframe.dcm", ReadOptions(mpp_um=28.969), "openslide:dicom", (700, 1152), [1]),
        ("sm_image_50x50.dcm", ReadOptions(), "openslide:dicom", (50, 50), [1]),
        ("XYC_coordinate_grid.png", MPP, "pillow:PNG", (512, 512), [1]),
        ("XYC_coordinate_grid.lzw.ome.tiff", MPP, "tifffile:ome", (512, 512), [1]),
        ("slides_bad/CMU-1-Small-Region.webp.tiff", MPP, "tifffile", (2967, 2220), [1]),
        ("slides_bad/CMU-1-Small-Region.one-bad-tile.svs", ReadOptions(), "openslide:aperio", (2967, 2220), [1]),
    ],
)  # fmt: skip
def test_every_slide_opens_with_its_frame(
    name: str, options: ReadOptions, format_: str, shape: tuple[int, ...], downsamples: list[float]
) -> None:
    reader = open_image(str(DATA / name), options)
    meta = reader.meta
    assert (meta.kind, meta.format, meta.shape_l0, meta.channels, meta.dtype) == (
        "slide",
        format_,
        shape,
        3,
        "uint8",
    )
    assert [level.downsample for level in meta.levels] == [
        pytest.approx((d, d), rel=1e-4) for d in downsamples
    ]
    assert meta.spacing == pytest.approx((options.mpp_um or 0.499,) * 2)
    assert meta.identity == identity_of(str(DATA / name))
    # beyond all four edges: white and not covered; inside is the image
    h, w = shape
    corner, coverage = reader.read(box(-3, -5, 97, 95), (100, 100), 0)
    assert corner.flags.c_contiguous
    assert np.array_equal(coverage, inside(-3, 97, h)[:, None] & inside(-5, 95, w)[None])
    assert (corner[:, ~coverage] == 255).all()
    far, coverage = reader.read(box(h - 16, w - 16, h + 4, w + 6), (20, 22), 0)
    assert np.array_equal(coverage, np.pad(np.ones((16, 16), bool), ((0, 4), (0, 6))))
    assert (far[:, ~coverage] == 255).all()
    assert np.array_equal(far[:, :16, :16], reader.read(box(h - 16, w - 16, h, w), (16, 16), 0)[0])
    assert corner[:, 3:, 5:].std() > 0
    again, _ = reader.read(box(-3, -5, 97, 95), (100, 100), 0)
    reader.close()
    reopened, _ = reader.read(box(-3, -5, 97, 95), (100, 100), 0)
    assert np.array_equal(again, reopened)
    reader.close()


def inside(start: int, stop: int, size: int) -> NDArray[np.bool_]:
    at: NDArray[np.bool_] = (np.arange(start, stop) >= 0) & (np.arange(start, stop) < size)
    return at


@pytest.mark.parametrize("name", ["XYC_coordinate_grid.png", "XYC_coordinate_grid.lzw.ome.tiff"])
def test_the_coordinate_grid_comes_back_exactly(name: str) -> None:
    truth = np.moveaxis(np.asarray(Image.open(DATA / "XYC_coordinate_grid.png").convert("RGB")), -1, 0)
    reader = open_image(str(DATA / name), MPP)
    for y, x in [(0, 0), (1, 3), (127, 129), (128, 256), (383, 401), (448, 448)]:
        pixels, coverage = reader.read(box(y, x, y + 64, x + 64), (64, 64), 0)
        assert np.array_equal(pixels, truth[:, y : y + 64, x : x + 64])
        assert coverage.all()
    across, coverage = reader.read(box(500, 490, 530, 520), (30, 30), 0)
    assert np.array_equal(across[:, :12, :22], truth[:, 500:, 490:])
    assert coverage.sum() == 12 * 22
    assert (across[:, ~coverage] == 255).all()
    reader.close()


def raw_levels(name: str) -> list[NDArray[np.uint8]]:
    with tifffile.TiffFile(DATA / name) as file:
        return [np.moveaxis(level.asarray(), -1, 0) for level in file.series[0].levels]


def test_level_0_equals_the_raw_pixels() -> None:
    raw = raw_levels("CMU-1-Small-Region.pyramid3.tiff")[0]
    reader = open_image(str(DATA / "CMU-1-Small-Region.pyramid3.tiff"))
    pixels, _ = reader.read(box(1003, 777, 1303, 1177), (300, 400), 0)
    assert np.array_equal(pixels, raw[:, 1003:1303, 777:1177])


@pytest.mark.parametrize("level", [1, 2])
def test_coarser_levels_equal_the_raw_level_read_as_openslide_places_it(level: int) -> None:
    """OpenSlide begins a read at a fraction of a level pixel and interpolates linearly; then we do, once.

    Both steps are written here in float64 on the raw level; tile seams lie inside the boxes.
    """
    raw = raw_levels("CMU-1-Small-Region.pyramid3.tiff")[level].astype(np.float64)
    reader = open_image(str(DATA / "CMU-1-Small-Region.pyramid3.tiff"))
    downsample = reader.meta.levels[level].downsample[0]
    n = 100
    for start in (700, 801, 1003, 1502):
        b = box(start, start, start + round(n * downsample), start + round(n * downsample))
        got, coverage = reader.read(b, (n, n), level)
        assert coverage.all()
        centres = (start + (np.arange(n) + 0.5) * (b.shape[0] / n)) / downsample
        origin = level_origin(math.floor(centres[0] - 1.5) + 1, downsample) / downsample
        assert abs(origin - round(origin)) < 0.5 / downsample + 1e-9
        places = origin + 0.5 + np.arange(n + 12)
        placed = linear(linear(raw, places, 1), places, 2)
        expected = linear(linear(placed, centres - origin, 1), centres - origin, 2)
        assert np.abs(got - expected).max() <= 4
        assert np.abs(got - expected).mean() < 0.6


def linear(values: NDArray[Any], at: NDArray[Any], axis: int) -> NDArray[np.float64]:
    low = np.clip(np.floor(at - 0.5).astype(int), 0, values.shape[axis] - 2)
    part = at - 0.5 - low
    shape = [1] * values.ndim
    shape[axis] = -1
    part = part.reshape(shape)
    result: NDArray[np.float64] = (
        np.take(values, low, axis) * (1 - part) + np.take(values, low + 1, axis) * part
    )
    return result


@pytest.mark.parametrize("level", [1, 2])
def test_the_centroid_of_a_level_does_not_move(level: int) -> None:
    """Sub-pixel: the shift between a read and the raw level, by phase of the gradient, is under 0.03 level px."""
    raw = raw_levels("CMU-1-Small-Region.pyramid3.tiff")[level].astype(np.float64).mean(axis=0)
    reader = open_image(str(DATA / "CMU-1-Small-Region.pyramid3.tiff"))
    downsample = reader.meta.levels[level].downsample[0]
    for start in (801, 1005):
        n = 160
        b = box(start, start, start + round(n * downsample), start + round(n * downsample))
        got = reader.read(b, (n, n), level)[0].astype(np.float64).mean(axis=0)
        centres = (start + (np.arange(n) + 0.5) * (b.shape[0] / n)) / downsample
        model = linear(linear(raw[None], centres, 1), centres, 2)[0]
        gy, gx = np.gradient(model)
        # least squares for d in: got = model + d . gradient
        a = np.stack([gy[2:-2, 2:-2].ravel(), gx[2:-2, 2:-2].ravel()], axis=1)
        shift = np.linalg.lstsq(a, (got - model)[2:-2, 2:-2].ravel(), rcond=None)[0]
        assert np.abs(shift).max() < 0.03


def test_levels_agree_on_where_things_are() -> None:
    """The same box through levels 0 and 2 at one pixel size: alike, and least so when shifted."""
    reader = open_image(str(DATA / "CMU-1-Small-Region.pyramid3.tiff"))
    fine = reader.read(box(800, 600, 1600, 1400), (200, 200), 0)[0].astype(float)
    coarse = reader.read(box(800, 600, 1600, 1400), (200, 200), 2)[0].astype(float)
    here = np.abs(fine - coarse).mean()
    assert here < 6
    for dy, dx in [(1, 0), (-1, 0), (0, 1), (0, -1)]:
        assert np.abs(fine - np.roll(coarse, (dy, dx), (1, 2)))[:, 2:-2, 2:-2].mean() > here


def test_levels_that_round_down_cover_the_whole_image() -> None:
    reader = open_image(str(DATA / "boxes_4levels.tiff"), MPP)
    for level in range(4):
        pixels, coverage = reader.read(box(0, 0, 250, 300), (25, 30), level)
        assert coverage.all()
        assert pixels.min() < 200
        corner, covered = reader.read(box(240, 290, 250, 300), (10, 10), level)
        assert covered.all()
        assert np.abs(corner.astype(int) - reader.read(box(240, 290, 250, 300), (10, 10), 0)[0]).max() <= 60


def test_level_origin_is_at_or_before_what_is_asked_and_nearly_whole() -> None:
    for downsample in (1.0, 2.0, 2.000337154416723, 4.002024291497976, 4.016129032258064, 8.086312118570184):
        for start in range(0, 4000, 7):
            x = level_origin(start, downsample)
            k = x / downsample
            assert start - 9 <= k <= start + 1e-9
            assert abs(k - round(k)) <= 0.5 / downsample + 1e-9


def test_reads_are_repeated_bitwise_and_do_not_depend_on_what_was_read_before() -> None:
    path = str(DATA / "CMU-1-Small-Region.pyramid3.tiff")
    first, second = open_image(path), open_image(path)
    wanted = box(701, 503, 1301, 1103)
    second.read(box(0, 0, 900, 900), (300, 300), 2)
    for level in (0, 1, 2):
        a, b = first.read(wanted, (224, 224), level)[0], second.read(wanted, (224, 224), level)[0]
        assert np.array_equal(a, b)
        assert np.array_equal(a, first.read(wanted, (224, 224), level)[0])


def test_a_bad_tile_fails_alone_and_the_next_read_reopens() -> None:
    good = open_image(str(DATA / "CMU-1-Small-Region.svs"))
    bad = open_image(str(BAD / "CMU-1-Small-Region.one-bad-tile.svs"))
    for _ in range(2):
        with pytest.raises(SourceError, match=r"one-bad-tile.*cannot be read at x 1000, y 1450 .*Not a JPEG"):
            bad.read(box(1450, 1000, 1550, 1100), (100, 100), 0)
        for b in (box(0, 0, 200, 200), box(1680, 1200, 1880, 1400), box(1240, 760, 1440, 960)):
            assert np.array_equal(bad.read(b, (200, 200), 0)[0], good.read(b, (200, 200), 0)[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CMU-1-Small-Region.truncated.svs", r"file exists \(700,000 bytes\) but is truncated or not a slide.*copy it again"),
        ("broken_not_a_tiff.svs", r"file exists \(1,001 bytes\) but is truncated or not a slide"),
        ("unreadable.svs", r"no pixel can be read \(Bogus marker length\).*copy the file again"),
        ("unopenable.tiff", r"Unsupported TIFF compression: 52479.*convert it"),
        ("CMU-1-Small-Region.webp.tiff", r"mpp 0\.00499 x 0\.00499 um/px.*TIFF resolution tags.*0\.05-20.*--mpp"),
        ("../CMU-1-Small-Region.wrong-mpp.tiff", r"mpp 0\.00499.*openslide\.mpp-x.*0\.05-20.*--mpp <um>, or a CSV"),
        ("../boxes_4levels.tiff", r"mpp 352\.778.*implausible"),
        ("../camelyon_lowres_multiframe.dcm", r"mpp 28\.969 x 28\.968.*implausible"),
        ("../XYC_coordinate_grid.png", r"no pixel size.*--mpp"),
        ("../XYC_coordinate_grid.lzw.ome.tiff", r"no pixel size.*--mpp"),
        ("not_there.svs", "no such file"),
    ],
)  # fmt: skip
def test_each_bad_slide_says_in_one_line_what_and_what_to_do(name: str, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        open_image(str(BAD / name))
    assert "\n" not in caught.value.message
    assert Path(name).name in caught.value.message


@pytest.mark.parametrize("name", ["truncated.svs", "unreadable.svs", "unopenable.tiff"])
def test_damage_is_not_cured_by_giving_a_pixel_size(name: str) -> None:
    path = next(BAD.glob(f"*{name}"))
    with pytest.raises(SourceError, match=r"truncated|no pixel can be read|compression"):
        open_image(str(path), MPP)


def test_explicit_pixel_sizes_are_bounded_and_noted() -> None:
    path = str(DATA / "CMU-1-Small-Region.svs")
    meta = open_image(path, ReadOptions(mpp_um=30.0)).meta
    assert (meta.spacing, meta.spacing_source) == ((30.0, 30.0), "--mpp")
    assert any("unusual" in note for note in meta.notes)
    assert open_image(path, ReadOptions(mpp_um=0.25)).meta.notes == ()
    for value in (0.005, 150.0):
        with pytest.raises(SourceError, match=r"outside 0\.01-100"):
            open_image(path, ReadOptions(mpp_um=value))


def test_requests_that_make_no_sense_are_refused() -> None:
    reader = open_image(str(DATA / "small_16x16.svs"))
    for b, shape, level in [
        (Box(frame="hm", start=(0, 0), stop=(4, 4)), (4, 4), 0),
        (Box(frame="l0", start=(0, 0, 0), stop=(4, 4, 4)), (4, 4, 4), 0),
        (box(0, 0, 4, 4), (4, 4), 1),
        (box(0, 0, 4, 4), (0, 4), 0),
    ]:
        with pytest.raises(SpecError):
            reader.read(b, shape, level)


def test_a_box_outside_the_image_is_all_background() -> None:
    reader = open_image(str(DATA / "small_16x16.svs"))
    pixels, coverage = reader.read(box(100, 100, 108, 108), (8, 8), 0)
    assert (pixels == 255).all()
    assert not coverage.any()


def test_alpha_is_laid_on_white(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SlideReader(DATA / "small_16x16.svs", ReadOptions())

    class Handle:
        def read_region(self, location: Any, level: int, size: tuple[int, int]) -> Image.Image:
            picture = Image.new("RGBA", size, (0, 0, 0, 0))
            picture.putpixel((0, 0), (10, 20, 30, 255))
            return picture

    monkeypatch.setattr(reader, "_open", Handle)
    pixels, coverage = reader.read(box(0, 0, 4, 4), (4, 4), 0)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert (pixels[:, 1:, 1:] == 255).all()
    assert coverage.all()


def write_tiff(path: Path, pixels: NDArray[Any], **how: Any) -> None:
    tifffile.imwrite(path, pixels, **how)


def test_a_damaged_aperio_file_under_another_suffix_is_not_given_to_tifffile(tmp_path: Path) -> None:
    """Planar, untiled and called Aperio: OpenSlide does not take it, and no other decoder is tried."""
    path = tmp_path / "claims.tif"
    write_tiff(path, np.zeros((3, 64, 64), np.uint8), planarconfig="separate", photometric="rgb",
               description="Aperio Image Library v1\n64x64|MPP = 0.5", metadata=None)  # fmt: skip
    with pytest.raises(SourceError, match=r"claims to be SVS.*truncated or damaged"):
        open_image(str(path), MPP)


def test_ome_tiff_levels_pixel_size_and_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full = rng.integers(0, 60_000, (4, 301, 203)).astype(np.uint16)
    path = tmp_path / "if.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        meta = {"axes": "CYX", "PhysicalSizeX": 0.65, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 650, "PhysicalSizeYUnit": "nm"}  # fmt: skip
        file.write(full, subifds=1, tile=(64, 64), metadata=meta, photometric="minisblack")
        file.write(full[:, ::2, ::2][:, :150, :101], subfiletype=1, tile=(64, 64), photometric="minisblack")
    reader = open_image(str(path))
    assert reader.meta.spacing == pytest.approx((0.65, 0.65))
    assert reader.meta.spacing_source == "OME PhysicalSize"
    assert [level.downsample for level in reader.meta.levels] == [(1.0, 1.0), (2.0, 2.0)]
    pixels, _ = reader.read(box(30, 40, 90, 100), (60, 60), 0)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, full[:, 30:90, 40:100].astype(np.float32))
    coarse, _ = reader.read(box(30, 40, 90, 100), (30, 30), 1)
    assert np.array_equal(coarse, full[:, 30:90:2, 40:100:2].astype(np.float32))
    reader.close()
    one = open_image(str(path), ReadOptions(channel=2))
    assert one.meta.channels == 1
    assert one.meta.identity != reader.meta.identity
    assert np.array_equal(one.read(box(0, 0, 9, 9), (9, 9), 0)[0], full[2:3, :9, :9].astype(np.float32))
    one.close()


def test_a_big_tiff_in_one_piece_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one_strip.tif"
    write_tiff(path, np.zeros((8100, 8100), np.uint8), rowsperstrip=8100, compression="zlib", planarconfig=1)
    with pytest.raises(SourceError, match=r"(pieces of 66 Mpx|OpenSlide).*tiled"):
        open_image(str(path), MPP)


@pytest.mark.parametrize(
    ("name", "keep", "said"),
    [
        ("CMU-1-Small-Region.pyramid3.tiff", 900_000, "truncated: [0-9]+ of [0-9]+ tiles"),
        ("CMU-1-Small-Region.pyramid3.tiff", 1_340_000, "damaged"),
        ("XYC_coordinate_grid.lzw.ome.tiff", 60_000, "truncated: [0-9]+ of 16 tiles"),
        ("XYC_coordinate_grid.png", 20_000, "truncated"),
        ("sm_image_50x50.dcm", 9_000, "damaged"),
        ("XYC_coordinate_grid.lzw.ome.tiff", 0, "not an image that can be read"),
    ],
)
def test_a_truncated_file_is_refused_when_opened(name: str, keep: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((DATA / name).read_bytes()[:keep])
    with pytest.raises(SourceError, match=said) as caught:
        open_image(str(path), MPP)
    assert str(path) in caught.value.message


def test_tiles_left_out_of_a_tiff_are_glass(tmp_path: Path) -> None:
    path = tmp_path / "sparse.ome.tif"
    pixels = np.full((256, 256, 3), 90, np.uint8)
    write_tiff(
        path,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages.first
        counts = list(page.databytecounts)
        page.tags["TileByteCounts"].overwrite([*counts[:3], 0])
        page.tags["TileOffsets"].overwrite([*page.dataoffsets[:3], 0])
    reader = open_image(str(path))
    whole, _ = reader.read(box(0, 0, 256, 256), (256, 256), 0)
    assert (whole[:, 128:, 128:] == 255).all()
    assert (whole[:, :128] == 90).all()
    reader.close()


def test_a_big_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    Image.new("1", (10_000, 6_401)).save(path)
    with pytest.raises(SourceError, match=r"64 Mpx can only be decoded whole"):
        open_image(str(path), MPP)


def test_a_picture_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "alpha.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    reader = open_image(str(path), MPP)
    assert (reader.read(box(0, 0, 8, 8), (8, 8), 0)[0] == 255).all()


def test_web_addresses_say_what_to_do() -> None:
    with pytest.raises(SourceError, match="download it first"):
        open_image("https://example.org/slide.svs")
