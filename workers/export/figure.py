"""Figures of overviews: panels, legends and text laid out in inches, drawn by matplotlib without any global state."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from schemas.heatmap import Coverage
from workers.export.overlay import Rgb, compose, heat_rgba
from workers.export.words import COVERAGE_WORDS, INTENDED_USE, length, nice_length, number, power_of_ten, unit

DPI = 130
MARGIN = 0.35
GAP = 0.25
TITLE_BAND = 0.3
"""Inches above each panel for its title."""
LEGEND_WIDTH = 3.3
LEGEND_HEIGHT = 4.4
MOST_WIDTH = 13.0
MOST_HEIGHT = {1: 8.5, 2: 6.0, 3: 5.0, 4: 4.6}
"""Of one block, by the number of blocks."""
LEAST_PANEL = 2.2
LINE = 0.19
_LEGEND_CHARS = 46


@dataclass(frozen=True)
class Panel:
    """One picture of known physical size."""

    picture: NDArray[np.uint8]
    size: tuple[float, float]
    """Height and width, in the block's unit."""
    title: str
    edges: tuple[str, str, str, str] = ("", "", "", "")
    """Orientation letters: left, right, top, bottom."""
    cross: tuple[float, float] | None = None
    """Where a cross-hair points, as shares of height and width from the top left."""


@dataclass(frozen=True)
class Legend:
    """All one has to know to read the heat of a block."""

    method: str
    lines: tuple[str, ...]
    unit: str
    signed: bool
    window: tuple[float, float]
    ground: Rgb
    """Typical colour below the heat, for a colour bar that looks as the heat does."""
    empty: Rgb
    """Typical colour of the background."""
    area: str
    """What the shares of `coverage` are shares of."""
    coverage: tuple[tuple[Coverage, float], ...]
    """What occurs, and its share of the area drawn."""


@dataclass(frozen=True)
class Block:
    """One channel: rows of panels beside a legend."""

    rows: tuple[tuple[Panel, ...], ...]
    legend: Legend
    unit: str


@cache
def colours(signed: bool) -> NDArray[np.uint8]:
    """`(256, 3)` colour table, read-only: viridis, or blue - grey - orange about zero.

    Blue and orange are told apart in every common form of colour blindness, and neither occurs in haematoxylin and
    eosin: the red, purple and brown ends of the ready-made diverging maps vanish in stained tissue.
    """
    if signed:
        stops = ["#00429d", "#2aa9e0", "#e8e8e8", "#ffc61a", "#e06a00"]
        table = np.asarray(LinearSegmentedColormap.from_list("signed", stops)(np.linspace(0, 1, 256)))
    else:
        table = np.asarray(mpl.colormaps["viridis"](np.linspace(0, 1, 256)))
    made = np.asarray(np.rint(table[:, :3] * 255), np.uint8)
    made.setflags(write=False)
    return made


def make_figure(title: str, subtitle: str, blocks: Sequence[Block], notes: Sequence[str]) -> Figure:
    """Lay out title, blocks from top to bottom, notes and intended use."""
    laid = [_lay_out(block, MOST_HEIGHT[len(blocks)]) for block in blocks]
    width = max(2 * MARGIN + GAP + LEGEND_WIDTH + max(layout.width for layout in laid), 10.0)
    characters = int(width * 11)
    head = textwrap.wrap(title, int(width * 6.5), break_on_hyphens=False) or [""]
    foot = [line for note in notes for line in textwrap.wrap(note, characters)]
    head_height = 0.3 * len(head) + 0.35
    foot_height = LINE * len(foot) + 0.35
    height = 2 * MARGIN + head_height + foot_height + sum(layout.height + GAP for layout in laid)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    page = _Page(figure, width, height)

    y = MARGIN
    for line in head:
        page.text(MARGIN, y, line, size=15, weight="bold")
        y += 0.3
    page.text(MARGIN, y, subtitle, size=10, color="#444444")
    y = MARGIN + head_height
    for block, layout in zip(blocks, laid, strict=True):
        _draw_block(page, block, layout, y)
        _draw_legend(page, block.legend, width - MARGIN - LEGEND_WIDTH, y)
        y += layout.height + GAP
    for line in foot:
        page.text(MARGIN, y, line, size=9, color="#444444")
        y += LINE
    page.text(MARGIN, y + 0.08, INTENDED_USE, size=10, weight="bold", color="#8a1c1c")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = DPI) -> None:
    """Write as PNG; the same figure gives the same bytes, and no reader sees half of it."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    figure.savefig(
        part,
        format="png",
        dpi=dpi,
        metadata={"Software": None, "Description": INTENDED_USE},
        pil_kwargs={"compress_level": 3},  # a third of the time of 6, for a file a tenth larger
    )
    os.replace(part, path)


@dataclass(frozen=True)
class _Page:
    """A figure addressed in inches from its top left."""

    figure: Figure
    width: float
    height: float

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        style = {"ha": "left", "va": "top", **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)  # type: ignore[arg-type]

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set_xticks([])
        axes.set_yticks([])
        return axes


@dataclass(frozen=True)
class _Layout:
    """Inches of a block."""

    scale: float
    """Inches a physical unit."""
    columns: tuple[float, ...]
    rows: tuple[float, ...]
    """Without the titles."""
    height: float

    @property
    def width(self) -> float:
        return sum(self.columns) + GAP * (len(self.columns) - 1)


def _lay_out(block: Block, most_height: float) -> _Layout:
    heights = [max(p.size[0] for p in row) for row in block.rows]
    widths = [max(p.size[1] for p in column) for column in zip(*block.rows, strict=True)]
    gaps = GAP * (len(widths) - 1)
    scale = min((MOST_WIDTH - gaps) / sum(widths), (most_height - TITLE_BAND * len(heights)) / sum(heights))
    rows = tuple(h * scale for h in heights)
    drawn = sum(rows) + TITLE_BAND * len(rows) + GAP * (len(rows) - 1)
    columns = tuple(max(w * scale, LEAST_PANEL) for w in widths)
    return _Layout(scale, columns, rows, max(drawn, LEGEND_HEIGHT))


def _draw_block(page: _Page, block: Block, layout: _Layout, y: float) -> None:
    for r, (row, height) in enumerate(zip(block.rows, layout.rows, strict=True)):
        x = MARGIN
        for c, (panel, width) in enumerate(zip(row, layout.columns, strict=True)):
            drawn = (panel.size[0] * layout.scale, panel.size[1] * layout.scale)
            left, top = x + (width - drawn[1]) / 2, y + TITLE_BAND + (height - drawn[0]) / 2
            page.text(x + width / 2, top - 0.07, panel.title, size=10.5, ha="center", va="bottom")
            axes = page.axes(left, top, drawn[1], drawn[0])
            _draw_panel(axes, panel)
            if r == c == 0:
                _draw_scale_bar(axes, panel, block.unit, drawn)
            x += width + GAP
        y += TITLE_BAND + height + GAP


def _draw_panel(axes: Axes, panel: Panel) -> None:
    # Shares of the panel from its top left are its coordinates, whatever the picture's pixels.
    axes.imshow(panel.picture, extent=(0, 1, 1, 0), aspect="auto", interpolation="antialiased")
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    for spine in axes.spines.values():
        spine.set(color="#888888", linewidth=0.6)
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.02, "center", "top"),
        (0.5, 0.98, "center", "bottom"),
    )
    for letter, (x, y, ha, va) in zip(panel.edges, places, strict=True):
        if letter:
            axes.text(x, y, letter, ha=ha, va=va, size=11, weight="bold", color="white", bbox=_badge())
    if panel.cross is not None:
        down, right = panel.cross
        for low, high in ((0, -0.04), (0.04, 1)):
            start, stop = (low, right + high) if high < 0 else (right + low, high)
            axes.plot([start, stop], [down, down], color="#ffd400", linewidth=0.8)
            start, stop = (low, down + high) if high < 0 else (down + low, high)
            axes.plot([right, right], [start, stop], color="#ffd400", linewidth=0.8)


def _badge() -> dict[str, object]:
    return {"facecolor": (0, 0, 0, 0.55), "edgecolor": "none", "boxstyle": "round,pad=0.15"}


def _draw_scale_bar(axes: Axes, panel: Panel, unit: str, drawn: tuple[float, float]) -> None:
    size = nice_length(panel.size[1] * min(0.3, 2.0 / drawn[1]))
    share = size / panel.size[1]
    inch_x, inch_y = 1 / drawn[1], 1 / drawn[0]
    left, bottom = 0.18 * inch_x, 1 - 0.16 * inch_y
    back = (left - 0.1 * inch_x, bottom - 0.3 * inch_y)
    axes.add_patch(
        Rectangle(
            back,
            max(share, 0.75 * inch_x) + 0.2 * inch_x,
            0.38 * inch_y,
            facecolor="white",
            alpha=0.85,
            linewidth=0,
        )
    )
    axes.plot([left, left + share], [bottom, bottom], color="black", linewidth=3, solid_capstyle="butt")
    axes.text(left, bottom - 0.06 * inch_y, length(size, unit), size=9, va="bottom", ha="left")


def _draw_legend(page: _Page, legend: Legend, x: float, y: float) -> None:
    page.text(x, y + 0.05, legend.method, size=12, weight="bold")
    y += TITLE_BAND + 0.06
    for line in textwrap.wrap(legend.lines[0], _LEGEND_CHARS - 4):
        page.text(x, y, line, size=10)
        y += LINE
    y += 0.12
    axes = page.axes(x + 0.2, y, LEGEND_WIDTH - 0.45, 0.24)
    start, stop = legend.window
    bar = heat_rgba(
        np.linspace(start, stop, 512, dtype=np.float32)[None],
        legend.window,
        legend.signed,
        colours(legend.signed),
    )
    axes.imshow(
        bar[..., :3] * bar[..., 3:] + np.array(legend.ground, np.float32) / 255 * (1 - bar[..., 3:]),
        extent=(start, stop, 0, 1),
        aspect="auto",
    )
    ticks, power = np.linspace(start, stop, 5), power_of_ten(legend.window)
    axes.set_xticks(ticks, [number(float(t) / 10**power) for t in ticks], size=9)
    axes.tick_params(length=3, pad=2)
    page.text(x + LEGEND_WIDTH / 2 - 0.02, y + 0.5, unit(legend.unit, power), size=10, ha="center")
    y += 0.8
    for text in legend.lines[1:]:
        for line in textwrap.wrap(text, _LEGEND_CHARS):
            page.text(x, y, line, size=9, color="#222222")
            y += LINE
        y += 0.04
    y += 0.06
    page.text(x, y, f"Of {legend.area}:", size=9, color="#222222")
    y += LINE + 0.04
    for code, share in legend.coverage:
        patch = page.axes(x + 0.02, y, 0.3, 0.17)
        patch.imshow(
            swatch(code, legend.empty if code == Coverage.BACKGROUND else legend.ground), aspect="auto"
        )
        amount = "under 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
        page.text(x + 0.42, y, f"{COVERAGE_WORDS[code]} ({amount})", size=9)
        y += LINE + 0.06


def swatch(code: Coverage, ground: Rgb) -> NDArray[np.uint8]:
    """`(17, 30, 3)` sample of how a coverage code is drawn, made by the very code that draws it."""
    size = (17, 30)
    picture = np.full((*size, 3), ground, np.uint8)
    codes = np.full(size, code, np.uint8)
    values = np.full(size, np.nan, np.float32)
    return compose(picture, values, codes, (0, 1), False, colours(False))
