"""What arrays and metadata a new store has; made once by the driver, before any worker opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from schemas.frozen import Frozen
from schemas.heatmap import TileStatus
from schemas.ngff import LabelsAttributes
from schemas.run import HeatmapInfo, TilesInfo
from workers.store.bags import write_bag
from workers.store.ngff import (
    axis_names,
    coverage_attributes,
    image_attributes,
    peak_attributes,
    registration,
)
from workers.store.reductions import write_reductions
from workers.store.rows import ERROR_BYTES

ERROR_TABLE = ("", "see error_text", "the network gave values that are not finite", "given up by the pool")
"""Short reasons, the table of `error`; a reason that begins like one of them has its code."""
DEVICES = ("", "cpu", "cuda", "mps", "xpu")
"""Kinds of device, the table of `device`."""
_BOX_ROWS = 65536
"""Boxes are written once, when the store is made, so that their chunks need not be units."""
_COMPRESSOR = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")


def write_tiles(path: Path, info: TilesInfo, boxes: NDArray[np.int64]) -> None:
    """All arrays of a new store; status 3 for the rows that the plan left out."""
    group = zarr.create_group(path, zarr_format=3, attributes={"gigacam": info.model_dump(mode="json")})
    tiles, axes, targets = info.tiles, len(info.lattice.shape_l0), len(info.spec.cam.targets)
    nan = float("nan")

    def array(name: str, dtype: str, fill: float, row: tuple[int, ...], rows: int, one: bool = False) -> Any:
        return group.create_array(
            name,
            shape=(tiles, *row),
            chunks=(min(rows, max(tiles, 1)), *((1, *row[1:]) if one else row)),
            dtype=dtype,
            fill_value=fill,
            compressors=_COMPRESSOR,
        )

    unit = info.spec.unit
    array("box", "int64", 0, (2, axes), _BOX_ROWS)[:] = boxes
    status = array("status/explain", "uint8", TileStatus.PENDING, (), unit)
    array("error", "uint8", 0, (), unit).attrs["table"] = list(ERROR_TABLE)
    array("error_text", "uint8", 0, (ERROR_BYTES,), unit)
    if info.classes and not info.features:
        array("scores", "float32", nan, (len(info.classes),), unit)
    array("device", "uint8", 0, (), unit).attrs["table"] = list(DEVICES)
    array("target_index", "int32", -1, (targets,), unit)
    for method, grid in info.grids.items():
        array(f"flags/{method}", "uint8", 0, (targets,), unit)
        # one target a chunk: a stitch task reads one channel at a time
        array(f"maps/{method}", "float32", nan, (targets, *grid.shape), unit, one=True)
    write_reductions(group, info)
    write_bag(group, info)
    if info.planned < tiles:
        left_out = np.zeros(tiles, np.uint8)
        left_out[info.planned :] = TileStatus.LEFT_OUT
        status[:] = left_out


def has_peak(info: HeatmapInfo) -> bool:
    return info.spec.peak and len(info.grid.levels) > 1


def dumped(model: Frozen) -> dict[str, Any]:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def heatmap_attributes(info: HeatmapInfo, name: str) -> dict[str, Any]:
    return {
        "ome": dumped(image_attributes(info, name)),
        "gigacam": info.model_dump(mode="json") | {"registration": dumped(registration(info))},
    }


def write_heatmap(path: Path, info: HeatmapInfo, name: str) -> None:
    """All arrays and metadata of a new heatmap, `complete` false: a viewer may open it at once."""
    root = zarr.create_group(path, zarr_format=3, attributes=heatmap_attributes(info, name))
    channels, grid = len(info.channels), info.grid
    labels = root.create_group("labels", attributes={"ome": dumped(LabelsAttributes(labels=info.labels))})
    coverages = [
        labels.create_group(name, attributes={"ome": dumped(coverage_attributes(info, name))})
        for name in info.labels
    ]
    blocks = root.create_group("blocks")
    images = [(root, range(len(grid.levels)))]
    if has_peak(info):
        peak = root.create_group("peak", attributes={"ome": dumped(peak_attributes(info, name))})
        images.append((peak, range(1, len(grid.levels))))
    for group, levels in images:
        for level in levels:
            group.create_array(
                str(level),
                shape=(channels, *grid.levels[level]),
                chunks=(1, *grid.chunk),
                shards=(1, *grid.shards[level]),
                dtype="float32",
                fill_value=float("nan"),
                compressors=_COMPRESSOR,
                dimension_names=axis_names(info, True),
            )
    for level, shape in enumerate(grid.levels):
        for coverage in coverages:
            coverage.create_array(
                str(level),
                shape=shape,
                chunks=grid.chunk,
                shards=grid.shards[level],
                dtype="uint8",
                fill_value=0,
                compressors=_COMPRESSOR,
                dimension_names=axis_names(info, False),
            )
        blocks.create_array(
            str(level),
            shape=grid.blocks(level),
            chunks=(1,) * len(shape),
            dtype="uint8",
            fill_value=0,
            compressors=None,
        )
