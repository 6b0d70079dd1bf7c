"""`neuroglancer.json`: a state of Neuroglancer with a layer a channel, coloured as everywhere here, NaN transparent.

Neuroglancer takes OME-Zarr's pixel centres as they are meant: the centre of level-0 px 0 of the source is its origin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.run import HeatmapInfo
from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.overlay import FULL_ALPHA, SHOWN_FROM
from workers.export.overview import display_window
from workers.export.served import heatmap_url
from workers.export.words import INTENDED_USE, target
from workers.store.ngff import axis_names
from workers.store.statistics import strongest

STOPS = 33
"""Colours a shader interpolates between: within 3 of 255 of the whole table."""
SCREEN_PX = 900
"""The image as a whole fits into so many at first."""
_METRES = {"um": 1e-6, "mm": 1e-3}


def write(context: ExportContext, path: Path) -> None:
    """The row `neuroglancer`."""
    path.write_text(json.dumps(state(context), indent=1), encoding="utf-8")


def state(context: ExportContext) -> dict[str, Any]:
    """Neuroglancer's JSON state: one layer a channel, the first one shown; the source's too where `--source-url` names it.

    Raises
    ------
    SpecError
        There is no `--url`.
    """
    info = context.info
    axes = axis_names(info, False)
    url = heatmap_url(context, "neuroglancer")
    layers: list[dict[str, Any]] = []
    if context.options.source_url:
        layers.append({"type": "image", "name": "source", "source": context.options.source_url})
    for i, channel in enumerate(context.channels):
        row = info.channels[channel]
        layers.append(
            {
                "type": "image",
                "name": row.label,
                "source": f"{url}/|zarr3:",
                "localDimensions": {"c'": [1, ""]},
                "localPosition": [channel],
                "shader": shader(info, channel),
                "shaderControls": {"heat": {"range": list(display_window(context.heatmap, channel, 0))}},
                "opacity": 1,
                "visible": i == 0,
            }
        )
    dimensions = {
        axis: [spacing * _METRES[info.spacing_unit], "m"]
        for axis, spacing in zip(reversed(axes), reversed(info.spacing), strict=True)
    }
    return {
        "title": f"{context.image_id}: {INTENDED_USE}",
        "dimensions": dimensions,
        "position": position(_start(context)),
        "crossSectionScale": max(info.grid.shape_l0) / SCREEN_PX,
        "layers": layers,
        "layout": "xy" if context.kind == "slide" else "4panel",
        "gigacam": statement.facts(context),
    }


def position(at_l0: Sequence[float]) -> list[float]:
    """Neuroglancer's (x, y[, z]) of a level-0 point in array order, where px `i` spans `[i, i + 1)`."""
    return [v - 0.5 for v in reversed(at_l0)]


def _start(context: ExportContext) -> list[float]:
    """Where one looks first: a slide's middle, a volume's strongest voxel."""
    grid = context.info.grid
    hot = strongest(context.heatmap.as_dask(0, context.channels[0])) if context.kind == "volume" else None
    if hot is None:
        return [n / 2 for n in grid.shape_l0]
    return [(h + 0.5) * d for h, d in zip(hot, grid.downsample, strict=True)]


def shader(info: HeatmapInfo, channel: int) -> str:
    """GLSL: colour map, window and threshold as controls; opacity grows with strength, NaN is transparent."""
    row = info.channels[channel]
    table = colours(row.signed)[np.linspace(0, 255, STOPS).round().astype(int)] / 255
    stops = ", ".join(f"vec3({r:.4f}, {g:.4f}, {b:.4f})" for r, g, b in table)
    strength = "abs(2.0 * share - 1.0)" if row.signed else "share"
    return f"""// {INTENDED_USE}
// {row.label} ({row.unit}): {target(row)}. Run {info.run_id}
#uicontrol invlerp heat
#uicontrol float threshold slider(min=0, max=1, default={SHOWN_FROM})
const vec3 stops[{STOPS}] = vec3[{STOPS}]({stops});
void main() {{
  float value = toRaw(getDataValue());
  if (isnan(value) || value != value) {{ emitTransparent(); return; }}
  float share = heat();
  float strength = {strength};
  if (strength < threshold) {{ emitTransparent(); return; }}
  float at = share * {STOPS - 1}.0;
  int low = int(min(floor(at), {STOPS - 2}.0));
  vec3 colour = mix(stops[low], stops[low + 1], at - float(low));
  float grown = clamp((strength - threshold) / max(1.0 - threshold, 1e-6), 0.0, 1.0);
  emitRGBA(vec4(colour, {FULL_ALPHA} * pow(grown, 0.6)));
}}
"""
