from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from workers.store.statistics import BINS, channel_statistics, strongest

VALUES = st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([np.nan, 0.0]))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=9), elements=VALUES), st.booleans())
def test_range_is_exact_and_the_window_is_numpys_quantile_to_a_bin(values: np.ndarray, signed: bool) -> None:
    stats = channel_statistics(da.from_array(values[None], chunks=(1,) + (4,) * values.ndim), [signed])
    finite = values[np.isfinite(values)].astype(float)
    (start, stop), (low, high) = stats.display[0], stats.value_range[0]
    json.dumps([start, stop, low, high], allow_nan=False)
    assert stats.finite == (finite.size,)
    assert start < stop
    if not finite.size:
        assert (low, high) == (0, 0)
        return
    assert (low, high) == (finite.min(), finite.max())
    ranked = np.abs(finite) if signed else finite
    origin = 0.0 if signed else min(0.0, low)
    assert start == (-stop if signed else origin)
    # numpy's `higher` is the value whose bin is named; the edge lies at most one bin above it
    expected, span = np.quantile(ranked, 0.995, method="higher"), ranked.max() - origin
    if expected - origin <= 1e-6 * span:
        assert stop in (span + origin, 1.0) or stop >= expected
    else:
        assert expected - 1e-9 * span <= stop <= expected + span / BINS * 1.001


def test_a_large_channel_agrees_with_numpy_within_a_bin() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 2.0, (2, 300, 411)).astype(np.float32)
    values[:, :40] = np.nan
    stats = channel_statistics(da.from_array(values, chunks=(1, 128, 128)), [True, False])
    for (start, stop), channel, signed in zip(
        stats.display, values.astype(float), [True, False], strict=True
    ):
        flat = np.abs(channel) if signed else channel
        expected = float(np.nanquantile(flat, 0.995))
        bin_width = (np.nanmax(flat) - (0 if signed else np.nanmin(flat))) / BINS
        assert abs(stop - expected) <= bin_width
        assert start == (-stop if signed else np.nanmin(channel))


def test_one_outlier_does_not_swallow_the_window() -> None:
    values = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
    values[0, 3, 4] = 1e6
    stats = channel_statistics(da.from_array(values, chunks=(1, 50, 50)), [False])
    assert stats.value_range == ((0, 1e6),)
    assert stats.display[0][1] == pytest.approx(0.995, rel=1 / 64)


@pytest.mark.parametrize(
    ("value", "signed", "display"),
    [
        (0.0, False, (0, 1)),
        (0.0, True, (-1, 1)),
        (2.5, False, (0, 2.5)),
        (2.5, True, (-2.5, 2.5)),
        (-2.5, True, (-2.5, 2.5)),
        (-2.5, False, (-2.5, 0)),
        (np.nan, True, (-1, 1)),
        (np.nan, False, (0, 1)),
        (np.inf, False, (0, 1)),
    ],
)
def test_constant_and_empty_maps_have_a_window(
    value: float, signed: bool, display: tuple[float, float]
) -> None:
    stats = channel_statistics(da.full((1, 20, 30), value, chunks=(1, 8, 8), dtype=np.float32), [signed])
    assert stats.display == (display,)
    assert stats.finite == (600 if np.isfinite(value) else 0,)
    assert stats.value_range == ((value, value) if np.isfinite(value) else (0, 0),)


def test_a_map_that_is_zero_almost_everywhere_is_shown_over_its_whole_range() -> None:
    values = np.zeros((1, 100, 100), np.float32)
    values[0, 5, 7] = 3
    assert channel_statistics(da.from_array(values, chunks=(1, 50, 50)), [False]).display == ((0, 3),)


def test_chunks_are_never_held_together() -> None:
    held = 0
    most = 0

    def block(block_info: dict[Any, Any]) -> np.ndarray:
        nonlocal held, most
        held += 1
        most = max(most, held)
        shape = block_info[None]["chunk-shape"]
        made = np.full(shape, float(sum(block_info[None]["chunk-location"])), np.float32).view(_Counted)
        made.release = release
        return made

    def release() -> None:
        nonlocal held
        held -= 1

    values = da.map_blocks(
        block, dtype=np.float32, chunks=((1,), (16,) * 12, (16,) * 12), meta=np.empty((0, 0, 0), np.float32)
    )
    with dask.config.set(scheduler="sync"):
        stats = channel_statistics(values, [False], threads=1)
    assert stats.value_range == ((0, 22),)
    assert 0 < most <= 16


class _Counted(np.ndarray):
    """An array that says when it goes; only the one that `block` made does."""

    release: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


def test_the_strongest_value_keeps_its_place() -> None:
    values = np.full((7, 9, 11), np.nan, np.float32)
    assert strongest(da.from_array(values, chunks=4)) is None
    values[2:5] = 0.5
    values[4, 8, 10] = -3
    assert strongest(da.from_array(values, chunks=4)) == (4, 8, 10)


def test_signs_must_match_the_channels() -> None:
    with pytest.raises(ValueError, match="2 channels"):
        channel_statistics(da.zeros((2, 4, 4)), [True])
