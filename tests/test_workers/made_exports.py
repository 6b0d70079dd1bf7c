"""Folders of finished images made from arrays, as exporters are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.export import ExportOptions
from schemas.image import ReadOptions
from schemas.run import ImageReport
from tests.test_workers.made_heatmaps import made_heatmap
from workers.export.context import ExportContext
from workers.readers.opening import open_image


def made_context(
    folder: Path,
    uri: str | Path,
    downsample: int | tuple[int, ...],
    values: NDArray[np.float32],
    read: ReadOptions | None = None,
    options: dict[str, Any] | None = None,
    **made: Any,
) -> ExportContext:
    """`folder`/heatmap.ome.zarr with `values` `(c, *S)` of the image at `uri`, and the report that names it."""
    reader = open_image(str(uri), read)
    folder.mkdir(parents=True)
    made_heatmap(folder / "heatmap.ome.zarr", reader.meta, downsample, values, **made)
    report = ImageReport(
        image=str(uri),
        status="complete",
        provenance={
            "image": reader.meta.model_dump(mode="json"),
            "spec": {"read": (read or ReadOptions()).model_dump(mode="json")},
        },
    )
    (folder / "report.json").write_text(report.model_dump_json())
    reader.close()
    return ExportContext.open(folder, ExportOptions(**(options or {})))


def heat_grid(shape_l0: tuple[int, ...], downsample: int) -> tuple[int, ...]:
    return tuple(-(-n // downsample) for n in shape_l0)
