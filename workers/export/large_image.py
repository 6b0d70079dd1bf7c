"""`large_image.json`: an annotation for the Digital Slide Archive, uploaded beside the slide in HistomicsUI."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.overlay import heat_alpha
from workers.export.overview import display_window
from workers.export.words import INTENDED_USE, UNITS

MOST_VALUES = 250_000
"""Of a grid: the archive keeps an element as one document."""
_STOPS = 9


def write(context: ExportContext, path: Path) -> None:
    """One `griddata` element a channel (of signed maps two: for the target, against it), values at px centres.

    The format has no value for "nobody looked", and a viewer takes a missing one for zero. So a value is a magnitude
    from zero on, and -1, which is drawn transparent, stands where nobody looked (and, in one of the two elements of
    a signed map, where the value has the other sign); each element's `user` says so.
    """
    info = context.info
    level = next(
        (n for n, shape in enumerate(info.grid.levels) if math.prod(shape) <= MOST_VALUES),
        len(info.grid.levels) - 1,
    )
    elements = [
        _element(context, c, level, sign)
        for c in context.channels
        for sign in ((1, -1) if info.channels[c].signed else (1,))
    ]
    down_y, down_x = info.grid.downsample
    annotation = {
        "name": f"gigacam {context.image_id}",
        "description": statement.text(context),
        "attributes": {
            **statement.facts(context),
            # Its id is given when the picture is uploaded, so that no element can name it here.
            "image_overlay": {
                "how": "upload a file of the export `rgba` as an item, and add an element of type image with its id as girderId",
                "element": {
                    "type": "image",
                    "hasAlpha": True,
                    "opacity": 1,
                    "transform": {"xoffset": 0, "yoffset": 0, "matrix": [[down_x, 0], [0, down_y]]},
                },
            },
        },
        "elements": elements,
    }
    path.write_text(json.dumps(annotation, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _element(context: ExportContext, channel: int, level: int, sign: int) -> dict[str, Any]:
    info = context.info
    row = info.channels[channel]
    values = np.asarray(context.heatmap.image(level)[channel]) * np.float32(sign)
    shown = np.isfinite(values) & ((values >= 0) if row.signed else True)
    dy, dx = (d * 2**level for d in info.grid.downsample)
    low, high = display_window(context.heatmap, channel, 0)
    shift = 0.0 if row.signed else min(low, 0.0)
    stops = np.linspace(0 if row.signed else low, high, _STOPS)
    label = row.label if sign > 0 else f"against {row.label}"
    palette = _palette(row.signed, sign)
    return {
        "type": "griddata",
        "interpretation": "contour",
        "label": {"value": f"{label} [{UNITS[row.unit]}]"},
        "group": label,
        # Values stand at the centres of heatmap px, in px that count from the slide's outer corner.
        "origin": [dx / 2, dy / 2, 0],
        "dx": dx,
        "dy": dy,
        "gridWidth": values.shape[1],
        "values": _numbers(np.where(shown, values - shift, -1)),
        "rangeValues": [float(v) - shift for v in stops],
        "colorRange": palette,
        "minColor": "rgba(0, 0, 0, 0)",
        "maxColor": palette[-1],
        "user": {
            "intended_use": INTENDED_USE,
            "run_id": info.run_id,
            "method": row.method,
            "target": row.target,
            "unit": UNITS[row.unit],
            "sign": sign,
            "value": f"raw value * {sign}" if row.signed else f"raw value - {shift:g}",
            "no_value": -1,
            "missing": statement.missing(context),
        },
    }


def _palette(signed: bool, sign: int) -> list[str]:
    """Colours from zero to the window's end, with their opacity."""
    shares = np.linspace(0, 1, _STOPS)
    table = colours(signed)
    index = np.rint((0.5 + sign * shares / 2 if signed else shares) * 255).astype(int)
    return [
        f"rgba({r}, {g}, {b}, {a:.3f})"
        for (r, g, b), a in zip(table[index].tolist(), heat_alpha(shares).tolist(), strict=True)
    ]


def _numbers(values: NDArray[Any]) -> list[float]:
    """Row by row, to seven digits."""
    return [float(f"{v:.7g}") for v in values.ravel().tolist()]
