"""The resampling against its definition, written slowly in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.readers.resample import resample, separable, triangle_weights


def slow_axis(values: NDArray[Any], start: float, scale: float, count: int) -> NDArray[np.float64]:
    """One axis (the last), straight from the definition: a triangle around each output pixel's centre."""
    support = max(1.0, scale)
    out = np.zeros((*values.shape[:-1], count))
    for i in range(count):
        centre = start + (i + 0.5) * scale
        total = 0.0
        for j in range(values.shape[-1]):
            weight = max(0.0, 1 - abs(j + 0.5 - centre) / support)
            out[..., i] += weight * values[..., j]
            total += weight
        out[..., i] /= total
    return out


def slow(values: NDArray[Any], start: Any, scale: Any, shape: Any) -> NDArray[np.float64]:
    out = values.astype(np.float64)
    for axis, (a, s, n) in enumerate(zip(start, scale, shape, strict=True), start=1):
        out = np.moveaxis(slow_axis(np.moveaxis(out, axis, -1), a, s, n), -1, axis)
    return out


@st.composite
def requests(draw: st.DrawFn, ndim: int) -> tuple[Any, ...]:
    size = tuple(draw(st.integers(3, 24)) for _ in range(ndim))
    shape = tuple(draw(st.integers(1, 12)) for _ in range(ndim))
    start, scale = [], []
    for n, m in zip(size, shape, strict=True):
        a = draw(st.floats(0, n / 2))
        b = draw(st.floats(a + 0.25 * m if a + 0.25 * m < n else a + 0.01, max(n, a + 0.25 * m + 0.01)))
        start.append(a)
        scale.append(min(b, n) - a if m == 1 else (min(b, n) - a) / m)
    return size, tuple(start), tuple(scale), shape, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(requests(2))
def test_8_bit_pictures_agree_with_the_definition_to_a_grey_level(request_: tuple[Any, ...]) -> None:
    size, start, scale, shape, seed = request_
    source = np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8)
    expected = slow(source, start, scale, shape)
    got = resample(source, start, scale, shape)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.abs(got - expected).max() <= 1.01
    assert np.abs(separable(source, start, scale, shape) - expected).max() <= 0.51


@settings(max_examples=40, deadline=None)
@given(requests(3))
def test_volumes_agree_with_the_definition(request_: tuple[Any, ...]) -> None:
    size, start, scale, shape, seed = request_
    source = np.random.default_rng(seed).normal(size=(1, *size)).astype(np.float32)
    got = resample(source, start, scale, shape)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow(source, start, scale, shape), atol=2e-5)


def test_a_whole_window_at_scale_1_is_a_copy() -> None:
    source = np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    got = resample(source, (3.0, 7.0), (1.0, 1.0), (20, 30))
    assert np.array_equal(got, source[:, 3:23, 7:37])
    got[:] = 0
    assert source[:, 3:23, 7:37].any()


def test_half_a_pixel_is_the_mean_of_two() -> None:
    source = np.array([[[0, 10, 20, 40]]], dtype=np.float32)
    got = resample(source, (0.0, 0.5), (1.0, 1.0), (1, 3))
    np.testing.assert_allclose(got[0, 0], [5, 15, 30])


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.0, 3.7])
def test_coordinates_stay_where_they_are(scale: float) -> None:
    """A field that is its own position comes back as the output pixels' centres (away from the border).

    Exactly for whole scales; a sampled triangle of another width is off by a few hundredths of a pixel.
    """
    source = (np.arange(200, dtype=np.float32) + 0.5)[None, None].repeat(4, axis=1)
    got = resample(source, (1.0, 17.25), (1.0, scale), (2, 30))
    np.testing.assert_allclose(
        got[0, 0], 17.25 + (np.arange(30) + 0.5) * scale, atol=1e-3 if scale in (1, 2) or scale < 1 else 0.05
    )


@given(st.integers(1, 30), st.floats(-2, 2), st.floats(0.1, 20), st.integers(1, 30))
def test_weights_sum_to_one_even_past_the_border(size: int, start: float, scale: float, count: int) -> None:
    weights = triangle_weights(size, start, scale, count)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1)


@pytest.mark.parametrize("start", [-0.5, 0.0, 3.3])
def test_nothing_from_outside_leaks_in(start: float) -> None:
    source = np.full((3, 12, 12), 77, dtype=np.uint8)
    scale = (12.5 - start) / 5
    assert (resample(source, (start, start), (scale, scale), (5, 5)) == 77).all()
    assert math.isclose(
        float(resample(source.astype(np.float32), (start, 0.0), (scale, 2.4), (5, 5)).min()), 77, rel_tol=1e-6
    )
