"""Slides as Deep Zoom tiles, through the project's own readers: every format that can be explained can be seen."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.geometry import Box
from workers.readers.overview import choose_level
from workers.readers.reader import Reader

TILE, OVERLAP = 254, 1
QUALITY = 85
SPLIT_PX = 4_000_000
"""Level pixels read at once; a tile that needs more is read in parts."""
MOST_PX = 64_000_000
"""Level pixels read for a tile; one that needs more is drawn from an overview of the slide."""


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


def tile_pixels(reader: Reader, level: int, y: int, x: int) -> NDArray[Any]:
    """`(C, h, w)` of a tile that there is, in the reader's values.

    Px `p` of a level spans `[p, p + 1) * step` level-0 px, from 0 on. A last one whose centre lies past the edge of the
    slide still covers some of it, and takes its neighbour's value.
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
    pixels = _read(reader, start, stop, shape, source)
    return np.pad(pixels, [(0, 0), *((0, n) for n in lacking)], mode="edge") if any(lacking) else pixels


def _read(reader: Reader, start: list[int], stop: list[int], shape: list[int], level: int) -> NDArray[Any]:
    """A box read in as many parts as keep each below `SPLIT_PX`."""
    scale = reader.meta.levels[level].downsample
    cost = math.prod((b - a) / d for a, b, d in zip(start, stop, scale, strict=True))
    axis = int(shape[1] >= shape[0])
    if cost <= SPLIT_PX or shape[axis] < 2:
        box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
        return reader.read(box, tuple(shape), level)[0]
    half = shape[axis] // 2
    middle = start[axis] + (stop[axis] - start[axis]) // shape[axis] * half
    first, last = [[*start], [*stop], [*shape]], [[*start], [*stop], [*shape]]
    first[1][axis], first[2][axis] = middle, half
    last[0][axis], last[2][axis] = middle, shape[axis] - half
    parts = [_read(reader, a, b, n, level) for a, b, n in (first, last)]
    return np.concatenate(parts, axis=axis + 1)


def rgb(pixels: NDArray[Any], window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """`(C, h, w)` as `(h, w, 3)`: the first three channels, or grey from the first, in the slide's one window."""
    shown = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if window is not None:
        low, high = window
        shown = np.rint(np.clip((np.nan_to_num(shown, nan=low) - low) / (high - low), 0, 1) * 255)
    return np.ascontiguousarray(np.moveaxis(shown.astype(np.uint8, copy=False), 0, -1))


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """`(h, w, 3)` as JPEG; no metadata go with it."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
