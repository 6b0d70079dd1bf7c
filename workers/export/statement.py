"""What every export says of itself: intended use, run, model, channels, units, place on the source, what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from schemas.heatmap import TileStatus
from workers.export.context import ExportContext
from workers.export.words import INTENDED_USE, UNITS, cell, target


def facts(context: ExportContext, channels: Sequence[int] | None = None) -> dict[str, Any]:
    """The statement as JSON; plain values only.

    Parameters
    ----------
    channels
        Those in the file; None: those asked for.
    """
    info, tiles = context.info, context.stored_tiles
    rows = []
    for c in context.channels if channels is None else channels:
        row = info.channels[c]
        rows.append(
            {
                "index": c,
                "label": row.label,
                "method": row.method,
                "title": row.title,
                "edition": row.edition,
                "target": row.target,
                "explains": target(row),
                "unit": row.unit,
                "unit_in_words": UNITS[row.unit],
                "signed": row.signed,
                "value_range": list(info.value_range[c]) if info.value_range else None,
                "display_window": list(info.display[c]) if info.display else None,
                "display_scope": "all evaluated px of this image; the stored values are raw",
                "native_cell": cell(tiles.info.grids[row.method], info)
                if tiles is not None and row.method in tiles.info.grids
                else None,
            }
        )
    said: dict[str, Any] = {
        "intended_use": INTENDED_USE,
        "software": f"gigacam {version('gigacam')}",
        "image_id": context.image_id,
        "run_id": info.run_id,
        "tiles_id": info.tiles_id,
        "complete": info.complete,
        "missing": missing(context),
        "channels": rows,
        "registration": {
            "source_size_l0": list(info.grid.shape_l0),
            "downsample": list(info.grid.downsample),
            "origin_px": [0] * len(info.grid.shape_l0),
            "convention": "corner: px i of level n spans [i, i + 1) * downsample * 2**n level-0 px",
            "spacing_l0": list(info.spacing),
            "spacing_unit": info.spacing_unit,
            "axes": "zyx"[-len(info.spacing) :],
        },
        "nan": "NaN: nobody looked. 0: looked, and found nothing.",
    }
    if tiles is not None:
        card = tiles.info.spec.card
        said["model"] = {
            "name": card.get("name", ""),
            "version": card.get("version", ""),
            "sha256": card.get("network", {}).get("sha256", ""),
            "layer": tiles.info.spec.cam.layer,
            "intended_use": card.get("intended_use", ""),
        }
    return said


def missing(context: ExportContext) -> str:
    """What the heatmap lacks, in words; empty where it is whole."""
    lacks = []
    if not context.info.complete:
        lacks.append("PARTIAL: the heatmap was not complete when this was written")
    if context.stored_tiles is not None:
        status = context.stored_tiles.statuses()
        planned = context.stored_tiles.info.planned
        if failed := int(np.count_nonzero(status == TileStatus.FAILED)):
            lacks.append(f"{failed} of {planned} tiles failed and have no value")
    return "; ".join(lacks)


def text(context: ExportContext, channels: Sequence[int] | None = None) -> str:
    """The statement as lines, for formats that hold a description only."""
    said = facts(context, channels)
    unit = {"um": "µm"}.get(context.info.spacing_unit, context.info.spacing_unit)
    model = said.get("model", {})
    lines = [
        INTENDED_USE,
        f"Class activation map of {said['image_id']} by {said['software']}, run {said['run_id']}",
    ]
    if said["missing"]:
        lines.append(said["missing"])
    if model.get("name"):
        lines.append(f"Model {model['name']} {model['version']}, layer {model['layer']}".rstrip())
    for row in said["channels"]:
        kind = "signed" if row["signed"] else "unsigned"
        line = f"{row['label']}: {row['title'] or row['method']}; {row['explains']}; {kind}, {row['unit_in_words']}"
        if row["value_range"]:
            line += "; values {:.6g} to {:.6g}".format(*row["value_range"])
        if row["display_window"]:
            line += "; display window {:.6g} to {:.6g}".format(*row["display_window"])
        lines.append(line)
        if row["native_cell"]:
            lines.append(f"  {row['native_cell']}")
    factors = " x ".join(map(str, reversed(context.info.grid.downsample)))
    sizes = " x ".join(f"{s:g}" for s in reversed(context.info.spacing))
    lines.append(
        f"Registration: the outer corner of px 0 is the outer corner of the source's level-0 px 0; a px spans {factors} "
        f"level-0 px (x, y) of {sizes} {unit}, of pyramid level n 2^n times that"
    )
    lines.append(said["nan"])
    return "\n".join(lines)
