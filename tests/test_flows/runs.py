"""Running the whole path here, without Prefect, and looking at what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.batch import explain_batch
from flows.progress import Event
from schemas.run import ExplainRequest, PoolSettings, RunReport
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore


def explain(images: str | tuple[str, ...], model: str, out: Path, **asked: Any) -> RunReport:
    """Explain on the serial pool with one thread; keyword arguments are fields of the request."""
    settings = asked.pop("pool", PoolSettings(kind="serial", threads=1))
    uris = (images,) if isinstance(images, str) else images
    request = ExplainRequest(images=uris, model=model, out=str(out), **asked)
    return explain_batch(request, settings, ignore)


def ignore(event: Event) -> None:
    """A listener that draws nothing."""


def heatmap_of(report: RunReport, image: int = 0) -> HeatmapStore:
    return HeatmapStore.open(Path(report.images[image].output) / "heatmap.ome.zarr")


def tiles_of(report: RunReport, image: int = 0) -> TilesStore:
    return TilesStore.open(Path(report.images[image].output) / "tiles.zarr")


def values_of(heatmap: HeatmapStore, level: int = 0) -> NDArray[np.float32]:
    values: NDArray[np.float32] = heatmap.image(level)[:]
    return values


def centres_l0(heatmap: HeatmapStore) -> list[NDArray[np.float64]]:
    """Level-0 coordinate of the heatmap's pixel centres, by axis, shaped to broadcast."""
    grid = heatmap.info.grid
    axes = [(np.arange(n) + 0.5) * d for n, d in zip(grid.levels[0], grid.downsample, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Every chunk and metadata file of a store, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
