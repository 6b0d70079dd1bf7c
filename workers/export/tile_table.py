"""`tiles.csv`: one row a tile, for spreadsheets and statistics; read and written by chunks, however many there are."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.explanation import MapFlag
from schemas.heatmap import TileStatus
from workers.export.context import ExportContext
from workers.export.words import INTENDED_USE, UNITS
from workers.store.bags import Bag

CHUNK = 2048
"""Tiles in memory."""
_FLAGS = tuple(
    " ".join(flag.label.replace(" ", "_") for flag in MapFlag if bits & flag)
    for bits in range(2 ** len(MapFlag))
)


@dataclass(frozen=True)
class TileRows:
    """Some tiles and what is known of them."""

    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    """`(n, 2, axes)` level-0."""
    status: NDArray[np.uint8]
    measures: dict[str, NDArray[np.float32]]
    """By title with unit, `(n,)`; NaN where a tile has none."""
    flags: dict[str, NDArray[np.uint8]]
    """By channel, `(n,)` bits of `MapFlag`."""


def write(context: ExportContext, path: Path) -> None:
    """Write every tile: index, level-0 box, centre, status, scores, map statistics or relevance of each channel, flags.

    Column names hold the unit. A tile without a value (failed, left out, not computed) has an empty cell.
    """
    info = context.info
    axes, unit = "zyx"[-len(info.spacing) :], info.spacing_unit
    with path.open("w", newline="", encoding="utf-8") as handle:
        out = csv.writer(handle)
        for i, part in enumerate(tile_rows(context)):
            if i == 0:
                places = [f"{a}{end}_l0" for end in (0, 1) for a in reversed(axes)]
                centres = [f"centre_{a}_{unit}" for a in reversed(axes)]
                flags = [f"{name} flags" for name in part.flags]
                out.writerow(
                    ["tile", *places, *centres, "status", *part.measures, *flags, "run_id", "intended_use"]
                )
            places_um = part.boxes.mean(axis=1) * info.spacing
            for n, row in enumerate(part.rows.tolist()):
                out.writerow(
                    [
                        row,
                        *part.boxes[n, 0, ::-1].tolist(),
                        *part.boxes[n, 1, ::-1].tolist(),
                        *(round(v, 4) for v in places_um[n, ::-1].tolist()),
                        TileStatus(part.status[n]).name.lower(),
                        *(number_cell(float(values[n])) for values in part.measures.values()),
                        *(_FLAGS[bits[n]] for bits in part.flags.values()),
                        info.run_id,
                        INTENDED_USE,
                    ]
                )


def tile_rows(context: ExportContext, chunk: int = CHUNK) -> Iterator[TileRows]:
    """All tiles in the order of the store, `chunk` at a time; at least one part, which may be empty.

    A channel of maps gives the mean, least and greatest raw value of a tile's own map; a channel of a bag method its
    relevance. The scores are the network's raw outputs.
    """
    tiles, info = context.tiles, context.info
    bag = Bag(tiles.path, tiles.info) if tiles.info.features else None
    scores = tiles.scores()
    targets = list(tiles.info.spec.cam.targets)
    for first in range(0, max(tiles.info.tiles, 1), chunk):
        rows = np.arange(first, min(first + chunk, tiles.info.tiles), dtype=np.int64)
        measures: dict[str, NDArray[np.float32]] = {
            f"score {name}": scores[rows, i] for i, name in enumerate(tiles.info.classes) if scores.shape[1]
        }
        flags: dict[str, NDArray[np.uint8]] = {}
        for c in context.channels:
            channel = info.channels[c]
            unit, label = UNITS[channel.unit], channel.label
            target = targets.index(channel.target)
            if channel.bag_method:
                assert bag is not None
                measures[f"{label} [{unit}]"] = bag.relevance(channel.bag_method, target, rows)
                continue
            maps = tiles.maps_of(channel.method, target, rows).reshape(len(rows), -1)
            # An empty tile's map is NaN throughout, so that there is nothing to skip in any.
            for name, values in (("mean", maps.mean(1)), ("min", maps.min(1)), ("max", maps.max(1))):
                measures[f"{label} {name} [{unit}]"] = values
            flags[label] = tiles.flags_of(channel.method, target, rows)
        yield TileRows(rows, tiles.boxes(rows), tiles.statuses_of(rows), measures, flags)


def number_cell(value: float) -> Any:
    """A float32 as a cell: nothing for NaN."""
    return f"{value:.9g}" if math.isfinite(value) else ""
