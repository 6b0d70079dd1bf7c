"""Statistics of finished heatmaps over lazy arrays: exact extremes, display windows, the strongest pixel.

The arrays are dask's (`HeatmapStore.as_dask`); numpy's own functions, given one, stay lazy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LazyArray = Any
"""A dask array."""

BINS = 4096
WINDOW_QUANTILE = 0.995
_TRUSTED_BIN = 64
"""A quantile found in a lower bin is known to worse than 1/64: its range is cut into bins again."""
_VANISHING = 1e-9
"""A quantile below this share of the range is taken as "nearly everything is zero"."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Numbers of each channel, in channel order."""

    value_range: tuple[tuple[float, float], ...]
    """Exact smallest and largest finite value; `(0, 0)` where `finite` is 0."""
    display: tuple[tuple[float, float], ...]
    """Display window: finite numbers, `start < stop` always."""
    finite: tuple[int, ...]
    """Number of finite values; 0 marks a channel nobody looked at."""


def channel_statistics(
    values: LazyArray, signed: Sequence[bool], threads: int | None = None
) -> ChannelStatistics:
    """Range, display window and number of finite values of each channel.

    Chunks are visited in two passes (extremes, then a histogram of 4096 bins) and never held together. The
    window of a signed channel is `-q ... q`, q the 99.5 % quantile of |value|; that of an unsigned one reaches
    from zero (or its smallest value, if that is below) to the 99.5 % quantile. A quantile is the upper edge
    of its bin: at most one bin above the true one. Where few outliers press it into the lowest bins, that part of
    the range is cut into bins once more. A map that is zero almost everywhere is shown over its whole
    range, and one without any finite or non-zero value over `0 ... 1` (signed: `-1 ... 1`).

    Parameters
    ----------
    values
        `(C, *S)`, lazy; NaN and infinities are skipped.
    signed
        Whether each channel has a sign.
    threads
        Worker threads; None: as many as there are cores.

    Raises
    ------
    ValueError
        `signed` has another length than the channel axis.
    """
    if len(signed) != values.shape[0]:
        msg = f"{values.shape[0]} channels need as many signs; found {len(signed)}"
        raise ValueError(msg)
    parts = [_one(values[c], sign, threads) for c, sign in enumerate(signed)]
    return ChannelStatistics(
        value_range=tuple(p[0] for p in parts),
        display=tuple(p[1] for p in parts),
        finite=tuple(p[2] for p in parts),
    )


def strongest(values: LazyArray, threads: int | None = None) -> tuple[int, ...] | None:
    """Index of the finite value of largest magnitude in `values` `(*S)`, the first of equals; None without any."""
    magnitude = np.where(np.isfinite(values), abs(values), -1.0)
    flat, top = _compute(threads, magnitude.argmax(), magnitude.max())
    if top < 0:
        return None
    return tuple(int(i) for i in np.unravel_index(int(flat), values.shape))


def _one(
    values: LazyArray, signed: bool, threads: int | None
) -> tuple[tuple[float, float], tuple[float, float], int]:
    finite = np.isfinite(values)
    low, high, number = _compute(
        threads,
        np.where(finite, values, np.inf).min(),
        np.where(finite, values, -np.inf).max(),
        finite.sum(),
    )
    count = int(number)
    if not count:
        return (0.0, 0.0), (-1.0 if signed else 0.0, 1.0), 0
    if signed:
        stop = _quantile(abs(values), 0.0, max(-low, high), count, threads) or 1.0
        return (low, high), (-stop, stop), count
    start = min(0.0, low)
    stop = _quantile(values, start, high, count, threads)
    return (low, high), (start, stop if stop > start else start + (abs(start) or 1.0)), count


def _quantile(values: LazyArray, low: float, high: float, count: int, threads: int | None) -> float:
    """Upper edge of the bin that holds the quantile of `count` finite values, all in `[low, high]`."""
    span = high - low
    rank = WINDOW_QUANTILE * (count - 1) + 1  # the first value's rank is 1
    top = high
    while top - low > _VANISHING * span:
        histogram: LazyArray
        histogram, edges = np.histogram(values, bins=BINS, range=(low, top))
        counts = histogram.compute(scheduler="threads", num_workers=threads)
        at = min(int(np.searchsorted(np.cumsum(counts), rank)), BINS - 1)
        top = float(edges[at + 1])
        if at >= _TRUSTED_BIN:
            return top
    return high


def _compute(threads: int | None, *lazy: LazyArray) -> list[float]:
    """Lazy numbers in one pass; always threads of this process, whatever scheduler the surroundings have set."""
    found: LazyArray = np.stack(lazy)
    return [float(v) for v in found.compute(scheduler="threads", num_workers=threads)]
