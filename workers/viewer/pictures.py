"""Small pictures for the gallery: an image, and an image under heat, drawn as the overview is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.heatmap import Coverage
from workers.export.figure import colours
from workers.export.overlay import compose, level_for, place
from workers.export.overview import display_window
from workers.export.planes import VIEWS, grey, oriented, read_plane
from workers.readers.overview import read_overview
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.viewer.deepzoom import rgb

AXIAL = VIEWS[0]
WHITE = 245


def thumbnail(reader: Reader, size: int, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """A slide, or the middle axial plane of a volume, at most `size` px on its longer side: `(h, w, 3)`."""
    if reader.meta.kind == "volume":
        plane = read_plane(reader, AXIAL, [n // 2 for n in reader.meta.shape_l0])
        return _fit(oriented(grey([plane], [np.isfinite(plane)])[0]), size)
    return _fit(_small(reader, size, window)[0], size)


def overlay(
    reader: Reader | None,
    heatmap: HeatmapStore,
    channel: int,
    size: int,
    window: tuple[float, float] | None,
) -> NDArray[np.uint8]:
    """The same under the heat of a channel; of a volume the plane of its strongest voxel. Without a source on white."""
    info, grid = heatmap.info, heatmap.grid
    signed = info.channels[channel].signed
    if len(grid.shape_l0) == 2:
        if reader is None:
            step = max(1, math.ceil(max(grid.shape_l0) / size))
            picture_l0: tuple[float, ...] = (float(step),) * 2
            picture = np.full((*(-(-n // step) for n in grid.shape_l0), 3), WHITE, np.uint8)
        else:
            picture, picture_l0 = _small(reader, size, window)
        level = level_for(len(grid.levels), grid.downsample, picture_l0)
        at: tuple[int | slice, ...] = (slice(None), slice(None))
        axes = (0, 1)
    else:
        level = len(grid.levels) - 1
        values = np.asarray(heatmap.image(level)[channel])
        strength = np.where(np.isfinite(values), np.abs(values), -1)
        z = int(np.unravel_index(int(strength.argmax()), strength.shape)[0])
        if strength.max() < 0:
            z = values.shape[0] // 2
        at, axes = (z, slice(None), slice(None)), (1, 2)
        voxel = [min(int((z + 0.5) * grid.downsample[0] * 2**level), grid.shape_l0[0] - 1), 0, 0]
        if reader is None:
            picture = np.full((*(min(n, size) for n in grid.shape_l0[1:]), 3), WHITE, np.uint8)
        else:
            plane = read_plane(reader, AXIAL, voxel)
            picture = grey([plane], [np.isfinite(plane)])[0]
        picture_l0 = tuple(grid.shape_l0[a] / n for a, n in zip(axes, picture.shape[:2], strict=True))
    heat_l0 = [grid.downsample[a] * 2**level for a in axes]
    shape = picture.shape[:2]
    heat = place(np.asarray(heatmap.image(level)[(channel, *at)]), heat_l0, shape, picture_l0)
    codes = place(np.asarray(heatmap.coverage(level, channel)[at]), heat_l0, shape, picture_l0)
    shown = display_window(heatmap, channel, len(grid.levels) - 1)
    codes = np.where(codes == Coverage.OUTSIDE, Coverage.BACKGROUND, codes)
    drawn = compose(picture, heat, codes, shown, signed, colours(signed))
    return _fit(drawn if len(grid.shape_l0) == 2 else oriented(drawn), size)


def _small(
    reader: Reader, size: int, window: tuple[float, float] | None
) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """A slide at a whole downsample, and that downsample."""
    meta = reader.meta
    step = max(1, math.ceil(max(meta.shape_l0) / size))
    pixel = meta.spacing or (1.0,) * meta.ndim
    pixels, downsample, _ = read_overview(reader, spacing=tuple(s * step for s in pixel))
    return rgb(pixels, window), downsample


def _fit(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    longest = max(picture.shape[:2])
    if longest <= size:
        return np.ascontiguousarray(picture)
    width, height = (max(1, round(n * size / longest)) for n in (picture.shape[1], picture.shape[0]))
    resized = Image.fromarray(np.ascontiguousarray(picture)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.asarray(resized)
