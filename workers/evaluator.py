"""How far the maps of data with known truth can be trusted: their AUROC against what was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.grid import TissueSpec
from schemas.image import ReadOptions
from workers.metrics.planted import at_pixel_centres, lesion_scores, rim_scores
from workers.readers import open_image
from workers.readers.overview import read_overview
from workers.store.heatmap import HeatmapStore
from workers.tiling.tissue import tissue_mask


def planted_lesion_scores(slide: Path, truth: Path, folder: Path) -> dict[str, dict[str, float]]:
    """AUROC of each channel of a slide's heatmap in `folder`, and of plain darkness beside them.

    Parameters
    ----------
    truth
        Image of the slide's size: 0 rest, 1 distractor, 2 lesion.
    """
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    grid = heatmap.info.grid
    options = ReadOptions(mpp_um=heatmap.info.spacing[0])
    reader = open_image(str(slide), options)
    pixels, downsample, _ = read_overview(reader, spacing=(8.0, 8.0))
    reader.close()
    size = tuple(s * d for s, d in zip(heatmap.info.spacing, downsample, strict=True))
    mask = tissue_mask(pixels, size, TissueSpec()).mask
    shape, step = grid.levels[0], grid.downsample[0]
    tissue = at_pixel_centres(mask, downsample, shape, step).astype(bool)
    planted = at_pixel_centres(_whole(str(truth), options), (1.0, 1.0), shape, step)
    darkness = 255.0 - at_pixel_centres(pixels.mean(axis=0), downsample, shape, step)
    table = {
        channel.label: lesion_scores(_channel(heatmap, i), planted, tissue)
        for i, channel in enumerate(heatmap.info.channels)
    }
    seen = np.isfinite(_channel(heatmap, 0))
    table["raw darkness"] = lesion_scores(np.where(seen, darkness, np.nan), planted, tissue)
    return table


def rim_lesion_scores(volume: Path, truth: Path, folder: Path) -> dict[str, dict[str, float]]:
    """AUROC of each channel of a volume's heatmap in `folder`, and of raw intensity beside them.

    Parameters
    ----------
    truth
        Volume of the same grid: 0 rest, 1 rim- lesion, 2 rim+ core, 3 rim+ shell.
    """
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    grid = heatmap.info.grid
    shape, step = grid.levels[0], grid.downsample[0]
    ones = (1.0,) * 3
    planted = at_pixel_centres(_whole(str(truth), ReadOptions()), ones, shape, step).astype(int)
    raw = at_pixel_centres(_whole(str(volume), ReadOptions()), ones, shape, step)
    table = {
        channel.label: rim_scores(_channel(heatmap, i), planted)
        for i, channel in enumerate(heatmap.info.channels)
    }
    table["raw intensity"] = rim_scores(np.where(np.isfinite(_channel(heatmap, 0)), raw, np.nan), planted)
    return table


def _whole(uri: str, options: ReadOptions) -> NDArray[Any]:
    """First channel of a small image at level 0."""
    reader = open_image(uri, options)
    shape = reader.meta.shape_l0
    box = Box(frame="l0", start=(0,) * len(shape), stop=shape)
    pixels, _ = reader.read(box, shape, 0)
    reader.close()
    first: NDArray[Any] = pixels[0]
    return first


def _channel(heatmap: HeatmapStore, index: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = heatmap.as_dask(0)[index].compute()
    return values
