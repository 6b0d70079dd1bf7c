"""`overview.png`: the image, the image under heat, and everything one has to know to read it.

Slides: the slide beside the slide under heat, a block a channel. Volumes: three planes through the strongest
voxel, under heat and plain, in radiological orientation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from schemas.heatmap import Coverage
from schemas.run import TilesInfo
from workers.export import words
from workers.export.figure import Block, Legend, Panel, colours, make_figure, save_figure
from workers.export.overlay import Rgb, compose, level_for, place
from workers.export.planes import (
    VIEWS,
    grey,
    oriented,
    physical_size,
    position_words,
    read_plane,
)
from workers.readers.overview import read_overview
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.store.statistics import channel_statistics, strongest

LONGEST_PX = 1600
"""Longest side of a slide's picture in an overview, at most."""
MOST_CHANNELS = 4
WIDE = 1.6


def write_overview(
    path: str | os.PathLike[str],
    reader: Reader,
    heatmap: HeatmapStore,
    tiles: TilesInfo | None = None,
    channels: Sequence[int] | None = None,
) -> Path:
    """Draw an image's heatmap for people, as PNG; see `overview_figure`."""
    path = Path(path)
    save_figure(overview_figure(reader, heatmap, tiles, channels), path)
    return path


def overview_figure(
    reader: Reader,
    heatmap: HeatmapStore,
    tiles: TilesInfo | None = None,
    channels: Sequence[int] | None = None,
    longest_px: int = LONGEST_PX,
) -> Figure:
    """The image beside the image under heat, with legends, scale bar, title and intended use.

    Of a slide only a small picture and the heatmap level of about its resolution are read, never a whole level 0.
    Up to four channels are drawn, the others are named. The title is the name of the folder that holds the heatmap.

    Parameters
    ----------
    reader
        The image the heatmap belongs to.
    tiles
        Gives the native size of a CAM cell, which the legend lacks without.
    channels
        Which channels; None: the first four.
    longest_px
        Longest side of a slide's picture, at most.

    Raises
    ------
    SourceError
        No part of the image can be read.
    """
    info = heatmap.info
    asked = list(range(len(info.channels))) if channels is None else list(channels)
    shown, others = asked[:MOST_CHANNELS], asked[MOST_CHANNELS:]
    if reader.meta.kind == "slide":
        blocks, notes = _slide_blocks(reader, heatmap, tiles, shown, longest_px)
    else:
        blocks, notes = _volume_blocks(reader, heatmap, tiles, shown)
    if others:
        notes.append("Not drawn here: " + ", ".join(info.channels[c].label for c in others))
    if not info.complete:
        notes.append("This heatmap is not complete yet.")
    return make_figure(heatmap.path.resolve().parent.name, words.subtitle(reader.meta, info), blocks, notes)


def _slide_blocks(
    reader: Reader,
    heatmap: HeatmapStore,
    tiles: TilesInfo | None,
    channels: Sequence[int],
    longest_px: int,
) -> tuple[list[Block], list[str]]:
    info = heatmap.info
    step = math.ceil(max(reader.meta.shape_l0) / longest_px)
    pixels, picture_l0, bad = read_overview(reader, spacing=tuple(s * step for s in info.spacing))
    picture = rgb(pixels)
    size = _pair(n * d * s for n, d, s in zip(picture.shape[:2], picture_l0, info.spacing, strict=True))
    level = level_for(len(info.grid.levels), info.grid.downsample, picture_l0)
    heat_l0 = [d * 2**level for d in info.grid.downsample]
    blocks = []
    for c in channels:
        coverage = place(np.asarray(heatmap.coverage(level, c)[...]), heat_l0, picture.shape[:2], picture_l0)
        signed, window = info.channels[c].signed, display_window(heatmap, c, level)
        values = place(np.asarray(heatmap.image(level)[c]), heat_l0, picture.shape[:2], picture_l0)
        under = compose(picture, values, coverage, window, signed, colours(signed))
        panels = (Panel(picture, size, "Slide"), Panel(under, size, info.channels[c].label))
        legend = _legend(heatmap, tiles, c, window, [picture], [coverage])
        # A wide slide lies above its heat, so that both can be large.
        rows = ((panels[0],), (panels[1],)) if size[1] > WIDE * size[0] else (panels,)
        blocks.append(Block(rows, legend, info.spacing_unit))
    if not reader.meta.pixels:
        return blocks, ["Features alone: there is no picture of the slide."]
    notes = [
        f"{len(bad)} places of the slide could not be read for this picture and are drawn as background."
    ]
    return blocks, notes if bad else []


def _volume_blocks(
    reader: Reader, heatmap: HeatmapStore, tiles: TilesInfo | None, channels: Sequence[int]
) -> tuple[list[Block], list[str]]:
    meta, info = reader.meta, heatmap.info
    grid = info.grid
    extent = physical_size(meta)
    blocks = []
    for c in channels:
        signed, window = info.channels[c].signed, display_window(heatmap, c, 0)
        peak = strongest(heatmap.as_dask(0, c))
        at_hm = peak or tuple(n // 2 for n in grid.levels[0])
        # Its centre, kept inside where the heatmap's last voxel reaches past the image.
        at = [
            min((j + 0.5) * d, n - 0.5) for j, d, n in zip(at_hm, grid.downsample, meta.shape_l0, strict=True)
        ]
        voxel = [int(a) for a in at]
        planes = [read_plane(reader, view, voxel) for view in VIEWS]
        heats, codes = [], []
        for view, plane in zip(VIEWS, planes, strict=True):
            axes = (view.rows, view.columns)
            picture_l0 = [meta.shape_l0[a] / n for a, n in zip(axes, plane.shape, strict=True)]
            level = level_for(len(grid.levels), [grid.downsample[a] for a in axes], picture_l0)
            heat_l0 = [grid.downsample[a] * 2**level for a in axes]
            cut: list[int | slice] = [slice(None)] * 3
            cut[view.normal] = at_hm[view.normal] >> level
            heat, code = heatmap.image(level)[(c, *cut)], heatmap.coverage(level, c)[tuple(cut)]
            heats.append(place(np.asarray(heat), heat_l0, plane.shape, picture_l0))
            codes.append(place(np.asarray(code), heat_l0, plane.shape, picture_l0))
        pictures = grey(planes, [code == Coverage.EVALUATED for code in codes])
        heated, plain = [], []
        for view, picture, values, coverage in zip(VIEWS, pictures, heats, codes, strict=True):
            under = compose(picture, values, coverage, window, signed, colours(signed))
            size = _pair(extent[a] for a in (view.rows, view.columns))
            cross = _pair(1 - at[a] / meta.shape_l0[a] for a in (view.rows, view.columns))
            edges = view.edges if meta.affine is not None else ("", "", "", "")
            title = f"{view.name}, slice {voxel[view.normal] + 1} of {meta.shape_l0[view.normal]}"
            heated.append(Panel(oriented(under), size, title, edges))
            plain.append(Panel(oriented(picture), size, "without heat", edges, cross))
        where = "No voxel was evaluated: planes through the middle"
        if peak is not None:
            value = float(np.asarray(heatmap.image(0)[(c, *peak)]))
            where = f"Planes through the strongest voxel: {words.number(value)} at {position_words(meta, at)}"
        legend = _legend(heatmap, tiles, c, window, pictures, codes, where)
        blocks.append(Block((tuple(heated), tuple(plain)), legend, info.spacing_unit))
    return blocks, [
        "Radiological orientation: the patient's right is on the left of axial and coronal planes."
    ]


def _legend(
    heatmap: HeatmapStore,
    tiles: TilesInfo | None,
    channel: int,
    window: tuple[float, float],
    pictures: Sequence[NDArray[np.uint8]],
    coverage: Sequence[NDArray[np.uint8]],
    where: str = "",
) -> Legend:
    info = heatmap.info
    row = info.channels[channel]
    counts = np.sum([np.bincount(c.ravel(), minlength=len(Coverage)) for c in coverage], axis=0)
    counts[Coverage.OUTSIDE] = 0
    kind, area = ("slide", "this slide") if info.spacing_unit == "um" else ("volume", "these planes")
    lines = [words.target(row)]
    if row.signed:
        lines.append("Orange speaks for the target, blue against it")
    if kind == "slide" and not counts[Coverage.EVALUATED]:
        lines.append("Nothing was evaluated: there is no heat to see")
    else:
        lines.append(words.display(row.signed, kind, bool(info.display)))
        if info.value_range:
            low, high = info.value_range[channel]
            lines.append(f"All values: {words.number(low)} to {words.number(high)}")
    if where:
        lines.append(where)
    if row.encoder_unverified:
        lines.append("Encoder unverified: features alone, their slide was not there")
    if row.bag_method:
        lines.append("One value a tile, painted over it")
        if not row.signed:
            lines.append("Unsigned: how much a tile counts, not for or against what")
    elif tiles is not None and row.method in tiles.grids:
        lines.append(words.cell(tiles.grids[row.method], info))
    ground = _typical(pictures, coverage, Coverage.EVALUATED)
    empty = _typical(pictures, coverage, Coverage.BACKGROUND)
    occurring = tuple((k, float(counts[k] / counts.sum())) for k in words.COVERAGE_WORDS if counts[k])
    return Legend(
        row.method, tuple(lines), words.UNITS[row.unit], row.signed, window, ground, empty, area, occurring
    )


def display_window(heatmap: HeatmapStore, channel: int, level: int) -> tuple[float, float]:
    """The published display window, or one of the level drawn where none is published yet."""
    info = heatmap.info
    if info.display:
        return info.display[channel]
    lazy = heatmap.as_dask(level)[channel : channel + 1]
    return channel_statistics(lazy, [info.channels[channel].signed]).display[0]


def rgb(pixels: NDArray[Any], window: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """`(C, H, W)` of any channels and type as `(H, W, 3)` uint8: the first three channels, or grey from the first.

    Values that are not uint8 are black to white over `window`, else over their own range.
    """
    chosen = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if chosen.dtype != np.uint8:
        low, high = window or (float(np.nanmin(chosen)), float(np.nanmax(chosen)))
        chosen = (
            np.rint((np.nan_to_num(chosen) - low) * (255 / ((high - low) or 1.0)))
            .clip(0, 255)
            .astype(np.uint8)
        )
    return np.ascontiguousarray(np.moveaxis(chosen, 0, -1))


def _pair(values: Iterable[float]) -> tuple[float, float]:
    first, second = values
    return first, second


def _typical(
    pictures: Sequence[NDArray[np.uint8]], coverage: Sequence[NDArray[np.uint8]], code: Coverage
) -> Rgb:
    """Median colour of the pixels with one coverage code."""
    pixels = np.concatenate([p[c == code] for p, c in zip(pictures, coverage, strict=True)])
    red, green, blue = (int(v) for v in (np.median(pixels, axis=0) if len(pixels) else (240, 240, 240)))
    return red, green, blue
