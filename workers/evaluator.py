"""How far the maps of data with known truth can be trusted: their AUROC against what was planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.grid import TissueSpec
from schemas.image import ReadOptions
from schemas.run import TilesInfo
from workers.metrics.planted import at_pixel_centres, evidence_scores, lesion_scores, rim_scores
from workers.readers import open_image
from workers.readers.overview import read_overview
from workers.readers.reader import Reader
from workers.store.bags import Bag
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.tiling.tissue import tissue_mask

BAND_L0 = 1024
"""Rows of truth read at once."""
PRESENT = 0.03
"""Share of a tile from which what was planted counts as there; a tile with less of it is asked about nothing."""

Measure = Callable[[NDArray[Any], NDArray[Any], NDArray[np.bool_]], dict[str, float]]
"""(values, truth, tissue), NaN where nobody looked -> AUROC by question."""


def planted_lesion_scores(
    slide: Path, truth: Path, folder: Path, measure: Measure = lesion_scores
) -> dict[str, dict[str, float]]:
    """AUROC of each channel of a slide's heatmap in `folder`, and of plain darkness beside them.

    Parameters
    ----------
    truth
        Image of the slide's size: 0 rest, 1 distractor, 2 lesion, 3 mixed focus.
    measure
        Which questions are asked.
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
    planted = at_centres(str(truth), options, shape, step)
    darkness = 255.0 - at_pixel_centres(pixels.mean(axis=0), downsample, shape, step)
    table = {
        channel.label: measure(_channel(heatmap, i), planted, tissue)
        for i, channel in enumerate(heatmap.info.channels)
    }
    seen = np.isfinite(_channel(heatmap, 0))
    table["raw darkness"] = measure(np.where(seen, darkness, np.nan), planted, tissue)
    return table


def tile_evidence_scores(truth: Path, folder: Path) -> dict[str, dict[str, float]]:
    """AUROC of each bag method's value of a tile, and of each map inside the tiles summed over the tile, by label.

    Parameters
    ----------
    truth
        Image of the slide's size: 0 rest, 1 look-alike, 2 lesion, 3 mixed focus. A tile is of what covers most of it, where that is
        at least `PRESENT`; tiles with less of anything are left out.
    folder
        Of a slide that was explained.
    """
    tiles = TilesStore.open(folder / "tiles.zarr")
    bag, cam = Bag(tiles.path, tiles.info), tiles.info.spec.cam
    rows = bag.rows()
    reader = open_image(str(truth))
    kinds = np.array([_kind(reader, tiles.info, box) for box in tiles.boxes(rows).tolist()])
    reader.close()
    known = kinds != UNCLEAR
    table = {}
    for t, target in enumerate(cam.targets):
        values = {name: bag.relevance(name, t, rows) for name in cam.bag_methods}
        values |= {name: tiles.maps_of(name, t, rows).sum(axis=(1, 2)) for name in cam.methods}
        for name, found in values.items():
            table[f"{name}:{target}"] = evidence_scores(
                found[known], kinds[known], np.ones(known.sum(), bool)
            )
    return table


UNCLEAR = -1


def _kind(reader: Reader, info: TilesInfo, corners: list[list[int]]) -> int:
    """What covers most of a tile; `UNCLEAR` where that is a trace."""
    start, stop = corners
    stop = [min(a, n) for a, n in zip(stop, info.image.shape_l0, strict=True)]
    box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
    truth, _ = reader.read(box, box.shape, 0)
    share = np.bincount(truth[0].astype(np.int64).ravel(), minlength=2)[1:] / truth[0].size
    if share.max() == 0:
        return 0
    return int(share.argmax()) + 1 if share.max() >= PRESENT else UNCLEAR


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
    planted = at_centres(str(truth), ReadOptions(), shape, step).astype(int)
    raw = at_centres(str(volume), ReadOptions(), shape, step)
    table = {
        channel.label: rim_scores(_channel(heatmap, i), planted)
        for i, channel in enumerate(heatmap.info.channels)
    }
    table["raw intensity"] = rim_scores(np.where(np.isfinite(_channel(heatmap, 0)), raw, np.nan), planted)
    return table


def at_centres(uri: str, options: ReadOptions, shape: tuple[int, ...], downsample: int) -> NDArray[Any]:
    """First channel of an image under the centre of each heatmap pixel, read a band at a time."""
    reader = open_image(uri, options)
    size = reader.meta.shape_l0
    bands = []
    step = max(1, BAND_L0 // downsample)
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        start, stop = first * downsample, min((first + rows) * downsample, size[0])
        box = Box(frame="l0", start=(start, *(0,) * (len(size) - 1)), stop=(stop, *size[1:]))
        pixels, _ = reader.read(box, box.shape, 0)
        bands.append(at_pixel_centres(pixels[0], (1.0,) * len(size), (rows, *shape[1:]), downsample))
    reader.close()
    return np.concatenate(bands)


def _channel(heatmap: HeatmapStore, index: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = heatmap.as_dask(0)[index].compute()
    return values
