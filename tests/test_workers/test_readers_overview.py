"""Overviews: exact frame, bounded memory, damaged parts told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ImageMeta
from workers.readers import open_image
from workers.readers.overview import choose_level, overview_downsample, read_overview
from workers.readers.reader import Reader

DATA = Path(__file__).parents[1] / "data"


class Counting:
    """Passes reads through; remembers the largest."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.largest_l0 = 0
        self.levels: set[int] = set()

    @property
    def meta(self) -> ImageMeta:
        return self._reader.meta

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        self.largest_l0 = max(self.largest_l0, int(np.prod(box_l0.shape)))
        self.levels.add(level)
        return self._reader.read(box_l0, shape_px, level)

    def close(self) -> None:
        self._reader.close()


def test_overview_pixels_lie_at_whole_multiples() -> None:
    uri = "procedural:slide?width=9001&height=7003&pattern=coordinates&downsamples=1,3.9,16.1&mpp=0.5"
    pixels, downsample, bad = read_overview(open_image(uri), spacing=(8.0, 8.0))
    assert downsample == (16.0, 16.0)
    assert bad == ()
    assert pixels.shape == (2, 438, 563)
    np.testing.assert_allclose(pixels[0, 0, :-1], (np.arange(562) + 0.5) * 16)
    np.testing.assert_allclose(pixels[1, :-1, 0], (np.arange(437) + 0.5) * 16)


def test_an_overview_is_the_mean_of_what_it_covers() -> None:
    """Against the whole image averaged by 16 x 16: the same picture, and less so when shifted by a pixel."""
    reader = open_image(str(DATA / "CMU-1-Small-Region.pyramid3.tiff"))
    pixels, downsample, _ = read_overview(reader, spacing=(8.0, 8.0))
    assert downsample == (16.0, 16.0)
    h, w = 2960, 2208
    full = reader.read(Box(frame="l0", start=(0, 0), stop=(h, w)), (h, w), 0)[0].astype(float)
    mean = full.reshape(3, h // 16, 16, w // 16, 16).mean(axis=(2, 4))
    got = pixels[:, : h // 16, : w // 16].astype(float)
    here = np.abs(got - mean).mean()
    assert here < 4
    for dy, dx in [(1, 0), (-1, 0), (0, 1), (0, -1)]:
        assert np.abs(np.roll(got, (dy, dx), (1, 2)) - mean).mean() > 2 * here


def test_the_coarsest_level_that_serves_is_read_in_bounded_blocks() -> None:
    reader = Counting(open_image("procedural:slide?width=60000&height=50000&mpp=0.5"))
    pixels, downsample, _ = read_overview(reader, max_px=WHOLE_IMAGE_LIMIT_PX, spacing=(16.0, 16.0))
    assert downsample == (32.0, 32.0)
    assert reader.levels == {2}
    assert reader.largest_l0 / 16**2 <= 2_000_000
    assert pixels.shape == (3, 1563, 1875)


def test_an_image_without_low_levels_is_read_in_blocks() -> None:
    reader = Counting(open_image("procedural:slide?width=9000&height=8000&downsamples=1&mpp=0.5"))
    pixels, downsample, _ = read_overview(reader, spacing=(40.0, 40.0))
    assert downsample == (80.0, 80.0)
    assert reader.largest_l0 <= 2_000_000
    assert pixels.shape == (3, 100, 113)


def test_downsample_keeps_to_the_pixel_limit_and_the_spacing() -> None:
    meta = open_image("procedural:slide?width=100000&height=100000&mpp=0.5").meta
    assert overview_downsample(meta, spacing=(64.0, 64.0)) == (128, 128)
    tight = overview_downsample(meta, max_px=1_000_000, spacing=(8.0, 8.0))
    assert (-(-100_000 // tight[0])) ** 2 <= 1_000_000 < (100_000 / (0.9 * tight[0])) ** 2
    volume = open_image("procedural:volume?shape=40,400,400&spacing=5,1,1").meta
    assert overview_downsample(volume, max_px=40 * 400 * 400) == (1, 1, 1)
    assert overview_downsample(volume, max_px=800_000)[0] == 1  # the thick axis is thinned last
    assert choose_level(meta, (15.0, 15.0)) == 1
    assert choose_level(meta, (0.5, 0.5)) == 0


def test_a_damaged_tile_leaves_a_hole_of_its_own() -> None:
    bad_reader = open_image(str(DATA / "slides_bad" / "CMU-1-Small-Region.one-bad-tile.svs"))
    pixels, downsample, bad = read_overview(bad_reader, spacing=(8.0, 8.0))
    good, _, none = read_overview(open_image(str(DATA / "CMU-1-Small-Region.svs")), spacing=(8.0, 8.0))
    assert none == ()
    hole = np.zeros(pixels.shape[1:], dtype=bool)
    for box in bad:
        y, x = (
            slice(int(a // d), int(-(-b // d)))
            for a, b, d in zip(box.start, box.stop, downsample, strict=True)
        )
        hole[y, x] = True
    assert hole[90:105, 60:75].all()  # x 960-1199, y 1440-1679 at 16 px
    assert hole.mean() < 0.05
    assert (pixels[:, hole] == 255).all()
    assert np.array_equal(pixels[:, ~hole], good[:, ~hole])


class Unreadable(Counting):
    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        msg = "this disk is gone"
        raise SourceError(msg)


def test_an_image_of_which_nothing_reads_is_an_error() -> None:
    with pytest.raises(SourceError, match=r"no part of it could be read.*this disk is gone"):
        read_overview(Unreadable(open_image(str(DATA / "small_16x16.svs"))))


def test_volumes_and_tiny_images_come_whole() -> None:
    for name in ("totalseg_ct_3mm_slab30.nii.gz", "small_16x16.svs"):
        reader = open_image(str(DATA / name))
        shape = reader.meta.shape_l0
        pixels, downsample, _ = read_overview(reader)
        assert set(downsample) == {1.0}
        whole, _ = reader.read(Box(frame="l0", start=(0,) * len(shape), stop=shape), shape, 0)
        assert np.array_equal(pixels, whole)


def test_a_last_partial_pixel_shows_the_image_not_the_background() -> None:
    uri = "procedural:slide?width=1001&height=1001&pattern=constant&mpp=0.5"
    pixels, _, _ = read_overview(open_image(uri), spacing=(8.0, 8.0))
    assert pixels.shape == (3, 63, 63)
    assert [np.unique(c).size for c in pixels] == [1, 1, 1]
