"""`vitessce.json`: a view configuration of Vitessce, the heatmap as an image with a layer a channel.

Vitessce takes OME-Zarr's translation for that of a pixel's corner; a transformation in the file's options takes that
half pixel back, so that the corner of the heatmap is the corner of the source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers.export import statement
from workers.export.context import ExportContext
from workers.export.overview import display_window
from workers.export.served import heatmap_url
from workers.store.ngff import omero

VERSION = "1.0.17"
COLOURS = {False: "viridis", True: "rdbu"}
"""Of Vitessce's own, by whether values are signed; both can be told apart in colour blindness."""
OPACITY = 0.6
_DUMMY = "__dummy__"
"""What Vitessce writes for the value of a scope that only groups others."""


def write(context: ExportContext, path: Path) -> None:
    """The row `vitessce`."""
    path.write_text(json.dumps(configuration(context), indent=1), encoding="utf-8")


def configuration(context: ExportContext) -> dict[str, Any]:
    """Vitessce's view configuration: a spatial view, its layers (the first one shown), and the statement.

    Raises
    ------
    SpecError
        There is no `--url`.
    """
    info = context.info
    url = heatmap_url(context, "vitessce")
    back = [0.0, *(-s * (d - 1) / 2 for s, d in zip(info.spacing, info.grid.downsample, strict=True))]
    colours = omero(info).channels
    names = [str(c) for c in context.channels]
    rows = dict(zip(names, context.channels, strict=True))
    signed = {n: info.channels[c].signed for n, c in rows.items()}
    space: dict[str, dict[str, Any]] = {
        "dataset": {"A": "A"},
        "fileUid": {"heat": "heat"},
        "imageLayer": dict.fromkeys(names, _DUMMY),
        "imageChannel": dict.fromkeys(names, _DUMMY),
        "photometricInterpretation": {"heat": "BlackIsZero"},
        "spatialLayerVisible": {n: n == names[0] for n in names},
        "spatialLayerOpacity": dict.fromkeys(names, OPACITY),
        "spatialLayerColormap": {n: COLOURS[signed[n]] for n in names},
        "spatialTargetC": dict(rows),
        "spatialChannelVisible": dict.fromkeys(names, True),
        "spatialChannelOpacity": dict.fromkeys(names, 1.0),
        "spatialChannelColor": {n: list(bytes.fromhex(colours[c].color)) for n, c in rows.items()},
        "spatialChannelWindow": {n: list(display_window(context.heatmap, c, 0)) for n, c in rows.items()},
        "metaCoordinationScopes": {"heat": {"imageLayer": names}},
        "metaCoordinationScopesBy": {
            "heat": {
                "imageLayer": {
                    "fileUid": dict.fromkeys(names, "heat"),
                    "photometricInterpretation": dict.fromkeys(names, "heat"),
                    **{
                        kind: {n: n for n in names}
                        for kind in ("spatialLayerVisible", "spatialLayerOpacity", "spatialLayerColormap")
                    },
                    "imageChannel": {n: [n] for n in names},
                },
                "imageChannel": {
                    kind: {n: n for n in names}
                    for kind in (
                        "spatialTargetC",
                        "spatialChannelVisible",
                        "spatialChannelOpacity",
                        "spatialChannelColor",
                        "spatialChannelWindow",
                    )
                },
            }
        },
    }
    scopes = {"dataset": "A", "metaCoordinationScopes": ["heat"], "metaCoordinationScopesBy": ["heat"]}
    if context.kind == "volume":
        space["spatialTargetZ"] = {"middle": info.grid.levels[0][0] // 2}
        scopes["spatialTargetZ"] = "middle"
    said = statement.text(context)
    return {
        "version": VERSION,
        "name": context.image_id,
        "description": said,
        "datasets": [
            {
                "uid": "A",
                "name": context.image_id,
                "files": [
                    {
                        "fileType": "image.ome-zarr",
                        "url": url,
                        "options": {
                            "coordinateTransformations": [{"type": "translation", "translation": back}]
                        },
                        "coordinationValues": {"fileUid": "heat"},
                    }
                ],
            }
        ],
        "coordinationSpace": space,
        "layout": [
            {"component": "spatialBeta", "coordinationScopes": scopes, "x": 0, "y": 0, "w": 8, "h": 12},
            {
                "component": "layerControllerBeta",
                "coordinationScopes": scopes,
                "x": 8,
                "y": 0,
                "w": 4,
                "h": 8,
            },
            {
                "component": "description",
                "coordinationScopes": {"dataset": "A"},
                "props": {"description": said},
                "x": 8,
                "y": 8,
                "w": 4,
                "h": 4,
            },
        ],
        "initStrategy": "auto",
    }
