"""Small tile stores and heatmaps, made in a moment: chunks of 8 and shards of 16 px instead of 512 and 2048."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from schemas.explanation import CamSpec
from schemas.grid import GridSpec, Lattice
from schemas.heatmap import ChannelInfo, HeatmapGrid, HeatmapSpec
from schemas.image import ImageMeta, LevelMeta, ReadOptions
from schemas.run import HeatmapInfo, MapGrid, TilesInfo, TilesSpec
from workers.stitching import grid as grids
from workers.store.tiles import TilesStore

SPACING = {2: (0.5, 0.25), 3: (3.0, 1.5, 1.0)}


def tiny_grid(shape: tuple[int, ...], downsample: int = 1, chunk: int = 8, shard: int = 16) -> HeatmapGrid:
    ndim = len(shape)
    with patch.dict(grids.CHUNK, {ndim: chunk}), patch.dict(grids.SHARD, {ndim: shard}):
        return grids.heatmap_grid(shape, downsample)


def shifted_boxes(
    shape: tuple[int, ...], tile: tuple[int, ...], stride: tuple[int, ...]
) -> NDArray[np.int64]:
    """Every tile of a lattice whose last tile an axis is moved inward."""
    axes = []
    for n, t, s in zip(shape, tile, stride, strict=True):
        count = 1 + -(-max(n - t, 0) // s)
        axes.append([min(i * s, max(n - t, 0)) for i in range(count)])
    starts = np.array(list(product(*axes)), dtype=np.int64)
    return np.stack([starts, starts + np.array(tile)], axis=1)


def map_grid(tile: tuple[int, ...], cells: tuple[int, ...], shift: float = 0.0) -> MapGrid:
    """A regular grid over the tile, its centres moved by `shift` px."""
    step = tuple(t / c for t, c in zip(tile, cells, strict=True))
    first = tuple(s / 2 + shift for s in step)
    return MapGrid(
        shape=cells, cell_px=step, first_centre_px=first, cell_l0=step, first_centre_l0=first, source="grid"
    )


def tiles_info(
    boxes: NDArray[np.int64],
    shape: tuple[int, ...],
    cells: MapGrid,
    planned: int | None = None,
    unit: int = 4,
    batch: int = 4,
    uri: str = "a.tif",
    methods: tuple[str, ...] = ("gradcam", "layercam"),
    targets: tuple[str, ...] = ("tumour", "rest"),
) -> TilesInfo:
    ndim = len(shape)
    tile = tuple((boxes[0, 1] - boxes[0, 0]).tolist()) if len(boxes) else (4,) * ndim
    spec = TilesSpec(
        identity="a" * 64,
        read=ReadOptions(),
        spacing=SPACING[ndim],
        card={"name": "net", "network": {"sha256": "b" * 64}},
        cam=CamSpec(methods=methods, targets=targets, layer="layer4"),
        grid=GridSpec(tile_px=tile, spacing=SPACING[ndim]),
        unit=unit,
        batch=batch,
    )
    image = ImageMeta(
        uri=uri,
        stem="a",
        identity="a" * 64,
        kind="slide" if ndim == 2 else "volume",
        format="array",
        channels=1,
        dtype="uint8",
        levels=(LevelMeta(shape=shape, downsample=(1.0,) * ndim),),
        spacing=SPACING[ndim],
        spacing_source="test",
    )
    lattice = Lattice(
        shape_l0=shape,
        tile_l0=tile,
        stride_l0=tile,
        count=(1,) * ndim,
        edge="shift",
        level=0,
        tile_px=tile,
        size_error=0.0,
        upsampling=1.0,
    )
    planned = len(boxes) if planned is None else planned
    return TilesInfo(
        tiles_id=spec.tiles_id,
        spec=spec,
        image=image,
        lattice=lattice,
        grids=dict.fromkeys(methods, cells),
        classes=targets,
        planned=planned,
        tiles=len(boxes),
        units=-(-planned // unit),
        versions={"gigacam": "test"},
    )


def heatmap_info(tiles: TilesInfo, grid: HeatmapGrid, spec: HeatmapSpec | None = None) -> HeatmapInfo:
    spec = spec or HeatmapSpec()
    return HeatmapInfo(
        run_id=tiles.spec.run_id(spec),
        tiles_id=tiles.tiles_id,
        spec=spec,
        grid=grid,
        channels=tuple(
            ChannelInfo(
                method=method,
                target=target,
                target_index=i,
                unit="logit",
                signed=True,
                grid=tiles.grids[method].shape,
            )
            for method in tiles.spec.cam.methods
            for i, target in enumerate(tiles.spec.cam.targets)
        ),
        spacing=tiles.spec.spacing,
        spacing_unit="um" if tiles.image.kind == "slide" else "mm",
    )


def unit_values(
    info: TilesInfo, unit: int, n: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Scores and signed maps that depend on nothing but the unit."""
    rng = np.random.default_rng(unit)
    targets = len(info.spec.cam.targets)
    scores = rng.normal(size=(n, len(info.classes))).astype(np.float32)
    maps = {
        name: rng.normal(size=(n, targets, *cells.shape)).astype(np.float32)
        for name, cells in info.grids.items()
    }
    return scores, maps


def fill_unit(store: TilesStore, unit: int, failed: tuple[int, ...] = ()) -> None:
    """Compute a unit; `failed` are tile indices."""
    rows = store.unit_rows(unit)
    scores, maps = unit_values(store.info, unit, len(rows))
    index = np.tile(np.arange(len(store.info.spec.cam.targets), dtype=np.int32), (len(rows), 1))
    errors = {i: f"tile {row} unreadable" for i, row in enumerate(rows.tolist()) if row in failed}
    store.write_unit(unit, scores, index, maps, errors)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path` and its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
