from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.heatmap import Coverage
from workers.export.figure import colours
from workers.export.overlay import compose, heat_alpha, heat_rgba, level_for, outline, place
from workers.stitching.grid import heatmap_grid


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 16),
    st.integers(0, 3),
    st.integers(1, 37),
    st.data(),
)
def test_a_hot_pixel_is_drawn_where_it_lies(
    height: int, width: int, downsample: int, level: int, step: int, data: st.DataObject
) -> None:
    """Odd sizes, any pyramid level and picture pixel, against the definition one pixel at a time."""
    heat_l0 = downsample * 2**level
    heat = np.zeros([-(-n // heat_l0) for n in (height, width)], np.float32)
    hot = tuple(data.draw(st.integers(0, n - 1)) for n in heat.shape)
    heat[hot] = 1
    shape = [-(-n // step) for n in (height, width)]
    placed = place(heat, (heat_l0, heat_l0), shape, (step, step))
    for at in np.ndindex(*shape):
        under = tuple(
            min(int((i + 0.5) * step // heat_l0), n - 1) for i, n in zip(at, heat.shape, strict=True)
        )
        assert placed[at] == (under == hot)


@pytest.mark.parametrize("step", [3, 4, 5, 8])
@pytest.mark.parametrize("at_l0", [(3, 7), (2001, 1500), (3990, 3060)])
def test_registration_on_an_odd_sized_slide_at_every_picture_size(step: int, at_l0: tuple[int, int]) -> None:
    grid = heatmap_grid((4003, 3067), 4)
    level = level_for(len(grid.levels), grid.downsample, (step, step))
    heat_l0 = 4 * 2**level
    heat = np.zeros(grid.levels[level], np.float32)
    heat[tuple(a // heat_l0 for a in at_l0)] = 1
    shape = [-(-n // step) for n in grid.shape_l0]
    placed = place(heat, (heat_l0, heat_l0), shape, (step, step))
    drawn = compose(
        np.full((*shape, 3), 200, np.uint8), placed, np.full(shape, 1, np.uint8), (-1, 1), True, colours(True)
    )
    hot = np.argwhere(drawn[..., 0].astype(int) - drawn[..., 2] > 100)
    found = hot.mean(axis=0) + 0.5
    start = np.array(at_l0) // heat_l0 * heat_l0
    stop = np.minimum(start + heat_l0, grid.shape_l0)
    assert np.abs(found - (start + stop) / 2 / step).max() <= 1


def test_the_level_is_the_finest_that_leaves_no_heat_between_picture_pixels() -> None:
    assert [level_for(5, (8, 8), (p, p)) for p in (1, 8, 8.1, 16, 31.9, 32, 1000)] == [0, 0, 1, 1, 2, 2, 4]
    assert level_for(5, (8, 4), (32, 8)) == 2


@given(st.integers(1, 5000), st.integers(1, 16), st.integers(1, 40))
def test_no_heat_pixel_is_skipped(size: int, downsample: int, step: int) -> None:
    heat_l0 = downsample * 2 ** level_for(9, (downsample,), (step,))
    heat = np.arange(-(-size // heat_l0))
    drawn = place(heat[:, None], (heat_l0, 1), (-(-size // step), 1), (step, 1))[:, 0]
    # The last one may reach less than half a picture pixel into the image.
    assert set(heat[:-1]) <= set(drawn)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def codes_of(code: Coverage) -> np.ndarray:
    return np.full((40, 60), code, np.uint8)


NOWHERE = np.full((40, 60), np.nan, np.float32)


@pytest.mark.parametrize("code", [Coverage.BACKGROUND, Coverage.OUTSIDE])
def test_background_is_the_untouched_slide(picture: np.ndarray, code: Coverage) -> None:
    drawn = compose(picture, NOWHERE, codes_of(code), (-1, 1), True, colours(True))
    np.testing.assert_array_equal(drawn, picture)


def test_a_value_of_zero_leaves_the_tissue_as_it_is_inside_the_outline(picture: np.ndarray) -> None:
    codes = codes_of(Coverage.BACKGROUND)
    codes[10:30, 10:50] = Coverage.EVALUATED
    values = np.where(codes == Coverage.EVALUATED, np.float32(0), NOWHERE)
    drawn = compose(picture, values, codes, (-1, 1), True, colours(True))
    np.testing.assert_array_equal(drawn[11:29, 11:49], picture[11:29, 11:49])
    ring = outline(codes == Coverage.EVALUATED, 1)
    assert ring.sum() == 2 * 40 + 2 * 18
    assert (drawn[ring] <= picture[ring] * 0.46 + 1).all()
    np.testing.assert_array_equal(drawn[codes == 3], picture[codes == 3])


def test_failed_left_out_and_pending_look_different_and_carry_no_heat(picture: np.ndarray) -> None:
    looks = {c: compose(picture, NOWHERE, codes_of(c), (-1, 1), True, colours(True)) for c in Coverage}
    failed = looks[Coverage.FAILED].astype(int)
    lines = (failed == 20).all(axis=-1)
    assert 0.1 < lines.mean() < 0.3
    assert np.ptp(failed[~lines].mean(axis=0)) < 5
    np.testing.assert_allclose(looks[Coverage.LEFT_OUT], picture * 0.72, atol=0.51)
    tinted = looks[Coverage.PENDING].astype(int)
    assert (tinted[..., 2] >= tinted[..., 0] - 110).all()
    assert len({look.tobytes() for look in looks.values()}) == 4  # those three, and the untouched slide


def test_a_failed_box_has_an_outline(picture: np.ndarray) -> None:
    codes = codes_of(Coverage.EVALUATED)
    codes[10:30, 20:45] = Coverage.FAILED
    values = np.where(codes == Coverage.EVALUATED, np.float32(0.0), NOWHERE)
    drawn = compose(picture, values, codes, (-1, 1), True, colours(True))
    for edge in (drawn[10, 20:45], drawn[29, 20:45], drawn[10:30, 20], drawn[10:30, 44]):
        assert (edge == 20).all()


@given(st.floats(0, 1), st.floats(0, 1))
def test_opacity_grows_with_strength_and_never_hides_the_tissue(a: float, b: float) -> None:
    low, high = heat_alpha(np.array(sorted((a, b))))
    assert 0 <= low <= high <= 0.86
    assert heat_alpha(np.array(0.05)) == 0


@pytest.mark.parametrize(("signed", "window"), [(True, (-2.0, 2.0)), (False, (0.0, 2.0))])
def test_values_beyond_the_window_keep_the_end_colour_and_nan_is_clear(
    signed: bool, window: tuple[float, float]
) -> None:
    values = np.array([[window[0], window[1], 99, -99, np.nan]], np.float32)
    low, high, above, below, nowhere = heat_rgba(values, window, signed, colours(signed))[0]
    np.testing.assert_array_equal(above, high)
    np.testing.assert_array_equal(below, low)
    assert nowhere[3] == 0
    assert high[3] == pytest.approx(0.85)
    assert low[3] == pytest.approx(0.85 if signed else 0)


def test_signed_colours_are_grey_at_zero_and_orange_for_against_blue() -> None:
    table = colours(True).astype(int)
    assert table.shape == (256, 3)
    assert np.ptp(table[127:129]) <= 3
    assert table[255, 0] > 200 > 20 > table[255, 2]
    assert table[0, 2] > 150 > 20 > table[0, 0]
