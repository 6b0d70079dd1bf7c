"""A whole image, small: for tissue masks and pictures, in bounded memory whatever levels there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ImageMeta
from workers.readers.reader import Reader

OVERVIEW_PX = 4_000_000
"""Most pixels of an overview unless asked otherwise: what is made of it costs many times its bytes."""
BLOCK_PX = 2_000_000
"""Level pixels read at once."""
SMALLEST_SPLIT = 8
"""A block that fails is halved, at most this often an axis smaller, to tell its good parts from the bad."""
WINDOW_PX = 250_000
"""Pixels from which the window of a slide that is not 8-bit colour is taken."""
WINDOW_PERCENT = (0.5, 99.5)
"""Its ends, of those pixels: a few outliers do not darken the rest."""


def overview_downsample(
    meta: ImageMeta, max_px: int | None = None, spacing: tuple[float, ...] | None = None
) -> tuple[int, ...]:
    """Whole level-0 px an overview px: not coarser than `spacing` where `max_px` allows, else as fine as it does."""
    pixel = meta.spacing or (1.0,) * meta.ndim
    wanted = spacing or (min(pixel),) * meta.ndim
    limit = max_px or OVERVIEW_PX
    grow = 1.0
    while True:
        downsample = tuple(
            min(max(1, math.floor(grow * w / p + 1e-6)), n)
            for w, p, n in zip(wanted, pixel, meta.shape_l0, strict=True)
        )
        if math.prod(-(-n // d) for n, d in zip(meta.shape_l0, downsample, strict=True)) <= max(limit, 1):
            return downsample
        grow *= 1.05


def choose_level(meta: ImageMeta, downsample: tuple[float, ...]) -> int:
    """The coarsest level that is not coarser than `downsample` (level-0 px, 1 % tolerance); 0 where none is."""
    serving = [
        i
        for i, level in enumerate(meta.levels)
        if all(a <= 1.01 * b for a, b in zip(level.downsample, downsample, strict=True))
    ]
    return max(serving, key=lambda i: meta.levels[i].downsample, default=0)


def read_overview(
    reader: Reader, max_px: int | None = None, spacing: tuple[float, ...] | None = None
) -> tuple[NDArray[Any], tuple[float, ...], tuple[Box, ...]]:
    """Read a whole image small, block by block.

    Parameters
    ----------
    max_px
        Most pixels of the result; None: 4 million.
    spacing
        Pixel size wanted, array order (um or mm); None: the image's own.

    Returns
    -------
    pixels
        `(C, *S)`; pixel `i` of an axis covers level-0 `[i * downsample, (i + 1) * downsample)`.
    downsample
        Whole numbers, an axis.
    bad
        Level-0 boxes that could not be read; background there. None where there are no pixels at all.

    Raises
    ------
    SourceError
        Nothing at all could be read.
    """
    meta = reader.meta
    downsample = overview_downsample(meta, max_px, spacing)
    level = choose_level(meta, downsample)
    shape = tuple(-(-n // d) for n, d in zip(meta.shape_l0, downsample, strict=True))
    dtype = np.uint8 if meta.dtype == "uint8" else np.float32
    out = np.full((meta.channels, *shape), meta.background, dtype=dtype)
    if not meta.pixels:
        return out, tuple(map(float, downsample)), ()
    step = [d / s for d, s in zip(downsample, meta.levels[level].downsample, strict=True)]
    side = max(1, int((BLOCK_PX / math.prod(step)) ** (1 / meta.ndim)))
    bad: list[Box] = []
    blocks = 0
    last = ""
    for window in _blocks(shape, side):
        for part, error in _read_block(
            reader, out, window, downsample, level, max(1, side // SMALLEST_SPLIT)
        ):
            blocks += 1
            if error is not None:
                bad.append(_box(meta, part, downsample))
                last = error.message
    if bad and len(bad) == blocks:
        msg = f"{meta.uri}: no part of it could be read for an overview; the last reason: {last}"
        raise SourceError(msg)
    return out, tuple(map(float, downsample)), tuple(bad)


Window = tuple[slice, ...]


def _blocks(shape: tuple[int, ...], side: int) -> Iterator[Window]:
    axes = ([slice(a, min(a + side, n)) for a in range(0, n, side)] for n in shape)
    yield from itertools.product(*axes)


def _box(meta: ImageMeta, window: Window, downsample: tuple[int, ...]) -> Box:
    return Box(
        frame="l0",
        start=tuple(w.start * d for w, d in zip(window, downsample, strict=True)),
        stop=tuple(min(w.stop * d, n) for w, d, n in zip(window, downsample, meta.shape_l0, strict=True)),
    )


def _read_block(
    reader: Reader, out: NDArray[Any], window: Window, downsample: tuple[int, ...], level: int, smallest: int
) -> Iterator[tuple[Window, SourceError | None]]:
    """Fill a window of `out`; where that fails, halve it; yield what was read and what was not."""
    box = Box(
        frame="l0",
        start=tuple(w.start * d for w, d in zip(window, downsample, strict=True)),
        stop=tuple(w.stop * d for w, d in zip(window, downsample, strict=True)),
    )
    shape = tuple(w.stop - w.start for w in window)
    try:
        pixels, coverage = reader.read(box, shape, level)
    except SourceError as error:
        if max(shape) <= smallest:
            yield window, error
            return
        halves = [
            [slice(w.start, w.stop)]
            if w.stop - w.start <= smallest
            else [slice(w.start, (w.start + w.stop) // 2), slice((w.start + w.stop) // 2, w.stop)]
            for w in window
        ]
        for part in itertools.product(*halves):
            yield from _read_block(reader, out, part, downsample, level, smallest)
        return
    # A last pixel whose centre lies past the edge still covers some image: it takes its neighbour's value.
    for axis in range(len(shape)):
        covered = [bool(plane.any()) for plane in np.moveaxis(coverage, axis, 0)]
        if shape[axis] > 1 and covered[-2] and not covered[-1]:
            edge = [slice(None)] * (len(shape) + 1)
            edge[axis + 1] = slice(-1, None)
            inner = [slice(None)] * (len(shape) + 1)
            inner[axis + 1] = slice(-2, -1)
            pixels[tuple(edge)] = pixels[tuple(inner)]
    out[(slice(None), *window)] = pixels
    yield window, None


def value_window(reader: Reader) -> tuple[float, float] | None:
    """Values of a slide shown black and white, the same all over it; None where its pixels are 8-bit as they are.

    Raises
    ------
    SourceError
        Nothing of it can be read.
    """
    if reader.meta.dtype == "uint8":
        return None
    pixels, _, _ = read_overview(reader, max_px=WINDOW_PX)
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    finite = shown[np.isfinite(shown)]
    low, high = (float(v) for v in np.percentile(finite, WINDOW_PERCENT)) if finite.size else (0.0, 1.0)
    return low, high if high > low else low + 1.0
