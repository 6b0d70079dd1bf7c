from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.heatmap import Coverage
from workers.stitching.downsample import halve_absmax, halve_coverage, halve_mean


def test_a_checkerboard_of_nan_leaves_no_hole() -> None:
    values = np.indices((8, 8)).sum(axis=0).astype(np.float32)
    values[np.indices((8, 8)).sum(axis=0) % 2 == 0] = np.nan
    assert np.isfinite(halve_mean(values)).all()
    assert np.isfinite(halve_absmax(values)).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_each_px_comes_from_its_own_children(sides: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 6, sides).astype(np.uint8)
    values = rng.normal(size=sides).astype(np.float32)
    values[codes != Coverage.EVALUATED] = np.nan
    mean, peak, merged = halve_mean(values), halve_absmax(values), halve_coverage(codes)
    assert mean.shape == peak.shape == merged.shape == tuple(-(-n // 2) for n in sides)
    assert [a.dtype.name for a in (mean, peak, merged)] == ["float32", "float32", "uint8"]
    for px in product(*(range(n) for n in mean.shape)):
        inside = tuple(slice(2 * i, 2 * i + 2) for i in px)
        some = values[inside][np.isfinite(values[inside])]
        reasons = set(codes[inside].ravel().tolist())
        assert merged[px] == next(c for c in (1, 2, 4, 3, 0, 5) if c in reasons)
        assert np.isfinite(mean[px]) == np.isfinite(peak[px]) == (merged[px] == 1)
        if len(some):
            assert mean[px] == pytest.approx(some.astype(np.float64).mean(), rel=1e-6, abs=1e-7)
            assert peak[px] == some[np.argmax(np.abs(some))]


def test_of_equal_magnitudes_the_first_wins() -> None:
    values = np.array([[np.nan, -3], [3, 1]], np.float32)
    assert halve_absmax(values)[0, 0] == -3


def test_means_are_summed_in_double_precision() -> None:
    values = np.array([[3e38, 3e38], [3e38, 3e38]], np.float32)
    assert halve_mean(values)[0, 0] == np.float32(3e38)
