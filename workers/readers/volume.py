"""NIfTI volumes: RAS voxel order settled on the way in, the affine kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ImageMeta, LevelMeta, ReadOptions, stem_of
from workers.readers.arrays import ArrayReader
from workers.readers.identity import combined_identity, file_identity
from workers.readers.spacing import volume_spacing

WHOLE_VOLUME_LIMIT_PX = 8 * WHOLE_IMAGE_LIMIT_PX
"""Voxels of a volume that has to be held whole (kept in the file's own type)."""
TO_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


def scaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """`stored * slope + intercept` as float32; computed in float64, so that large integers stay exact."""
    if (slope, intercept) == (1.0, 0.0):
        return stored.astype(np.float32)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def to_ras(xyz: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64], str]:
    """Turn a stored `(x, y, z)` array to RAS and to array order.

    Returns
    -------
    array
        `(z, y, x)`, a view.
    affine
        4 x 4, from (x, y, z) index of the turned array to mm.
    codes
        The stored axes' codes, such as `LAS`.
    """
    codes = "".join(str(c) for c in orientations.aff2axcodes(affine))
    turn = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(xyz, turn)
    ras = affine @ orientations.inv_ornt_aff(turn, xyz.shape)
    return np.transpose(turned, (2, 1, 0)), ras, codes


def volume_reader(
    *,
    uri: str,
    stem: str,
    identity: str,
    format_: str,
    xyz: NDArray[Any],
    affine: NDArray[np.float64],
    slope: float,
    intercept: float,
    options: ReadOptions,
    where: str,
    notes: tuple[str, ...],
) -> ArrayReader:
    """Orient a stored `(x, y, z)` array, settle its spacing and wrap it.

    Voxels stay in their stored type; a read gives `stored * slope + intercept` as float32.

    Raises
    ------
    SourceError
        The affine is singular, or spacing is missing.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        msg = f"{uri}: its affine is singular or not finite, so that no orientation follows from it; repair the header"
        raise SourceError(msg)
    stored, ras, codes = to_ras(xyz, affine)
    sizes = np.linalg.norm(ras[:3, :3], axis=0)
    spacing, source = volume_spacing(uri, options, tuple(float(s) for s in sizes[::-1]), where)
    ras[:3, :3] *= np.asarray(spacing[::-1]) / sizes
    # fmin and fmax pass NaN over, without a warning where there is nothing else
    ends = [float(f.reduce(stored, axis=None)) * slope + intercept for f in (np.fmin, np.fmax)]
    if not all(map(math.isfinite, ends)):
        msg = f"{uri}: holds infinite or no finite values; the volume cannot be explained"
        raise SourceError(msg)
    meta = ImageMeta(
        uri=uri,
        stem=stem,
        identity=identity,
        kind="volume",
        format=format_,
        channels=1,
        dtype="float32",
        levels=(LevelMeta(shape=stored.shape, downsample=(1.0, 1.0, 1.0)),),
        spacing=spacing,
        spacing_source=source,
        affine=tuple(tuple(float(v) for v in row) for row in ras),
        source_orientation=codes,
        background=float(np.float32(min(ends))),
        notes=notes,
    )

    def take(level: int, window: tuple[slice, ...]) -> NDArray[np.float32]:
        return scaled(stored[window], slope, intercept)[None]

    return ArrayReader(meta, take)


def open_nifti(path: Path, options: ReadOptions) -> ArrayReader:
    """Open a NIfTI file; of a 4-D or 5-D one exactly the time or channel asked for.

    Raises
    ------
    SourceError
        Unreadable, not a scalar volume, or a time or channel has to be chosen.
    """
    try:
        image: Any = nib.load(path)
        header = image.header
        shape = tuple(int(n) for n in image.shape)
    except Exception as error:  # nibabel raises many types on a damaged header
        msg = f"{path}: not a readable NIfTI file ({error}); copy it again from its source or convert it anew"
        raise SourceError(msg) from error
    if header.get_data_dtype().fields is not None or np.issubdtype(
        header.get_data_dtype(), np.complexfloating
    ):
        msg = f"{path}: voxels are {header.get_data_dtype()}; expected one real number a voxel"
        raise SourceError(msg)
    picks, tag = choose_extra(str(path), shape, options)
    if math.prod(shape[:3]) > WHOLE_VOLUME_LIMIT_PX:
        msg = f"{path}: {math.prod(shape[:3]) / 1e6:.0f} M voxels have to be held whole; at most {WHOLE_VOLUME_LIMIT_PX / 1e6:.0f} M are. Convert it to OME-Zarr"
        raise SourceError(msg)
    units = header.get_xyzt_units()[0] if hasattr(header, "get_xyzt_units") else "mm"
    to_mm = TO_MM.get(units, 1.0)
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    affine[:3] *= to_mm
    try:
        xyz = np.asanyarray(image.dataobj.get_unscaled())[(..., *picks)]
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
        identity = file_identity(path)
        return volume_reader(
            uri=str(path),
            stem=stem_of(path.name) + (f"-{tag.replace('=', '')}" if tag else ""),
            identity=combined_identity(identity, tag) if tag else identity,
            format_="nifti",
            xyz=xyz.reshape((*xyz.shape, 1, 1)[:3]),
            affine=affine,
            slope=slope,
            intercept=intercept,
            options=options,
            where="nifti header",
            notes=("spatial unit not stated; taken as mm",) if units == "unknown" else (),
        )
    except SourceError:
        raise
    except Exception as error:  # gzip, zlib and struct have types of their own for damaged data
        msg = f"{path}: its voxels cannot be read ({error}); the file is truncated or damaged"
        raise SourceError(msg) from error


def choose_extra(uri: str, shape: tuple[int, ...], options: ReadOptions) -> tuple[tuple[int, ...], str]:
    """Indices into the axes after x, y, z, and a tag such as `time=3` ('' where nothing is chosen).

    The fourth NIfTI axis is time by the standard and channels by habit: either flag picks from it.

    Raises
    ------
    SourceError
        A choice is missing or out of range.
    """
    extra = shape[3:]
    if not extra or math.prod(extra) == 1:
        return (0,) * len(extra), ""
    if len(extra) == 1:
        given = {"time": options.time, "channel": options.channel}
        chosen = [(k, v) for k, v in given.items() if v is not None]
        if len(chosen) != 1:
            msg = f"{uri}: has {extra[0]} volumes (shape {shape}); choose one: --time or --channel with 0..{extra[0] - 1}"
            raise SourceError(msg)
        wanted = chosen
    else:
        axes = [("time", options.time), ("channel", options.channel)]
        if len(extra) > 2:
            msg = f"{uri}: {len(shape)} axes (shape {shape}); expected at most x, y, z, time, channel"
            raise SourceError(msg)
        missing = [f"--{k}" for (k, v), n in zip(axes, extra, strict=True) if v is None and n > 1]
        if missing:
            msg = f"{uri}: shape {shape} has several times or channels; choose with {' and '.join(missing)}"
            raise SourceError(msg)
        wanted = [(k, v or 0) for k, v in axes]
    for (name, index), n in zip(wanted, extra, strict=True):
        if not 0 <= index < n:
            msg = f"{uri}: --{name} {index} is out of range; the file has {n} (0..{n - 1})"
            raise SourceError(msg)
    return tuple(v for _, v in wanted), ",".join(f"{k}={v}" for k, v in wanted)
