"""From a level-0 box to exactly `shape_px` pixels: the part of `read` that every reader shares.

A reader brings `fetch(level, start_lv, stop_lv) -> (pixels, origin_lv)`: level pixels that cover the
half-open region, and where (level px, possibly a fraction) their first pixel starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError, SpecError
from schemas.geometry import Box
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ImageMeta
from workers.readers.resample import ALIGNED_PX, resample

Fetch = Callable[
    [int, tuple[int, ...], tuple[int, ...]],
    tuple[NDArray[Any], tuple[float, ...]],
]


def centres_inside(box: Box, shape_px: tuple[int, ...], shape_l0: tuple[int, ...]) -> list[tuple[int, int]]:
    """Per axis the half-open range of output pixels whose centre lies inside the image."""
    ranges = []
    for start, stop, n, size in zip(box.start, box.stop, shape_px, shape_l0, strict=True):
        centre = start + (np.arange(n) + 0.5) * ((stop - start) / n)
        inside = np.flatnonzero((centre >= 0) & (centre < size))
        ranges.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0))
    return ranges


def check_request(meta: ImageMeta, box: Box, shape_px: tuple[int, ...], level: int) -> None:
    """Refuse a box of another frame or number of axes, an empty shape, a level there is not."""
    if box.frame != "l0" or len(box.start) != meta.ndim or len(shape_px) != meta.ndim:
        msg = (
            f"{meta.uri}: read needs an l0 box and a shape of {meta.ndim} axes; found {box!r} and {shape_px}"
        )
        raise SpecError(msg)
    if min(shape_px) < 1 or not 0 <= level < len(meta.levels):
        msg = f"{meta.uri}: cannot read shape {shape_px} of level {level}; the image has {len(meta.levels)} level(s)"
        raise SpecError(msg)


def read_region(
    meta: ImageMeta, fetch: Fetch, box: Box, shape_px: tuple[int, ...], level: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """`Reader.read` in terms of `fetch`; see `workers.readers.reader.Reader.read`."""
    check_request(meta, box, shape_px, level)
    dtype = np.uint8 if meta.dtype == "uint8" else np.float32
    ranges = centres_inside(box, shape_px, meta.shape_l0)
    within = tuple(slice(a, b) for a, b in ranges)
    coverage = np.zeros(shape_px, dtype=np.bool_)
    coverage[within] = True
    if not all(b > a for a, b in ranges):
        return np.full((meta.channels, *shape_px), meta.background, dtype=dtype), coverage

    lv = meta.levels[level]
    scale = tuple(
        (b - a) / n / d for a, b, n, d in zip(box.start, box.stop, shape_px, lv.downsample, strict=True)
    )
    first = tuple(
        a / d + i * s for a, d, (i, _), s in zip(box.start, lv.downsample, ranges, scale, strict=True)
    )
    count = tuple(b - a for a, b in ranges)
    start_lv, stop_lv = support(first, scale, count, lv.shape)
    if meta.kind == "slide":
        _refuse_huge(meta, box, level, start_lv, stop_lv)

    pixels, origin = fetch(level, start_lv, stop_lv)
    part = resample(pixels, tuple(a - o for a, o in zip(first, origin, strict=True)), scale, count)
    if part.shape[1:] == tuple(shape_px):
        return part, coverage
    out = np.full((meta.channels, *shape_px), meta.background, dtype=dtype)
    out[(slice(None), *within)] = part
    return out, coverage


def support(
    first: tuple[float, ...], scale: tuple[float, ...], count: tuple[int, ...], shape_lv: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Level pixels that have weight in `count` output pixels of size `scale` from edge `first`: start and stop.

    No pixel more: a neighbouring tile of the file that is damaged must not fail a read that needs none of it.
    """
    start, stop = [], []
    for a, s, n, size in zip(first, scale, count, shape_lv, strict=True):
        reach = max(1.0, s)
        low = math.floor(a + 0.5 * s - reach - 0.5 + ALIGNED_PX) + 1
        high = math.ceil(a + (n - 0.5) * s + reach - 0.5 - ALIGNED_PX)
        start.append(min(max(low, 0), size - 1))
        stop.append(max(min(high, size), start[-1] + 1))
    return tuple(start), tuple(stop)


def _refuse_huge(
    meta: ImageMeta, box: Box, level: int, start_lv: tuple[int, ...], stop_lv: tuple[int, ...]
) -> None:
    pixels = math.prod(b - a for a, b in zip(start_lv, stop_lv, strict=True))
    if pixels > WHOLE_IMAGE_LIMIT_PX:
        msg = (
            f"{meta.uri}: box {box.start}-{box.stop} is {pixels / 1e6:.0f} Mpx of level {level}; "
            f"at most {WHOLE_IMAGE_LIMIT_PX / 1e6:.0f} Mpx are read at once: read a smaller box or a coarser level"
        )
        raise SourceError(msg)
