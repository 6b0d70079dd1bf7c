"""A contact sheet: every method's map of one image side by side, with what is known to be there outlined."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.heatmap import Coverage
from workers.export import words
from workers.export.figure import DPI, colours, save_figure
from workers.export.overlay import compose, heat_rgba, level_for, place
from workers.export.overview import display_window, rgb
from workers.export.planes import VIEWS, grey, oriented, plane_shape, read_plane
from workers.readers.overview import read_overview
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore

COLUMNS = 6
PANEL_IN = 2.35
CAPTION_IN = 0.66
SLIDE_PX = 2048
"""Longest side at which a slide is read; only what was evaluated is drawn of it."""
AROUND = 0.01
"""Share of the picture's longest side kept around what was evaluated."""


@dataclass(frozen=True)
class Outline:
    """One thing that is known to be there."""

    name: str
    values: tuple[int, ...]
    """Of the truth image."""
    style: Literal["solid", "dashed", "dotted"]
    """Of its line."""


@dataclass(frozen=True)
class _Picture:
    """What all panels share."""

    ground: NDArray[np.uint8]
    """`(H, W, 3)`."""
    coverage: Mapping[str, NDArray[np.uint8]]
    """By label: channels may differ in it."""
    truth: NDArray[Any]
    heats: tuple[NDArray[np.float32], ...]
    where: str


def write_contact_sheet(
    path: str | os.PathLike[str],
    reader: Reader,
    truth: Reader,
    heatmap: HeatmapStore,
    outlines: Sequence[Outline],
    captions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Draw all channels of a heatmap, small, each in its own display window, as PNG.

    Parameters
    ----------
    reader, truth
        The image, and the truth over the same level-0 pixels.
    outlines
        What to draw of the truth, over each panel.
    captions
        By channel label: lines under its name, such as how well it found the truth.
    notes
        Lines at the foot.
    """
    draw = _slide if reader.meta.kind == "slide" else _plane
    picture = draw(reader, truth, heatmap)
    path = Path(path)
    save_figure(
        _figure(heatmap.path.resolve().parent.name, heatmap, picture, outlines, captions, notes), path
    )
    return path


def _slide(reader: Reader, truth: Reader, heatmap: HeatmapStore) -> _Picture:
    """What was evaluated of a slide, seen from above."""
    info = heatmap.info
    step = max(1, -(-max(reader.meta.shape_l0) // SLIDE_PX))
    pixels, picture_l0, _ = read_overview(reader, spacing=tuple(s * step for s in info.spacing))
    shape = pixels.shape[1:]
    labels, truth_l0, _ = read_overview(truth, spacing=tuple(s * step for s in info.spacing))
    level = level_for(len(info.grid.levels), info.grid.downsample, picture_l0)
    heat_l0 = [d * 2**level for d in info.grid.downsample]
    coverage = {
        label: place(np.asarray(heatmap.label(label, level)[...]), heat_l0, shape, picture_l0)
        for label in info.labels
    }
    crop = _around(coverage["coverage"] == Coverage.EVALUATED)
    heats = [
        place(np.asarray(heatmap.image(level)[c]), heat_l0, shape, picture_l0)[crop]
        for c in range(len(info.channels))
    ]
    size = [words.length((s.stop - s.start) * d * p, info.spacing_unit)
            for s, d, p in zip(crop, picture_l0, info.spacing, strict=True)]  # fmt: skip
    return _Picture(
        rgb(pixels)[crop],
        {label: codes[crop] for label, codes in coverage.items()},
        place(labels[0], truth_l0, shape, picture_l0)[crop],
        tuple(heats),
        f"{size[1]} × {size[0]} of the slide",
    )


def _plane(reader: Reader, truth: Reader, heatmap: HeatmapStore) -> _Picture:
    """The axial plane of a volume that cuts the most kinds of what is known to be there, and the most of each."""
    meta, info, view = reader.meta, heatmap.info, VIEWS[0]
    whole = Box(frame="l0", start=(0,) * 3, stop=meta.shape_l0)
    labels = truth.read(whole, meta.shape_l0, 0)[0][0]
    kinds = [labels == value for value in np.unique(labels) if value]
    area = np.array([kind.sum((1, 2)) for kind in kinds])
    z = int(np.sqrt(area).sum(0).argmax())
    voxel = (z, *(n // 2 for n in meta.shape_l0[1:]))
    shape = plane_shape(meta, view)
    picture_l0 = [meta.shape_l0[a] / n for a, n in zip((1, 2), shape, strict=True)]
    level = level_for(len(info.grid.levels), info.grid.downsample[1:], picture_l0)
    heat_l0 = [d * 2**level for d in info.grid.downsample[1:]]
    z_hm = z // info.grid.downsample[0] >> level
    coverage = {
        label: place(np.asarray(heatmap.label(label, level)[z_hm]), heat_l0, shape, picture_l0)
        for label in info.labels
    }
    heats = [
        place(np.asarray(heatmap.image(level)[c, z_hm]), heat_l0, shape, picture_l0)
        for c in range(len(info.channels))
    ]
    (ground,) = grey([read_plane(reader, view, voxel)], [coverage["coverage"] == Coverage.EVALUATED])
    return _Picture(
        oriented(ground),
        {label: oriented(codes) for label, codes in coverage.items()},
        oriented(place(labels[z], (1.0, 1.0), shape, picture_l0)),
        tuple(oriented(heat) for heat in heats),
        f"axial slice {z + 1} of {meta.shape_l0[0]}, the patient's right on the left",
    )


def _around(evaluated: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of what was evaluated, and a little around it; everything where nothing was."""
    margin = int(AROUND * max(evaluated.shape))
    crop = []
    for axis, n in enumerate(evaluated.shape):
        hit = np.flatnonzero(evaluated.any(1 - axis))
        low, high = (hit[0], hit[-1] + 1) if hit.size else (0, n)
        crop.append(slice(max(0, int(low) - margin), min(n, int(high) + margin)))
    return crop[0], crop[1]


def _figure(
    title: str,
    heatmap: HeatmapStore,
    picture: _Picture,
    outlines: Sequence[Outline],
    captions: Mapping[str, str],
    notes: Sequence[str],
) -> Figure:
    info = heatmap.info
    rows = -(-(1 + len(info.channels)) // COLUMNS)
    tall = PANEL_IN * picture.ground.shape[0] / picture.ground.shape[1]
    width = COLUMNS * PANEL_IN + (COLUMNS + 1) * 0.12
    foot = [line for note in notes for line in textwrap.wrap(note, int(width * 13))]
    head, row, legend = 0.95, tall + CAPTION_IN, 0.85
    height = head + rows * row + legend + 0.17 * len(foot) + 0.4
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def text(x: float, y: float, said: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, said, va="top", **style)

    def axes(x: float, y: float, wide: float, high: float) -> Axes:
        made = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
        made.set_xticks([])
        made.set_yticks([])
        return made

    text(0.12, 0.12, f"{title}: {len(info.channels)} maps", size=15, weight="bold")
    target = info.channels[0].target
    text(
        0.12,
        0.48,
        f"Target: {target}. {picture.where[0].upper()}{picture.where[1:]}.",
        size=10,
        color="#444444",
    )
    _outline_key(figure, outlines, width, height)
    for i in range(1 + len(info.channels)):
        x = 0.12 + i % COLUMNS * (PANEL_IN + 0.12)
        y = head + i // COLUMNS * row
        panel = axes(x, y, PANEL_IN, tall)
        if i == 0:
            shown, name, lines = picture.ground, "without heat", ""
        else:
            channel = info.channels[i - 1]
            low, high = window = display_window(heatmap, i - 1, 0)
            args = (window, channel.signed, colours(channel.signed))
            coverage = picture.coverage[info.label_of(channel)]
            shown = compose(picture.ground, picture.heats[i - 1], coverage, *args)
            name = channel.method
            scale = (
                f"{words.number(low)} to {words.number(high)}"
                if not channel.signed
                else f"±{words.number(high)}"
            )
            lines = f"{captions.get(channel.label, '')}\n{scale} {words.UNITS[channel.unit]}".strip()
        panel.imshow(shown, interpolation="antialiased")
        _draw_outlines(panel, picture.truth, outlines)
        text(x, y + tall + 0.04, name if len(name) < 30 else name[:28] + "…", size=9.5, weight="bold")
        text(x, y + tall + 0.2, lines, size=7.5, color="#222222", linespacing=1.25)
    y = head + rows * row + 0.12
    for x, signed, said in ((0.12, True, "signed maps: against the target, 0, for it"),
                            (width / 2, False, "maps without sign: lowest, highest of the window")):  # fmt: skip
        bar = axes(x, y, width / 2 - 0.5, 0.18)
        values = np.linspace(-1 if signed else 0, 1, 512, dtype=np.float32)[None]
        rgba = heat_rgba(values, (-1, 1) if signed else (0, 1), signed, colours(signed))
        ground = np.median(picture.ground.reshape(-1, 3), axis=0) / 255
        bar.imshow(rgba[..., :3] * rgba[..., 3:] + ground * (1 - rgba[..., 3:]), aspect="auto")
        text(x, y + 0.22, said + "; each panel in the window written under it", size=8.5, color="#222222")
    y += legend - 0.25
    for line in foot:
        text(0.12, y, line, size=8.5, color="#444444")
        y += 0.17
    text(0.12, y + 0.06, words.INTENDED_USE, size=9, weight="bold", color="#8a1c1c")
    return figure


HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.2, foreground="white")]
"""So that black lines stay visible on dark ground."""


def _draw_outlines(panel: Axes, truth: NDArray[Any], outlines: Sequence[Outline]) -> None:
    for outline in outlines:
        inside = np.isin(truth, outline.values)
        if inside.any() and not inside.all():
            drawn = panel.contour(inside, [0.5], colors="black", linewidths=1.0, linestyles=outline.style)
            drawn.set_path_effects(HALO)


def _outline_key(figure: Figure, outlines: Sequence[Outline], width: float, height: float) -> None:
    lines = [
        Line2D([], [], color="black", linewidth=1.2, linestyle=o.style, path_effects=HALO) for o in outlines
    ]
    figure.legend(
        lines, [o.name for o in outlines], loc="upper right", ncols=max(1, len(lines)), frameon=False,
        bbox_to_anchor=(1 - 0.05 / width, 1 - 0.3 / height), fontsize=10, handlelength=3,
    )  # fmt: skip
