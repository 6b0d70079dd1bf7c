"""Procedural images: pure functions of position, at any size, box and level."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.readers import identity_of, open_image

COORDINATES = "procedural:slide?width=20011&height=15013&pattern=coordinates&downsamples=1,2.001,4.016,8.086"


def l0(*bounds: tuple[int, int]) -> Box:
    return Box(frame="l0", start=tuple(a for a, _ in bounds), stop=tuple(b for _, b in bounds))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(-300, 15_200), st.integers(-300, 20_200),
    st.integers(1, 900), st.integers(1, 900), st.integers(1, 40), st.integers(1, 40),
)  # fmt: skip
def test_coordinates_are_exact_at_every_level(
    level: int, y: int, x: int, dy: int, dx: int, rows: int, columns: int
) -> None:
    reader = open_image(COORDINATES)
    pixels, coverage = reader.read(l0((y, y + dy), (x, x + dx)), (rows, columns), level)
    cx = x + (np.arange(columns) + 0.5) * dx / columns
    cy = y + (np.arange(rows) + 0.5) * dy / rows
    inside = ((cy >= 0) & (cy < 15_013))[:, None] & ((cx >= 0) & (cx < 20_011))[None]
    assert np.array_equal(coverage, inside)
    grid = np.stack([np.broadcast_to(cx, inside.shape), np.broadcast_to(cy[:, None], inside.shape)])
    np.testing.assert_allclose(pixels[:, inside], grid[:, inside], rtol=1e-6)
    assert (pixels[:, ~inside] == 0).all()


def test_levels_are_as_asked() -> None:
    meta = open_image(COORDINATES).meta
    assert [level.downsample[0] for level in meta.levels] == [1, 2.001, 4.016, 8.086]
    assert (meta.channels, meta.dtype, meta.shape_l0) == (2, "float32", (15_013, 20_011))
    assert meta.levels[3].shape == (1856, 2474)
    default = open_image("procedural:slide?width=100000&height=100000").meta
    assert [level.downsample[0] for level in default.levels] == [1, 4, 16, 64, 256]


def test_volume_coordinates_are_x_y_z() -> None:
    reader = open_image("procedural:volume?shape=20,30,40&pattern=coordinates&spacing=3,2,1")
    pixels, _ = reader.read(l0((4, 8), (10, 20), (30, 40)), (4, 10, 10), 0)
    assert pixels[:, 1, 2, 3].tolist() == [33.5, 12.5, 5.5]
    assert reader.meta.spacing == (3, 2, 1)


@pytest.mark.parametrize(
    "uri",
    ["procedural:slide?width=9000&height=7000&tissue=0.4&seed=5", "procedural:volume?shape=40,90,70&seed=5"],
)
def test_a_pixel_is_the_same_whatever_box_shows_it(uri: str) -> None:
    reader, other = open_image(uri), open_image(uri)
    n = reader.meta.ndim
    start = [s // 3 for s in reader.meta.shape_l0]
    whole, _ = reader.read(l0(*((a, a + 20) for a in start)), (20,) * n, 0)
    part, _ = other.read(l0(*((a + 7, a + 15) for a in start)), (8,) * n, 0)
    assert np.array_equal(part, whole[(slice(None), *(slice(7, 15),) * n)])
    assert whole.std() > 0
    assert whole.flags.c_contiguous


@pytest.mark.parametrize("tissue", [0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("width", "height"), [(100_000, 80_000), (9000, 12_000)])
def test_about_as_much_tissue_as_asked_at_a_coarse_level(tissue: float, width: int, height: int) -> None:
    uri = f"procedural:slide?width={width}&height={height}&tissue={tissue}&seed=3"
    reader = open_image(uri)
    pixels, _ = reader.read(l0((0, height), (0, width)), (400, 500), len(reader.meta.levels) - 1)
    found = (pixels[1] < 235).mean()
    assert found == pytest.approx(tissue, abs=0.25 * tissue * (1 - tissue) + 0.02)
    assert (found == 0) == (tissue == 0)


def test_other_seeds_give_other_images() -> None:
    images = [
        open_image(f"procedural:slide?width=5000&height=5000&tissue=0.5&seed={seed}").read(
            l0((0, 5000), (0, 5000)), (200, 200), 0
        )[0]
        for seed in (1, 2)
    ]
    assert (images[0] != images[1]).mean() > 0.1


def test_identity_is_the_canonical_address() -> None:
    a = identity_of("procedural:slide?width=5000&height=4000&seed=0")
    assert a == identity_of("procedural:slide?height=4000&width=5000&tissue=0.30&downsamples=1,4,16")
    assert a != identity_of("procedural:slide?width=5000&height=4000&seed=1")


def test_a_gigantic_slide_costs_what_is_read() -> None:
    tracemalloc.start()
    reader = open_image("procedural:slide?width=100000&height=100000&tissue=1&seed=1")
    began = time.perf_counter()
    for i in range(10):
        reader.read(l0((40_000 + i, 40_224 + i), (50_000, 50_224)), (224, 224), 0)
    seconds = (time.perf_counter() - began) / 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert seconds < 0.1  # 2.5 ms on an idle core; the bound is for a crowded machine under tracemalloc


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("slide?width=10", "missing"),
        ("slide?width=10&height=ten", "invalid literal"),
        ("slide?width=10&height=10&colour=red", "no other"),
        ("slide?width=10&height=10&pattern=stripes", "stripes"),
        ("slide?width=10&height=10&downsamples=2,4", "the first is 1"),
        ("slide?width=0&height=10", "at least 1"),
        ("slide?width=10&height=10&mpp=90", "implausible"),
        ("volume?shape=3,4", "three sizes"),
        ("volume?shape=3,4,5&spacing=1,1,0", "above 0"),
        ("movie?width=10", "unknown procedural image"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(query: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        open_image(f"procedural:{query}")


def test_explicit_spacing_overrides() -> None:
    slide = open_image("procedural:slide?width=10&height=10", ReadOptions(mpp_um=0.25))
    assert slide.meta.spacing == (0.25, 0.25)
    volume = open_image("procedural:volume?shape=3,4,5", ReadOptions(spacing_mm=(4, 5, 6)))
    assert volume.meta.spacing == (4, 5, 6)


def test_constant_patterns() -> None:
    slide = open_image("procedural:slide?width=100&height=100&pattern=constant")
    pixels, _ = slide.read(l0((0, 50), (0, 60)), (5, 6), 0)
    assert pixels.shape == (3, 5, 6)
    assert [len(np.unique(channel)) for channel in pixels] == [1, 1, 1]
    volume = open_image("procedural:volume?shape=9,9,9&pattern=constant")
    assert (volume.read(l0((0, 9), (0, 9), (0, 9)), (9, 9, 9), 0)[0] == 100).all()
