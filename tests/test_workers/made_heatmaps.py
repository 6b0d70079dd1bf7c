"""Finished heatmap stores made from arrays, for tests of what is exported from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import ChannelInfo, Coverage, HeatmapGrid, HeatmapSpec
from schemas.image import ImageMeta
from schemas.run import HeatmapInfo
from workers.stitching.downsample import halve_absmax, halve_coverage, halve_mean
from workers.stitching.grid import Block, all_blocks, block_box, heatmap_grid
from workers.store.heatmap import HeatmapStore
from workers.store.statistics import channel_statistics

SIGNED = ChannelInfo(
    method="hirescam", target="tumour", target_index=1, unit="logit", signed=True, grid=(7, 7)
)
UNSIGNED = ChannelInfo(
    method="layercam", target="tumour", target_index=1, unit="1", signed=False, grid=(7, 7)
)


def made_heatmap(
    path: Path,
    meta: ImageMeta,
    downsample: int | tuple[int, ...],
    values: NDArray[np.float32],
    coverage: NDArray[np.uint8] | None = None,
    channels: Sequence[ChannelInfo] | None = None,
    publish: bool = True,
    inside: NDArray[np.uint8] | None = None,
) -> HeatmapStore:
    """`values` `(c, *S)` at level 0 of the heatmap, all levels written; without `coverage` NaN is background.

    `inside` is the coverage of channels of maps inside some of the tiles.
    """
    grid = heatmap_grid(meta.shape_l0, downsample)
    if coverage is None:
        coverage = np.where(np.isfinite(values[0]), Coverage.EVALUATED, Coverage.BACKGROUND).astype(np.uint8)
    assert meta.spacing is not None
    info = HeatmapInfo(
        run_id="1" * 64,
        tiles_id="2" * 64,
        spec=HeatmapSpec(),
        grid=grid,
        channels=tuple(channels or (SIGNED,) * len(values)),
        spacing=meta.spacing,
        spacing_unit="um" if meta.kind == "slide" else "mm",
        partial=inside is not None,
    )
    store = HeatmapStore.create(path, info, "test")
    means = [np.asarray(v, np.float32) for v in values]
    peaks = means
    for level in range(len(grid.levels)):
        if level:
            means = [halve_mean(m) for m in means]
            peaks = [halve_absmax(p) for p in peaks]
            coverage = halve_coverage(coverage)
            inside = None if inside is None else halve_coverage(inside)
        for block in all_blocks(grid, level):
            at = _region(grid, level, block)
            store.write_block(
                level, block, coverage[at], [m[at] for m in means], [p[at] for p in peaks] if level else (),
                None if inside is None else inside[at],
            )  # fmt: skip
    if publish:
        stats = channel_statistics(store.as_dask(), [c.signed for c in info.channels])
        store.publish(stats.value_range, stats.display)
    return store


def _region(grid: HeatmapGrid, level: int, block: Block) -> tuple[slice, ...]:
    start, stop = block_box(grid, level, block)
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
