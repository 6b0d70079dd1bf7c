"""Runs whose heat is planted at known places, for the viewer's pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tifffile
from numpy.typing import NDArray

from schemas.heatmap import ChannelInfo, Coverage
from schemas.run import Counts, ImageReport
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from tests.test_workers.store_samples import fill_unit, map_grid, tiles_info
from workers.readers import open_image
from workers.store.tiles import TilesStore

SHAPE = (6131, 8003)
DOWNSAMPLE = 4
HOT = ((700, 1000), (511, 1024), (1024, 511), (1532, 2000), (1300, 37))
"""Heatmap px `(y, x)` at its level 0: inside, at corners of tiles, the last of all (half outside the slide), at an edge."""
GREY, MARK = 220, 0
UNEVALUATED = (slice(0, 300), slice(0, 600))
FAILED = (slice(1000, 1100), slice(200, 400))
UM = 0.5


def write_slide(path: Path) -> None:
    """Plain grey, black under each hot px: a slide of odd size, with a pyramid."""
    pixels = np.full((*SHAPE, 3), GREY, np.uint8)
    for y, x in HOT:
        pixels[y * DOWNSAMPLE : (y + 1) * DOWNSAMPLE, x * DOWNSAMPLE : (x + 1) * DOWNSAMPLE] = MARK
    how: dict[str, Any] = {
        "tile": (512, 512),
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "photometric": "rgb",
    }
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, resolution=(1e4 / UM, 1e4 / UM), resolutionunit="CENTIMETER", **how)
        for step in (2, 4, 8, 16):
            file.write(np.ascontiguousarray(pixels[::step, ::step]), subfiletype=1, **how)


def write_run(
    out: Path,
    uri: str,
    downsample: int,
    values: NDArray[np.float32],
    coverage: NDArray[np.uint8] | None = None,
    channels: Sequence[ChannelInfo] = (UNSIGNED,),
    finished: bool = True,
) -> str:
    """The folder of one explained image, as far as the viewer reads it; gives its id."""
    reader = open_image(uri)
    meta = reader.meta
    reader.close()
    folder = out / meta.image_id()
    made_heatmap(folder / "heatmap.ome.zarr", meta, downsample, values, coverage, channels, finished)
    tile = tuple(min(64, n) for n in meta.shape_l0)
    hot = np.argwhere(np.nan_to_num(values[0]) == np.nanmax(values[0])) * downsample
    starts = np.clip(hot - np.array(tile) // 2, 0, np.array(meta.shape_l0) - tile)
    boxes = np.stack([starts, starts + np.array(tile)], axis=1)
    methods = tuple(dict.fromkeys(c.method for c in channels))
    targets = tuple(dict.fromkeys(c.target for c in channels))
    info = tiles_info(
        boxes, meta.shape_l0, map_grid(tile, (4,) * meta.ndim), uri=meta.uri, methods=methods, targets=targets
    )
    spec = info.spec.model_copy(update={"identity": meta.identity, "spacing": meta.spacing})
    store = TilesStore.create(
        folder / "tiles.zarr", info.model_copy(update={"image": meta, "spec": spec}), boxes
    )
    for unit in range(info.units):
        fill_unit(store, unit)
    if not finished:
        return folder.name
    failed = int(coverage is not None and (coverage == Coverage.FAILED).any())
    report = ImageReport(
        image=meta.uri, image_id=folder.name, status="gaps" if failed else "complete", output=str(folder),
        counts=Counts(planned=len(boxes) + failed, done=len(boxes), failed=failed, left_out=0),
        channels=tuple(channels), seconds={"all": 3.5},
    )  # fmt: skip
    (folder / "report.json").write_text(report.model_dump_json())
    return folder.name


def slide_run(out: Path, path: Path) -> str:
    """Zero but for the hot px; a corner nobody looked at, a place that failed; and the same map with signs."""
    write_slide(path)
    shape = tuple(-(-n // DOWNSAMPLE) for n in SHAPE)
    heat = np.zeros(shape, np.float32)
    coverage = np.full(shape, Coverage.EVALUATED, np.uint8)
    coverage[UNEVALUATED], coverage[FAILED] = Coverage.BACKGROUND, Coverage.FAILED
    heat[coverage != Coverage.EVALUATED] = np.nan
    for at in HOT:
        heat[at] = 1
    return write_run(out, str(path), DOWNSAMPLE, np.stack([heat, -heat]), coverage, (UNSIGNED, SIGNED))


AFFINES = {
    "RAS": np.array([[2, 0, 0, -40], [0, 2.5, 0, -45], [0, 0, 3, -30], [0, 0, 0, 1.0]]),
    "LPS": np.array([[-2, 0, 0, 40], [0, -2.5, 0, 45], [0, 0, 3, -30], [0, 0, 0, 1.0]]),
    "PSR": np.array([[0, 0, 2, -40], [-2.5, 0, 0, 45], [0, 3, 0, -30], [0, 0, 0, 1.0]]),
}
"""Stored voxel (i, j, k) -> mm; the third stores other axes first."""
_COS, _SIN = np.cos(0.2), np.sin(0.2)
AFFINES["oblique"] = (
    np.array([[_COS, -_SIN, 0, 0], [_SIN, _COS, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ AFFINES["LPS"]
)
VOLUME = (40, 36, 20)
"""Stored shape (i, j, k)."""
HOT_VOXEL = (31, 9, 14)
"""Stored voxel (i, j, k)."""
FAILED_VOXELS = (slice(14, 22), slice(14, 22), slice(6, 12))
SOURCE = np.random.default_rng(1).normal(100, 5, VOLUME).astype(np.float32)
"""What the file stores."""


def volume_run(out: Path, path: Path, affine: NDArray[np.float64], failed: bool = False) -> str:
    """A grey volume, one hot voxel, and a block that `failed`; everything is stored on `affine`."""
    nib.save(nib.Nifti1Image(SOURCE, affine), path)
    heat = np.zeros(VOLUME, np.float32)
    heat[HOT_VOXEL] = 1
    coverage = np.full(VOLUME, Coverage.EVALUATED, np.uint8)
    if failed:
        heat[FAILED_VOXELS], coverage[FAILED_VOXELS] = np.nan, Coverage.FAILED

    def turned(stored: NDArray[Any]) -> NDArray[Any]:
        found = nib.as_closest_canonical(nib.Nifti1Image(stored, affine)).dataobj
        return np.asarray(found, stored.dtype).transpose(2, 1, 0)

    channel = UNSIGNED.model_copy(update={"grid": (4, 4, 4)})
    return write_run(out, str(path), 1, turned(heat)[None], turned(coverage), channels=(channel,))


@dataclass(frozen=True)
class Place:
    """Where the hot voxel's centre is, turned to the nearest of right, front, top."""

    shares: NDArray[np.float64]
    """Of the volume from its left, back and lower faces."""
    mm: NDArray[np.float64]
    away: tuple[NDArray[np.float64], ...]
    """Points in mm in the plane through it across each axis, in another corner of that plane."""

    @classmethod
    def of(cls, affine: NDArray[np.float64]) -> Place:
        heat = np.zeros(VOLUME, np.float32)
        heat[HOT_VOXEL] = 1
        turned = nib.as_closest_canonical(nib.Nifti1Image(heat, affine))
        at = np.argwhere(turned.get_fdata() == 1)[0]
        shape = np.array(turned.shape)
        far = np.where(at > shape / 2, 2, shape - 3)
        points = [np.where(np.arange(3) == axis, at, far) for axis in range(3)]
        mm = [nib.affines.apply_affine(turned.affine, p) for p in (at, *points)]
        return cls((at + 0.5) / shape, mm[0], tuple(mm[1:]))
