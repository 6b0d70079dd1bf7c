"""`figure.png`: the overview once more, at print resolution and with the channels asked for."""

from __future__ import annotations

from pathlib import Path

from workers.export.context import ExportContext
from workers.export.figure import save_figure
from workers.export.overview import overview_figure

LONGEST_PX = 4000
DPI = 300


def write(context: ExportContext, path: Path) -> None:
    """Image and image under heat, legend, scale bar, intended use; the source is read again."""
    tiles = context.stored_tiles.info if context.stored_tiles is not None else None
    with context.source() as reader:
        figure = overview_figure(reader, context.heatmap, tiles, context.channels, LONGEST_PX)
        save_figure(figure, path, DPI)
