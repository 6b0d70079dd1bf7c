"""Exports of a finished heatmap: what is asked, and what came of it."""

from __future__ import annotations

from pydantic import Field

from schemas.frozen import Frozen


class ExportOptions(Frozen):
    """What the user settles for all exports of a command; never hashed, a heatmap does not depend on it."""

    channels: tuple[str, ...] = ()
    """By label (`gradcam:tumour`), method or index; empty: all."""
    threshold: float | None = None
    """Raw value (of signed maps: magnitude) from which px make up regions; None: half the display window."""
    max_regions: int = Field(default=10_000, ge=1)
    """Regions and tiles a file, each; the strongest are kept."""
    partial: bool = False
    """Export heatmaps that are not complete, too; the files say so."""
    url: str = ""
    """Address at which the output folder is served; viewers in a browser load the heatmap from there."""
    source_url: str = ""
    """Of the source, as Neuroglancer spells its data sources; empty: its state has the heatmap alone."""


class ExportReport(Frozen):
    """What came of one export of one image."""

    image_id: str
    name: str
    files: tuple[str, ...] = ()
    error: str = ""
    skipped: str = ""
    """Why the export does not apply to the image, such as a volume asked for as GeoJSON."""
    seconds: float = 0.0
