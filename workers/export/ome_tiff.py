"""`heatmap.ome.tif`: the raw values as pyramidal OME-TIFF, for QuPath, Fiji, OMERO and whatever reads Bio-Formats."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from workers.export import statement
from workers.export.context import ExportContext
from workers.export.pyramid import TILE, per_cm, tiles_of
from workers.export.words import INTENDED_USE, UNITS

NAMESPACE = "gigacam/heatmap"


def write(context: ExportContext, path: Path) -> None:
    """BigTIFF, float32, channels as C, levels as SubIFDs of factor 2, NaN where nobody looked.

    The levels are the heatmap's own: a mean over the evaluated px, while a general reader's downsampling would let
    one NaN take its whole neighbourhood. Physical sizes are those of a heatmap px. A reader that counts from the
    outer corner of px 0 finds every px where it lies on the slide; OME has no field for the half-pixel shift
    of one that counts from px centres, so it is in the map annotation.
    """
    channels, levels = context.channels, context.info.grid.levels
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tif:
        for level, shape in enumerate(levels):
            size_y, size_x = _px_um(context, level)
            extra: dict[str, Any] = (
                {"subfiletype": 1} if level else {"subifds": len(levels) - 1, "metadata": _ome(context)}
            )
            tif.write(
                _planes(context, level),
                shape=(len(channels), *shape),
                dtype=np.float32,
                tile=(TILE, TILE),
                photometric="minisblack",
                compression="zlib",  # without the predictor for floats: Bio-Formats cannot read it
                resolution=(per_cm(size_x), per_cm(size_y)),
                resolutionunit="CENTIMETER",
                software=f"gigacam {version('gigacam')}",
                **extra,
            )


def _planes(context: ExportContext, level: int) -> Iterator[NDArray[Any]]:
    height, width = context.info.grid.levels[level]
    array = context.heatmap.image(level)
    for c in context.channels:
        yield from tiles_of((height, width), partial(_rows, array, c), np.nan)


def _rows(array: Any, channel: int, start: int, stop: int) -> NDArray[Any]:
    return np.asarray(array[channel, start:stop])


def _px_um(context: ExportContext, level: int = 0) -> tuple[float, float]:
    info = context.info
    y, x = (s * d * 2**level for s, d in zip(info.spacing, info.grid.downsample, strict=True))
    return y, x


def _ome(context: ExportContext) -> dict[str, Any]:
    """OME metadata in tifffile's words."""
    info, said = context.info, statement.facts(context)
    size_y, size_x = _px_um(context)
    y, x = info.grid.downsample
    facts = {
        "intended_use": INTENDED_USE,
        "run_id": info.run_id,
        "software": said["software"],
        "complete": str(info.complete).lower(),
        "missing": said["missing"],
        "slide_size_l0 (x, y)": " ".join(map(str, reversed(info.grid.shape_l0))),
        "downsample (x, y)": f"{x} {y}",
        "origin": "outer corner of px 0 = outer corner of the slide's level-0 px 0",
        "centre_of_px_0 (x, y) um": f"{size_x / 2:.10g} {size_y / 2:.10g} from that corner",
        "levels": "each a mean of 2 x 2 evaluated px of the one below; sizes round up",
    }
    for n, c in enumerate(context.channels):
        row = info.channels[c]
        facts[f"channel {n} method"] = row.method
        facts[f"channel {n} target"] = row.target
        facts[f"channel {n} unit"] = UNITS[row.unit]
        if info.display:
            facts[f"channel {n} display window"] = "{:.9g} {:.9g}".format(*info.display[c])
    return {
        "axes": "CYX",
        "Creator": said["software"],
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAMESPACE}/{info.run_id}/{context.channels}")),
        "Name": context.image_id,
        "Description": statement.text(context),
        "PhysicalSizeX": size_x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": size_y,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [info.channels[c].label for c in context.channels]},
        "MapAnnotation": {"Namespace": NAMESPACE, **{k: v for k, v in facts.items() if v}},
    }
