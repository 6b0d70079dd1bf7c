"""Polygons of a GeoJSON file, turned from its (x, y) order to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas.errors import SpecError

Polygon = tuple[tuple[float, float], ...]


def read_polygons(path: str | Path) -> tuple[Polygon, ...]:
    """Outer rings of every polygon in `path`, as level-0 `(y, x)` points.

    Raises
    ------
    SpecError
        The file is no GeoJSON, or holds no polygon.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path}: not readable as GeoJSON ({error}); --region expects polygons in level-0 pixels"
        raise SpecError(msg) from error
    try:
        found = tuple(_polygons(document))
    except (LookupError, TypeError, ValueError) as error:
        msg = f"{path}: a polygon without a ring of (x, y) points ({error}); --region expects polygons in level-0 pixels"
        raise SpecError(msg) from error
    if not found:
        msg = f"{path}: found no Polygon or MultiPolygon; --region expects polygons in level-0 pixels"
        raise SpecError(msg)
    return found


def _polygons(node: Any) -> list[Polygon]:
    if isinstance(node, list):
        return [polygon for child in node for polygon in _polygons(child)]
    if not isinstance(node, dict):
        return []
    kind = node.get("type")
    if kind == "Polygon":
        return [_ring(node["coordinates"][0])]
    if kind == "MultiPolygon":
        return [_ring(part[0]) for part in node["coordinates"]]
    return [p for key in ("features", "geometry", "geometries") for p in _polygons(node.get(key))]


def _ring(points: list[list[float]]) -> Polygon:
    return tuple((float(point[1]), float(point[0])) for point in points)
