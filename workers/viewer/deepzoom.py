"""Slides as Deep Zoom tiles, through the project's own readers: every format that can be explained can be seen."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import SourceError
from schemas.geometry import Box
from workers.readers.overview import choose_level
from workers.readers.reader import Reader

TILE, OVERLAP = 254, 1
QUALITY = 85
SPLIT_PX = 4_000_000
"""Level pixels read at once; a tile that needs more is read in parts."""
MOST_PX = 64_000_000
"""Level pixels read for a tile; one that needs more is drawn from an overview of the slide."""
LOST_PX = 32
"""Around damage of the file a tile is read in ever smaller parts, down to this side."""
LOST_GREYS = (90, 130)
"""Of the chequers that stand for what cannot be read."""


def level_count(shape_l0: tuple[int, ...]) -> int:
    """Levels of a Deep Zoom pyramid: the first is one px, the last is level 0 of the slide."""
    return (max(shape_l0) - 1).bit_length() + 1


def level_shape(shape_l0: tuple[int, ...], level: int) -> tuple[int, ...]:
    """`(y, x)` px of a level: ceil halves."""
    step = 1 << (level_count(shape_l0) - 1 - level)
    return tuple(-(-n // step) for n in shape_l0)


def has_tile(shape_l0: tuple[int, ...], level: int, y: int, x: int) -> bool:
    """Whether the pyramid has a tile."""
    if not 0 <= level < level_count(shape_l0):
        return False
    return all(0 <= i * TILE < n for i, n in zip((y, x), level_shape(shape_l0, level), strict=True))


def needed_px(reader: Reader, level: int) -> float:
    """Level pixels of the source that a tile is made from."""
    meta = reader.meta
    step = 1 << (level_count(meta.shape_l0) - 1 - level)
    source = meta.levels[choose_level(meta, (float(step),) * 2)]
    side = min(TILE + 2 * OVERLAP, max(level_shape(meta.shape_l0, level)))
    return math.prod(side * step / d for d in source.downsample)


def tile_pixels(reader: Reader, level: int, y: int, x: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """`(C, h, w)` of a tile that there is, in the reader's values, and where of `(h, w)` the file cannot be read.

    Px `p` of a level spans `[p, p + 1) * step` level-0 px, from 0 on. A last one whose centre lies past the edge of the
    slide still covers some of it, and takes its neighbour's value.

    Raises
    ------
    SourceError
        Nothing of it can be read.
    """
    meta = reader.meta
    step = 1 << (level_count(meta.shape_l0) - 1 - level)
    start, stop, shape, lacking = [], [], [], []
    for i, n, n_level in zip((y, x), meta.shape_l0, level_shape(meta.shape_l0, level), strict=True):
        first = i * TILE - (OVERLAP if i else 0)
        last = min((i + 1) * TILE + OVERLAP, n_level)
        inside = min(last, math.ceil(n / step - 0.5))
        start.append(first * step)
        stop.append(inside * step if inside > first else n)
        shape.append(max(inside - first, 1))
        lacking.append(last - first - shape[-1])
    source = choose_level(meta, (float(step),) * 2)
    pixels, lost = _read(reader, start, stop, shape, source)
    if any(lacking):
        pixels = np.pad(pixels, [(0, 0), *((0, n) for n in lacking)], mode="edge")
        lost = np.pad(lost, [(0, n) for n in lacking], mode="edge")
    return pixels, lost


def _read(
    reader: Reader, start: list[int], stop: list[int], shape: list[int], level: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A box read in as many parts as keep each below `SPLIT_PX` and most of them clear of damage."""
    scale = reader.meta.levels[level].downsample
    cost = math.prod((b - a) / d for a, b, d in zip(start, stop, scale, strict=True))
    axis = int(shape[1] >= shape[0])
    if cost <= SPLIT_PX or shape[axis] < 2:
        box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
        try:
            return reader.read(box, tuple(shape), level)[0], np.zeros(shape, bool)
        except SourceError:
            if shape[axis] <= LOST_PX:
                raise
    half = shape[axis] // 2
    middle = start[axis] + (stop[axis] - start[axis]) // shape[axis] * half
    first, last = [[*start], [*stop], [*shape]], [[*start], [*stop], [*shape]]
    first[1][axis], first[2][axis] = middle, half
    last[0][axis], last[2][axis] = middle, shape[axis] - half
    parts: list[tuple[NDArray[Any], NDArray[np.bool_]] | None] = []
    for a, b, n in (first, last):
        try:
            parts.append(_read(reader, a, b, n, level))
        except SourceError as found:
            parts.append(None)
            error = found
    read = next((part for part in parts if part is not None), None)
    if read is None:
        raise error
    whole = [
        (np.zeros((len(read[0]), *n), read[0].dtype), np.ones(n, bool)) if part is None else part
        for part, (_, _, n) in zip(parts, (first, last), strict=True)
    ]
    return (
        np.concatenate([pixels for pixels, _ in whole], axis=axis + 1),
        np.concatenate([lost for _, lost in whole], axis=axis),
    )


def rgb(
    pixels: NDArray[Any], window: tuple[float, float] | None, lost: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """`(C, h, w)` as `(h, w, 3)`: the first three channels, or grey from the first, in the slide's one window.

    Chequers where `lost` `(h, w)`.
    """
    shown = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if window is not None:
        low, high = window
        shown = np.rint(np.clip((np.nan_to_num(shown, nan=low) - low) / (high - low), 0, 1) * 255)
    drawn = np.ascontiguousarray(np.moveaxis(shown.astype(np.uint8, copy=False), 0, -1))
    if lost is not None and lost.any():
        y, x = np.nonzero(lost)
        drawn[y, x] = np.array(LOST_GREYS, np.uint8)[(y // 8 + x // 8) % 2][:, None]
    return drawn


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """`(h, w, 3)` as JPEG; no metadata go with it."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
