"""Where tiles lie: sizes, counts, edges and levels, against the rules written out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SpecError
from schemas.grid import GridSpec, Lattice
from schemas.image import LevelMeta
from workers.tiling.positions import all_indices, boxes, make_lattice
from workers.tiling.touching import tiles_touching


def levels(shape: tuple[int, ...], *downsamples: float) -> tuple[LevelMeta, ...]:
    return tuple(
        LevelMeta(shape=tuple(max(1, int(n / d)) for n in shape), downsample=(d,) * len(shape))
        for d in (1.0, *downsamples)
    )


def lattice_of(
    shape: tuple[int, ...], tile: int, overlap: float, edge: Literal["shift", "pad"] = "shift"
) -> Lattice:
    n = len(shape)
    grid = GridSpec(tile_px=(tile,) * n, spacing=(1.0,) * n, overlap=overlap, edge=edge)
    return make_lattice("image", levels(shape), (1.0,) * n, grid)


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(1, 50), min_size=2, max_size=3).map(tuple),
    tile=st.integers(4, 40),
    overlap=st.floats(0, 0.9),
    edge=st.sampled_from(["shift", "pad"]),
)
def test_every_pixel_is_in_a_tile_and_none_is_wasted(
    shape: tuple[int, ...], tile: int, overlap: float, edge: Literal["shift", "pad"]
) -> None:
    lattice = lattice_of(shape, tile, overlap, edge)
    found = boxes(lattice, all_indices(lattice))
    seen = np.zeros(shape, bool)
    for start, stop in found:
        assert (stop - start == tile).all()
        assert (start >= 0).all()
        assert (start < np.array(shape)).all()
        seen[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
        if edge == "shift":
            assert all(b <= max(n, tile) for b, n in zip(stop, shape, strict=True))
    assert seen.all()
    assert len(np.unique(found.reshape(len(found), -1), axis=0)) == len(found)


def test_far_tiles_come_from_the_index_not_from_added_strides() -> None:
    # 224 px at 0.5 um on a slide of 0.2527 um: 443.2 level-0 px, rounded once.
    grid = GridSpec(tile_px=(224, 224), spacing=(0.5, 0.5))
    lattice = make_lattice("slide", levels((100_003, 100_003)), (0.2527, 0.2527), grid)
    assert lattice.tile_l0 == (443, 443)
    index = np.array([[200, 100]])
    np.testing.assert_array_equal(boxes(lattice, index)[0, 0], [200 * 443, 100 * 443])
    assert lattice.size_error == pytest.approx(1 - 443 / (112 / 0.2527))


@pytest.mark.parametrize(("mpp", "level"), [(0.5, 0), (0.9, 0), (1.0, 1), (1.9, 1), (2.0, 2), (7.0, 2)])
def test_the_coarsest_level_that_is_fine_enough_is_read(mpp: float, level: int) -> None:
    grid = GridSpec(tile_px=(256, 256), spacing=(mpp, mpp))
    assert make_lattice("slide", levels((9000, 8000), 2.001, 4.016), (0.5, 0.5), grid).level == level


def test_upsampling_is_refused_and_can_be_allowed() -> None:
    grid = GridSpec(tile_px=(63, 63, 63), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(SpecError, match=r"scan\.nii.*3\.00 times finer.*--allow-upsampling"):
        make_lattice("scan.nii", levels((90, 90, 90)), (3.0, 3.0, 3.0), grid)
    lattice = make_lattice("scan.nii", levels((90, 90, 90)), (3.0, 3.0, 3.0), grid, allow_upsampling=True)
    assert lattice.upsampling == pytest.approx(3.0)
    assert lattice.tile_l0 == (21, 21, 21)


def test_a_tile_that_whole_pixels_cannot_hold_is_refused() -> None:
    grid = GridSpec(tile_px=(7, 7), spacing=(0.5, 0.5))
    with pytest.raises(SpecError, match="larger --tile"):
        make_lattice("slide", levels((900, 900)), (0.47, 0.47), grid)


def test_anisotropic_spacing_gives_tiles_of_one_physical_size() -> None:
    grid = GridSpec(tile_px=(40, 80, 80), spacing=(1.0, 1.0, 1.0))
    lattice = make_lattice("scan", levels((60, 300, 300)), (5.0, 0.8, 0.8), grid, allow_upsampling=True)
    assert lattice.tile_l0 == (8, 100, 100)


@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=20
    ),
    start=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_touching_is_sharing_a_pixel(
    boxes: list[tuple[int, int, int]], start: tuple[int, int], size: tuple[int, int]
) -> None:
    array = np.array([[[y, x], [y + n, x + n]] for y, x, n in boxes])
    stop = (start[0] + size[0], start[1] + size[1])
    wanted = np.zeros((100, 100), bool)
    wanted[start[0] : stop[0], start[1] : stop[1]] = True
    slow = [i for i, (a, b) in enumerate(array) if wanted[a[0] : b[0], a[1] : b[1]].any()]
    assert tiles_touching(array, start, stop).tolist() == slow
