"""The losses of a training by epoch, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workers.export.figure import DPI, save_figure
from workers.export.words import INTENDED_USE

COLUMNS = 3
PANEL = (3.6, 2.6)
"""Inches, width and height."""
TRAIN, VALIDATION = "#00429d", "#e06a00"


@dataclass(frozen=True)
class Curve:
    """One fit."""

    name: str
    train: Sequence[float]
    """Mean loss of each epoch."""
    validation: Sequence[float]
    kept: int
    """The epoch, from 0, whose weights were kept."""


def write_learning_curves(path: str | os.PathLike[str], title: str, curves: Sequence[Curve]) -> Path:
    """Draw a panel a fit, all on one scale, as PNG."""
    path = Path(path)
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(
        figsize=(max(columns * PANEL[0], 6.5), rows * PANEL[1] + 1.3),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", size=13, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, curve in zip(grid.flat, curves, strict=False):
        epochs = range(1, len(curve.train) + 1)
        axes.plot(epochs, curve.train, color=TRAIN, label="training")
        axes.plot(epochs, curve.validation, color=VALIDATION, label="validation")
        axes.axvline(curve.kept + 1, color="#666666", linestyle=":", label="epoch kept")
        axes.set_title(f"{curve.name}: epoch {curve.kept + 1} of {len(curve.train)}", size=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel(INTENDED_USE, x=0.01, ha="left", size=8, color="#8a1c1c")
    save_figure(figure, path)
    return path
