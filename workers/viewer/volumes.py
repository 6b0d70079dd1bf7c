"""Volumes as NIfTI on the grid of their source, in mm, a slab at a time: the source itself, or the heat of one channel."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from schemas.geometry import Box
from schemas.image import ImageMeta
from workers.export.nifti import on_source_grid, source_grid
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore

MOST_VOXELS = 200_000_000
"""A browser holds a volume whole, as float32."""
SLAB_VOXELS = 8_000_000

Slab = Callable[[list[int], list[int]], NDArray[Any]]
"""Level-0 start and stop `(z, y, x)` of a box -> its values in RAS voxel order."""


def source_nifti(reader: Reader) -> Iterator[bytes]:
    """The first channel of a volume as float32 `.nii.gz`; nothing of the source's header but its grid is carried.

    Raises
    ------
    HTTPException
        413: it is too large for a browser.
    """

    def slab(start: list[int], stop: list[int]) -> NDArray[np.float32]:
        box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
        return np.asarray(reader.read(box, box.shape, 0)[0][0], np.float32)

    return _gzip(reader.meta, slab)


def heat_nifti(reader: Reader, heatmap: HeatmapStore, channel: int) -> Iterator[bytes]:
    """One channel of a heatmap at the centres of the source's voxels, NaN where nobody looked; see `on_source_grid`.

    Raises
    ------
    HTTPException
        413: it is too large for a browser.
    """
    grid, image = heatmap.grid, heatmap.image(0)

    def slab(start: list[int], stop: list[int]) -> NDArray[np.float32]:
        # One heat voxel more on either side than the box touches: what its outermost voxels are interpolated from.
        first = [max(a // d - 1, 0) for a, d in zip(start, grid.downsample, strict=True)]
        last = [min(-(-b // d) + 1, n) for b, d, n in zip(stop, grid.downsample, grid.levels[0], strict=True)]
        window = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        shape = [b - a * d for a, b, d in zip(first, stop, grid.downsample, strict=True)]
        values = on_source_grid(np.asarray(image[(channel, *window)], np.float32), grid.downsample, shape)
        return values[
            tuple(slice(a - f * d, None) for a, f, d in zip(start, first, grid.downsample, strict=True))
        ]

    return _gzip(reader.meta, slab, heatmap.info.display[channel] if heatmap.info.display else None)


def coverage_nifti(reader: Reader, heatmap: HeatmapStore, channel: int) -> Iterator[bytes]:
    """Why each voxel of the source has a value of a channel or none: uint8 of `Coverage`, of the heat voxel it lies in.

    Raises
    ------
    HTTPException
        413: it is too large for a browser.
    """
    grid, codes = heatmap.grid, heatmap.coverage(0, channel)

    def slab(start: list[int], stop: list[int]) -> NDArray[np.uint8]:
        index = [np.arange(a, b) // d for a, b, d in zip(start, stop, grid.downsample, strict=True)]
        window = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in index)
        near = np.asarray(codes[window], np.uint8)
        return near[np.ix_(*(i - i[0] for i in index))]

    return _gzip(reader.meta, slab, dtype="|u1")


def _gzip(
    meta: ImageMeta, slab: Slab, shown: tuple[float, float] | None = None, dtype: str = "<f4"
) -> Iterator[bytes]:
    if math.prod(meta.shape_l0) > MOST_VOXELS:
        msg = (
            f"{math.prod(meta.shape_l0) / 1e6:.0f} million voxels are more than a browser holds (at most {MOST_VOXELS / 1e6:.0f}): "
            "open heatmap.ome.zarr in a desktop viewer"
        )
        raise HTTPException(413, msg)
    header, turn = source_grid(meta)
    _place(meta, header, turn)
    header.set_data_dtype(np.dtype(dtype))
    if shown is not None:
        header["cal_min"], header["cal_max"] = shown
    return _compressed(_parts(meta, header, turn, slab, dtype))


def _place(meta: ImageMeta, header: Any, turn: NDArray[np.float64]) -> None:
    """Write into a header where the reader has the voxels, in mm, as its one placement.

    What browsers make of a file without orientation, of two that differ, or of micrometres is not what nibabel does.
    """
    if meta.affine is None:
        affine = header.get_best_affine()
    else:
        affine = np.asarray(meta.affine) @ orientations.inv_ornt_aff(turn, meta.shape_l0[::-1])
    header.set_sform(affine, "aligned")
    header.set_qform(None, "unknown")
    header.set_zooms(voxel_sizes(affine))
    header.set_xyzt_units("mm")


def _parts(
    meta: ImageMeta, header: Any, turn: NDArray[np.float64], slab: Slab, dtype: str
) -> Iterator[bytes]:
    """Header and voxels, x fastest: slabs along the axis that is slowest in the file."""
    head = io.BytesIO()
    header.write_to(head)
    yield head.getvalue()
    slow = int(np.flatnonzero(turn[:, 0] == 2)[0])
    flipped, axis = turn[slow, 1] < 0, 2 - slow
    n = meta.shape_l0[axis]
    thick = max(1, SLAB_VOXELS // (math.prod(meta.shape_l0) // n))
    for k in range(0, n, thick):
        end = min(k + thick, n)
        start, stop = [0] * 3, list(meta.shape_l0)
        start[axis], stop[axis] = (n - end, n - k) if flipped else (k, end)
        stored = orientations.apply_orientation(np.transpose(slab(start, stop), (2, 1, 0)), turn)
        yield np.asarray(stored, dtype).tobytes("F")


def _compressed(parts: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    for part in parts:
        if packed := packer.compress(part):
            yield packed
    yield packer.flush()
