"""`heatmap.nii.gz`: a volume's heatmap on the grid of the source file, for radiology viewers."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from schemas.errors import SourceError, SpecError
from schemas.image import ImageMeta
from workers.export import statement
from workers.export.context import ExportContext
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore

DESCRIPTION = "gigacam CAM. Research use only, not for diagnostic procedures"
"""NIfTI's `descrip` holds 79 characters."""
_PLACEMENT = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def write(context: ExportContext, path: Path) -> None:
    """The row `nifti`: the channels asked for, with the whole statement as a comment extension."""
    with context.source() as reader:
        write_nifti(path, context.heatmap, reader, context.channels, statement.text(context))


def write_nifti(
    path: str | os.PathLike[str],
    heatmap: HeatmapStore,
    reader: Reader,
    channels: Sequence[int] | None = None,
    comment: str = "",
) -> Path:
    """Write channels of a volume's heatmap as float32 NIfTI, NaN where nobody looked.

    A NIfTI source gives shape, affine, qform and sform with their codes, spatial unit and orientation (an LAS
    file gets an LAS heatmap), so that viewers overlay the two files whatever spacing the run was told to use.
    Other sources give a RAS file with the image's affine. One channel makes a 3-D file, several make a 4-D
    one `(x, y, z, channel)`. Nothing else of the source's header is carried over, since it may name a
    patient. The same heatmap gives the same bytes.

    Parameters
    ----------
    path
        Ends in `.nii.gz`.
    reader
        The volume the heatmap belongs to.
    channels
        Which; None: all.
    comment
        Text of a comment extension of the header; empty: there is none.

    Raises
    ------
    SpecError
        The image is no volume.
    SourceError
        The source is no longer the file the heatmap was computed from.
    """
    meta, info = reader.meta, heatmap.info
    if meta.kind != "volume":
        msg = f"{meta.uri}: a {meta.kind} has no NIfTI heatmap; expected a volume"
        raise SpecError(msg)
    if meta.shape_l0 != info.grid.shape_l0:
        msg = f"{meta.uri}: has shape {meta.shape_l0}, its heatmap was made for {info.grid.shape_l0}; run it with --fresh"
        raise SourceError(msg)
    header, turn = source_grid(meta)
    shape_xyz = tuple(int(n) for n in header.get_data_shape())
    chosen = range(len(info.channels)) if channels is None else channels
    if len(chosen) > 1:
        header.set_data_shape((*shape_xyz, len(chosen)))
    elif info.display:
        header["cal_min"], header["cal_max"] = info.display[chosen[0]]
    if comment:
        header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment.encode()))
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # No file name and no time inside the gzip stream: the bytes depend on the heatmap alone.
    with part.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as out:
        header.write_to(out)
        for c in chosen:
            values = np.asarray(heatmap.as_dask(level=0, channel=c), dtype=np.float32)
            full = on_source_grid(values, info.grid.downsample, meta.shape_l0)
            stored = orientations.apply_orientation(np.transpose(full, (2, 1, 0)), turn)
            for plane in range(shape_xyz[2]):
                out.write(stored[:, :, plane].astype("<f4").tobytes("F"))
    os.replace(part, path)
    return path


def source_grid(meta: ImageMeta) -> tuple[Any, NDArray[np.float64]]:
    """A float32 header on the grid of a volume's source, and the turn from RAS axes `(x, y, z)` to its own.

    Raises
    ------
    SourceError
        The NIfTI file is no longer the one that `meta` describes.
    """
    return _source_header(meta) if meta.format == "nifti" else _ras_header(meta)


def on_source_grid(
    values: NDArray[np.float32], downsample: Sequence[int], shape_l0: Sequence[int]
) -> NDArray[np.float32]:
    """Heatmap values at the centres of level-0 voxels.

    Heatmap voxel `j` spans `[j * downsample, (j + 1) * downsample)`, so that the centre of level-0 voxel `i` lies
    at `(i + 0.5) / downsample - 0.5`. There the finite ones of the 8 nearest voxels are interpolated (trilinear,
    weights renormalised); a voxel inside a heatmap voxel without a value is NaN.

    Parameters
    ----------
    values
        `(z, y, x)`, NaN where nobody looked.
    downsample
        Level-0 voxels per heatmap voxel and axis.
    shape_l0
        Shape of the result.
    """
    if all(d == 1 for d in downsample):
        return values[tuple(slice(n) for n in shape_l0)].copy()
    finite = np.isfinite(values)
    # Values and weights side by side, (2, z, y, x): both go through the same linear interpolation.
    both = np.stack([np.where(finite, values, 0), finite]).astype(np.float32)
    (z_low, z_high, z_part), *plane_axes = (
        _neighbours(n, d, have) for n, d, have in zip(shape_l0, downsample, values.shape, strict=True)
    )
    nearest = [np.arange(n) // d for n, d in zip(shape_l0, downsample, strict=True)]
    out = np.empty(tuple(shape_l0), np.float32)
    for z in range(shape_l0[0]):  # a plane at a time: never more than one copy of the volume
        total = both[:, z_low[z]] * (1 - z_part[z]) + both[:, z_high[z]] * z_part[z]
        for axis, (low, high, part) in enumerate(plane_axes, start=1):
            weight = part[:, None] if axis == 1 else part
            total = np.take(total, low, axis) * (1 - weight) + np.take(total, high, axis) * weight
        looked = finite[nearest[0][z]][np.ix_(nearest[1], nearest[2])]
        out[z] = np.divide(total[0], total[1], out=np.full(looked.shape, np.nan, np.float32), where=looked)
    return out


def _neighbours(
    n: int, downsample: int, have: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of `n` voxels the two heatmap voxels beside its centre and the share of the second."""
    at = np.clip((np.arange(n) + 0.5) / downsample - 0.5, 0, have - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, have - 1), (at - low).astype(np.float32)


def turn_from_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """How nibabel turns axes in RAS order to those of a file with this affine."""
    turn: NDArray[np.float64] = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.io_orientation(affine)
    )
    return turn


def _source_header(meta: ImageMeta) -> tuple[Any, NDArray[np.float64]]:
    """Header on the grid of the NIfTI file at `meta.uri`, and the turn from RAS axes to the file's."""
    source = cast("Any", nib.load(meta.uri))
    shape = (*source.shape, 1, 1)[:3]
    from_ras = turn_from_ras(source.affine)
    codes = "".join(str(c) for c in orientations.aff2axcodes(source.affine))
    shape_ras = tuple(shape[int(axis)] for axis in orientations.io_orientation(source.affine)[:, 0].argsort())
    if shape_ras[::-1] != meta.shape_l0 or codes != meta.source_orientation:
        msg = (
            f"{meta.uri}: is now {codes} with shape {shape}, the heatmap was made for {meta.source_orientation} "
            f"of {meta.shape_l0} (z, y, x in RAS); the file was changed: run it again with --fresh"
        )
        raise SourceError(msg)
    header = _empty_header(source.header, shape)
    for name in _PLACEMENT:
        header[name] = source.header[name]
    header["pixdim"][:4] = source.header["pixdim"][:4]
    header.set_xyzt_units(source.header.get_xyzt_units()[0])
    return header, from_ras


def _ras_header(meta: ImageMeta) -> tuple[Any, NDArray[np.float64]]:
    """Header of a source that is no NIfTI file: RAS, with the image's own affine."""
    if meta.affine is not None:
        affine = np.asarray(meta.affine)
    else:
        affine = np.diag((*(meta.spacing or (1.0, 1.0, 1.0))[::-1], 1.0))
    header = _empty_header(None, meta.shape_l0[::-1])
    # 1 = scanner coordinates, 2 = aligned to something else
    code = 1 if meta.format.startswith("dicom") else 2
    header.set_sform(affine, code)
    header.set_qform(affine, code)
    header.set_xyzt_units("mm")
    return header, orientations.axcodes2ornt("RAS")


def _empty_header(like: Any, shape: Sequence[int]) -> Any:
    """A little-endian single-file header without anything of its source; NIfTI-2 where the source is."""
    kind = cast("Any", nib.Nifti2Header if isinstance(like, nib.Nifti2Header) else nib.Nifti1Header)
    header = kind(endianness="<")
    header.set_data_dtype(np.float32)
    header.set_data_shape(tuple(shape))
    header["descrip"] = DESCRIPTION
    return header
