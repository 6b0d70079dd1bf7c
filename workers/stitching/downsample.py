"""Halving a block of the heatmap: NaN-aware mean, signed peak, and the reason of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import COVERAGE_MERGE_ORDER, Coverage

T = TypeVar("T", bound=np.generic)


def halve_mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the finite ones of each 2 x 2 (x 2) children; NaN where none is.

    Parameters
    ----------
    values
        `(*S)`; sizes may be odd, the result has their ceil halves. Summed in float64.
    """
    total = np.zeros([-(-n // 2) for n in values.shape])
    count = np.zeros(total.shape, np.uint8)
    for child in _children(values, np.float32(np.nan)):
        finite = np.isfinite(child)
        np.add(total, child, out=total, where=finite)
        count += finite
    total[count == 0] = np.nan
    return (total / np.maximum(count, 1)).astype(np.float32)


def halve_absmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The child of largest magnitude, with its sign (the first in array order of equals); NaN where none is.

    Parameters
    ----------
    values
        `(*S)`; sizes may be odd, the result has their ceil halves.
    """
    best = np.full([-(-n // 2) for n in values.shape], np.nan, np.float32)
    for child in _children(values, np.float32(np.nan)):
        better = np.isfinite(child) & ~(np.abs(child) <= np.abs(best))
        np.copyto(best, child, where=better)
    return best


def halve_coverage(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first of `COVERAGE_MERGE_ORDER` among the children of each pixel.

    Parameters
    ----------
    codes
        `(*S)` uint8; sizes may be odd, the result has their ceil halves.
    """
    rank_of = np.zeros(len(Coverage), np.uint8)
    rank_of[list(COVERAGE_MERGE_ORDER)] = np.arange(len(COVERAGE_MERGE_ORDER))
    rank = np.full([-(-n // 2) for n in codes.shape], len(Coverage) - 1, np.uint8)
    for child in _children(rank_of[codes], np.uint8(len(Coverage) - 1)):
        np.minimum(rank, child, out=rank)
    return np.array(COVERAGE_MERGE_ORDER, np.uint8)[rank]


def _children(values: NDArray[T], fill: T) -> Iterator[NDArray[T]]:
    """The 2 ** axes strided views of `values`, padded to even sizes with `fill`."""
    if any(n % 2 for n in values.shape):
        values = np.pad(values, [(0, n % 2) for n in values.shape], constant_values=fill)
    for corner in product((0, 1), repeat=values.ndim):
        yield values[tuple(slice(c, None, 2) for c in corner)]
