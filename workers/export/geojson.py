"""`regions.geojson`: strong regions as polygons and tiles as detections, in the slide's level-0 px, as QuPath reads them."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SpecError
from schemas.heatmap import ChannelInfo, TileStatus
from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.outlines import Region, Ring, area, regions
from workers.export.overview import display_window
from workers.export.tile_table import tile_rows
from workers.export.words import INTENDED_USE, UNITS

log = logging.getLogger("gigacam")

MOST_PX = 40_000_000
"""Regions are found on the finest level that is not larger: one channel of it is in memory."""

Feature = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """From which value on px are a region, and who says so."""

    value: float
    rule: str


def write(context: ExportContext, path: Path) -> None:
    """A FeatureCollection; members that GeoJSON does not know hold the statement and what was left out.

    A region is 4-connected px at or above the threshold; those of signed maps that speak against the target, at or
    below its negative, are regions of their own. Outlines run along px edges and end at the slide's. Detections have
    the tiles' scores and the statistics of their own maps as numeric measurements. Of both, the `max_regions`
    strongest are kept.

    Raises
    ------
    SpecError
        The threshold of a signed map is not above 0.
    """
    level = region_level(context)
    summaries: list[dict[str, Any]] = []
    with path.open("w", encoding="utf-8") as handle:
        handle.write('{"type":"FeatureCollection","features":[')
        first = True
        for feature in _features(context, level, summaries):
            handle.write(("" if first else ",") + "\n" + _json(feature))
            first = False
        factor = [d * 2**level for d in context.info.grid.downsample]
        about = {
            **statement.facts(context),
            "frame": "level-0 px of the slide, x to the right, y down, from the outer corner of px 0",
            "found_on": {"heatmap_level": level, "px_l0": factor, "values": "raw, mean over evaluated px"},
            "kept": summaries,
        }
        handle.write('\n],\n"gigacam":' + _json(about) + "}\n")
    for cut in summaries:
        if cut["kept"] < cut["found"]:
            log.warning(
                "%s: of %d %s the %d strongest are in the file; --max-regions sets how many",
                context.image_id, cut["found"], cut["what"], cut["kept"],
            )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def region_level(context: ExportContext) -> int:
    """The finest level of which one channel fits into memory."""
    return next(
        (n for n, shape in enumerate(context.info.grid.levels) if math.prod(shape) <= MOST_PX),
        len(context.info.grid.levels) - 1,
    )


def threshold(context: ExportContext, channel: int) -> Cut:
    """The value asked for, or the middle of the display window."""
    row = context.info.channels[channel]
    asked = context.options.threshold
    if asked is not None:
        if row.signed and asked <= 0:
            msg = f"--threshold {asked:g}: {row.label} is signed, its threshold is a magnitude; expected a number above 0"
            raise SpecError(msg)
        return Cut(asked, "given")
    low, high = display_window(context.heatmap, channel, 0)
    if row.signed:
        return Cut(high / 2, "half the display window's end, which is the 99.5 % quantile of |value|")
    return Cut((low + high) / 2, "middle of the display window, whose end is the 99.5 % quantile")


def _features(context: ExportContext, level: int, summaries: list[dict[str, Any]]) -> Iterator[Feature]:
    said = {"intended use": INTENDED_USE, "run": context.info.run_id}
    if lacks := statement.missing(context):
        said["missing"] = lacks
    for c in context.channels:
        row = context.info.channels[c]
        cut = threshold(context, c)
        values = np.asarray(context.heatmap.image(level)[c])
        for sign in (1, -1) if row.signed else (1,):
            with np.errstate(invalid="ignore"):
                mask = values * sign >= cut.value
            most = context.options.max_regions
            found, kept = regions(mask, values, most)
            name = _name(row, sign)
            rule = f"value >= {cut.value:.9g}" if sign > 0 else f"value <= {-cut.value:.9g}"
            rule = f"{rule} ({cut.rule})"
            summaries.append(
                {"what": f"regions of {name}", "found": found, "kept": min(found, most), "rule": rule}
            )
            found_as = Found(level, c, sign, cut, {**said, "rule": rule})
            for n, region in enumerate(kept, start=1):
                yield _region_feature(context, found_as, region, n)
    if context.stored_tiles is not None:
        yield from _detections(context, summaries)


@dataclass(frozen=True)
class Found:
    """How a region was found."""

    level: int
    channel: int
    sign: int
    cut: Cut
    said: dict[str, str]


def _region_feature(context: ExportContext, found: Found, region: Region, n: int) -> Feature:
    info = context.info
    row = info.channels[found.channel]
    factor = np.array(info.grid.downsample) * 2**found.level
    outline = [np.minimum(ring * factor, info.grid.shape_l0) for ring in (region.outer, *region.holes)]
    size = sum(area(ring) for ring in outline) * math.prod(info.spacing)
    name = _name(row, found.sign)
    y, x = ((np.array(region.extreme_at) + 0.5) * factor).tolist()
    return {
        "type": "Feature",
        "id": _identity(context, "region", found.channel, found.sign, found.level, region.extreme_at),
        "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in outline]},
        "properties": {
            "objectType": "annotation",
            "name": f"{name} {n}",
            "isLocked": True,
            "classification": {"name": name, "color": _colour(row.signed, found.sign)},
            "channel": row.label,
            "method": row.method,
            "target": row.target,
            "unit": UNITS[row.unit],
            "area_um2": size,
            "mean_value": region.mean,
            "max_value": region.extreme,
            "threshold": found.sign * found.cut.value,
            "threshold_rule": found.cut.rule,
            "measurements": {
                "area um^2": size,
                f"mean value [{UNITS[row.unit]}]": region.mean,
                f"max value [{UNITS[row.unit]}]": region.extreme,
                "max x l0": x,
                "max y l0": y,
                "threshold": found.sign * found.cut.value,
            },
            "metadata": found.said,
        },
    }


def _name(row: ChannelInfo, sign: int) -> str:
    return row.label if sign > 0 else f"against {row.label}"


def _detections(context: ExportContext, summaries: list[dict[str, Any]]) -> Iterator[Feature]:
    """Tiles that were explained, the strongest where there are too many, in the order of the run."""
    most, found = context.options.max_regions, 0
    strengths = []
    for part in tile_rows(context):
        strengths.append(_strength(context, part.measures, len(part.rows)))
        strengths[-1] = np.nan_to_num(strengths[-1], nan=-1)
        strengths[-1][part.status != TileStatus.DONE] = -np.inf
        found += int((part.status == TileStatus.DONE).sum())
    strength = np.concatenate(strengths)
    chosen = set(np.argsort(-strength, kind="stable")[: min(most, found)].tolist())
    summaries.append(
        {"what": "tiles", "found": found, "kept": len(chosen), "rule": "largest magnitude in any channel"}
    )
    height, width = context.info.grid.shape_l0
    for part in tile_rows(context):
        for n, tile in enumerate(part.rows.tolist()):
            if tile not in chosen:
                continue
            (y0, x0), (y1, x1) = part.boxes[n].tolist()
            y1, x1 = min(y1, height), min(x1, width)
            yield {
                "type": "Feature",
                "id": _identity(context, "tile", tile),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]],
                },
                "properties": {
                    "objectType": "detection",
                    "name": f"tile {tile}",
                    "measurements": {
                        "tile": tile,
                        **{k: float(f"{v[n]:.9g}") for k, v in part.measures.items() if math.isfinite(v[n])},
                    },
                },
            }


def _strength(
    context: ExportContext, measures: dict[str, NDArray[np.float32]], n: int
) -> NDArray[np.float64]:
    """`(n,)` largest magnitude of any channel; scores are on scales of their own."""
    of_channels = [np.abs(v) for k, v in measures.items() if not k.startswith("score ")]
    if not of_channels:
        return np.zeros(n)
    return np.asarray(np.fmax.reduce(of_channels), np.float64)


def _closed(ring: Ring) -> list[list[float]]:
    """`(x, y)` with the first corner once more at the end."""
    points = ring[:, ::-1].tolist()
    return [*points, points[0]]


def _colour(signed: bool, sign: int) -> list[int]:
    table = colours(signed)
    return [int(v) for v in table[-1 if sign > 0 else 0]]


def _identity(context: ExportContext, *what: object) -> str:
    """The same object of the same run has the same identity: importing twice makes no second one."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"gigacam/{context.info.run_id}/{what}"))
