"""`rgba/`: the heat as it is drawn, one pyramidal TIFF a channel, for viewers that only stack pictures."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.overlay import FULL_ALPHA, SHOWN_FROM, layer
from workers.export.overview import display_window
from workers.export.pyramid import TILE, file_stem, per_cm, tiles_of
from workers.export.words import UNITS

_HALO = 2
"""Px an outline looks around itself."""
_COLUMNS = 2048
"""Drawn at once."""


def write(context: ExportContext, path: Path) -> None:
    """`<index>-<method>-<target>.tif` for each channel: RGBA, uint8, levels of factor 2 as reduced images.

    Colours and opacity are those of the overview; the window, its unit and their meaning are in the description. Only the
    display window scales the values, the same for the whole image.
    """
    path.mkdir()
    for c in context.channels:
        row = context.info.channels[c]
        _write_channel(context, c, path / f"{c}-{file_stem(f'{row.method}-{row.target}')}.tif")


def _write_channel(context: ExportContext, channel: int, path: Path) -> None:
    store, info = context.heatmap, context.info
    window = display_window(store, channel, 0)
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for level, (height, width) in enumerate(info.grid.levels):
            size_y, size_x = (
                s * d * 2**level for s, d in zip(info.spacing, info.grid.downsample, strict=True)
            )
            tif.write(
                tiles_of((height, width), partial(_drawn, context, channel, level, window), 0),
                shape=(height, width, 4),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                extrasamples=["unassalpha"],
                compression="zlib",
                predictor=tifffile.PREDICTOR.HORIZONTAL,
                resolution=(per_cm(size_x), per_cm(size_y)),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                description=None if level else legend(context, channel, window).encode(),
                software=f"gigacam {version('gigacam')}",
                metadata=None,
            )


def _drawn(
    context: ExportContext, channel: int, level: int, window: tuple[float, float], start: int, stop: int
) -> NDArray[Any]:
    """`(rows, W, 4)` uint8; outlines and hatches go on from part to part."""
    signed = context.info.channels[channel].signed
    image, coverage = context.heatmap.image(level), context.heatmap.coverage(level, channel)
    width = context.info.grid.levels[level][1]
    top = max(start - _HALO, 0)
    drawn = np.empty((stop - start, width, 4), np.uint8)
    for left in range(0, width, _COLUMNS):
        first, last = max(left - _HALO, 0), min(left + _COLUMNS, width)
        part = slice(top, stop + _HALO), slice(first, last + _HALO)
        values, codes = np.asarray(image[(channel, *part)]), np.asarray(coverage[part])
        over = layer(values, codes, window, signed, colours(signed), (top, first))
        inner = over[start - top : stop - top, left - first : last - first]
        drawn[:, left:last] = np.rint(inner * 255)
    return drawn


def legend(context: ExportContext, channel: int, window: tuple[float, float]) -> str:
    """How the colours are to be read, then the statement."""
    row = context.info.channels[channel]
    low, high = window
    scale = (
        f"blue {low:.6g} - transparent 0 - orange {high:.6g}; orange speaks for the target, blue against it"
        if row.signed
        else f"viridis, dark {low:.6g} - yellow {high:.6g}"
    )
    ends = "|value| of the window's end" if row.signed else "the window"
    lines = [
        statement.text(context, (channel,)),
        f"Colour: {scale}; {UNITS[row.unit]}; values beyond the window take its end colours",
        f"Opacity grows with the value to {FULL_ALPHA:.0%}; below {SHOWN_FROM:.0%} of {ends} nothing is drawn",
        "Outlined: evaluated. Grey hatch: failed, no value. Dimmed: left out by choice. Bluish: not computed yet. "
        "No outline around it: not evaluated",
        "Levels are means over the evaluated px below: small hot spots are paler at low magnification",
    ]
    return "\n".join(lines)
