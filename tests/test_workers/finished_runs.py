"""The outputs of one image, made from arrays: a large odd-sized slide with hot px planted at known places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.export import ExportOptions
from schemas.run import ImageReport
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from tests.test_workers.store_samples import SPACING, fill_unit, map_grid, shifted_boxes, tiles_info
from workers.export.context import ExportContext
from workers.export.targets import EXPORTS, run_export
from workers.store.tiles import TilesStore

SHAPE = (6131, 8003)
DOWNSAMPLE = 8
TILE = (512, 512)
FAILED = 5
"""A tile without a map."""
HOT = (613, 777)
"""Heatmap px of the largest value of both channels."""
COLD = (100, 41)
"""Heatmap px of the most negative value of the signed channel."""
RING = (300, 200)
"""Centre of a ring that encloses a hole."""
PX_UM = tuple(DOWNSAMPLE * s for s in SPACING[2])
"""Size of a heatmap px, y and x: they differ, so that nobody may swap them."""
HOT_L0 = tuple((h + 0.5) * DOWNSAMPLE for h in HOT)
HOT_UM = tuple((h + 0.5) * s for h, s in zip(HOT, PX_UM, strict=True))


def planted() -> NDArray[np.float32]:
    """`(2, 767, 1001)`: a signed and an unsigned channel; NaN outside an ellipse."""
    height, width = (-(-n // DOWNSAMPLE) for n in SHAPE)
    y, x = np.ogrid[:height, :width]
    signed = 0.1 * np.sin(y / 50) * np.cos(x / 70).astype(np.float32)
    distance = np.hypot(y - RING[0], x - RING[1])
    signed = np.where((distance > 20) & (distance < 30), 5, signed)
    signed[HOT] = 100
    signed[COLD[0] : COLD[0] + 2, COLD[1] : COLD[1] + 3] = -60
    outside = ((y - 400) / 395) ** 2 + ((x - 500) / 499) ** 2 > 1
    outside[: COLD[0] + 10, : COLD[1] + 10] = False
    values = np.stack([signed, np.abs(signed)]).astype(np.float32)
    values[:, outside] = np.nan
    return values


def finished_slide(folder: Path, publish: bool = True) -> Path:
    """`heatmap.ome.zarr`, `tiles.zarr` and `report.json`; the source is not there."""
    boxes = shifted_boxes(SHAPE, TILE, TILE)
    info = tiles_info(
        boxes, SHAPE, map_grid(TILE, (4, 4)), unit=64, methods=("hirescam", "layercam"), uri="gone.svs"
    )
    tiles = TilesStore.create(folder / "tiles.zarr", info, boxes)
    for unit in range(info.units):
        fill_unit(tiles, unit, failed=(FAILED,))
    made_heatmap(
        folder / "heatmap.ome.zarr",
        info.image,
        DOWNSAMPLE,
        planted(),
        channels=(SIGNED, UNSIGNED),
        publish=publish,
    )
    report = ImageReport(image=info.image.uri, status="gaps", image_id=folder.name)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


def exported(folder: Path, name: str, **options: object) -> list[Path]:
    """Run one export."""
    context = ExportContext.open(folder, ExportOptions.model_validate(options))
    return run_export(EXPORTS[name], context)
