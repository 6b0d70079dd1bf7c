"""DICOM: what a file or folder holds, and CT/MR series as volumes; the only reader that imports pydicom."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ReadOptions, stem_of
from workers.readers.arrays import ArrayReader
from workers.readers.identity import series_identity
from workers.readers.volume import WHOLE_VOLUME_LIMIT_PX, volume_reader

SLIDE_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
TAGS = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "ImageType"]
REGULAR_MM = 0.01
"""Slice distances may differ by this, or 1 %."""


@dataclass(frozen=True)
class Instance:
    """One DICOM file, by its header."""

    path: Path
    sop_class: str
    sop_uid: str
    series: str
    image_type: str

    @property
    def is_slide(self) -> bool:
        return self.sop_class == SLIDE_SOP_CLASS


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark at byte 128."""
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def instances(paths: Iterable[Path]) -> list[Instance]:
    """Headers of the DICOM images among `paths` (others, DICOMDIR included, are passed over), sorted by path."""
    found = []
    for path in sorted(paths):
        if (
            not path.is_file()
            or path.suffix.lower() not in ("", ".dcm", ".dicom", ".ima")
            or not is_dicom(path)
        ):
            continue
        try:  # a value is parsed when it is asked for
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            if "SeriesInstanceUID" in header and "SOPClassUID" in header:
                found.append(
                    Instance(
                        path,
                        str(header.SOPClassUID),
                        str(header.get("SOPInstanceUID", "")),
                        str(header.SeriesInstanceUID),
                        "\\".join(header.get("ImageType") or ()),
                    )
                )
        except Exception as error:  # pydicom raises many types on a damaged header
            msg = f"{path}: its DICOM header cannot be read ({error}); copy it again from its source"
            raise SourceError(msg) from error
    return found


def grouped(folder: Path) -> list[list[Instance]]:
    """The DICOM series whose files lie in `folder`, ordered by first file."""
    groups: dict[str, list[Instance]] = {}
    for instance in instances(folder.iterdir()):
        groups.setdefault(instance.series, []).append(instance)
    return list(groups.values())


def series_at(path: Path) -> list[Instance]:
    """The series a path means: of a folder the only one, of a file the one it belongs to.

    Raises
    ------
    SourceError
        No DICOM image there, or a folder with several series.
    """
    if path.is_dir():
        groups = grouped(path)
        if len(groups) != 1:
            names = ", ".join(g[0].path.name for g in groups)
            msg = f"{path}: holds {len(groups)} DICOM series (first files: {names}); expected one: name a file of the series"
            raise SourceError(msg)
        return groups[0]
    own = instances([path])
    if not own:
        msg = f"{path}: not a DICOM image (no series or SOP class in its header)"
        raise SourceError(msg)
    return [i for group in grouped(path.parent) if group[0].series == own[0].series for i in group]


def slide_file(series: list[Instance], path: Path) -> Path:
    """The file to open a DICOM slide by: the one named, or the first that holds pixels of the slide itself."""
    if path.is_file():
        return path
    return next((i.path for i in series if "VOLUME" in i.image_type), series[0].path)


def identity_of_series(series: list[Instance]) -> str:
    """sha256 over the sorted SOPInstanceUIDs and file sizes."""
    return series_identity((i.sop_uid, i.path.stat().st_size) for i in series)


def open_series(path: Path, series: list[Instance], options: ReadOptions) -> ArrayReader:
    """Open a CT, MR or PET series of single-frame slices as one volume.

    Slices are sorted along the normal of their plane; values are rescaled (slope, intercept) and kept in
    stored type where all slices share them; patient axes (LPS) are turned to RAS.

    Raises
    ------
    SourceError
        Slices that do not make a regular stack, a pixel format or transfer syntax that cannot be read.
    """
    try:
        slices = [pydicom.dcmread(i.path) for i in series]
        return _stack(path, series, slices, options)
    except SourceError:
        raise
    except Exception as error:  # pydicom and its codecs raise many types on damaged data
        msg = f"{path}: the DICOM series cannot be read as a volume ({error}); convert it to NIfTI, for example with dcm2niix"
        raise SourceError(msg) from error


def headers_of(path: Path) -> list[Any]:
    """Headers, without pixels, of the series that `path` means; in no particular order."""
    return [pydicom.dcmread(i.path, stop_before_pixels=True) for i in series_at(path)]


def placed(path: Path, slices: list[Any]) -> tuple[list[Any], NDArray[np.float64], tuple[str, ...]]:
    """Slices as a stack in space.

    Parameters
    ----------
    path
        Named in messages.
    slices
        Datasets of a CT, MR or PET series, with pixels or without.

    Returns
    -------
    slices
        In order along the normal of their plane.
    affine
        4 x 4, from the (x, y, z) index of the stack to mm, world axes RAS.
    notes
        What a user should know.

    Raises
    ------
    SourceError
        They do not make a regular stack.
    """
    first = slices[0]
    for s in slices:
        if int(s.get("NumberOfFrames", 1)) != 1 or "ImagePositionPatient" not in s:
            msg = f"{path}: {s.SOPClassUID.name}; expected single-frame slices with a position. Convert it to NIfTI, for example with dcm2niix"
            raise SourceError(msg)
        same = (s.Rows, s.Columns, list(s.PixelSpacing), list(s.ImageOrientationPatient))
        if same != (first.Rows, first.Columns, list(first.PixelSpacing), list(first.ImageOrientationPatient)):
            msg = f"{path}: slices of one series differ in size, spacing or orientation (a localiser among them?); take such files out"
            raise SourceError(msg)
    across, down = np.asarray(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(across, down)
    ordered = sorted(
        slices, key=lambda s: float(np.dot(np.asarray(s.ImagePositionPatient, dtype=np.float64), normal))
    )
    positions = np.asarray([s.ImagePositionPatient for s in ordered], dtype=np.float64)
    step, notes = _slice_step(path, ordered, positions, normal)

    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2], lps[:3, 3] = across * column_mm, down * row_mm, step, positions[0]
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, notes


def _stack(path: Path, series: list[Instance], slices: list[Any], options: ReadOptions) -> ArrayReader:
    slices, affine, notes = placed(path, slices)
    first = slices[0]
    if found := [s.PhotometricInterpretation for s in slices if s.PhotometricInterpretation != "MONOCHROME2"]:
        msg = f"{path}: photometric interpretation {found[0]}; expected MONOCHROME2"
        raise SourceError(msg)
    if len(slices) * first.Rows * first.Columns > WHOLE_VOLUME_LIMIT_PX:
        msg = f"{path}: more than {8 * WHOLE_IMAGE_LIMIT_PX / 1e6:.0f} M voxels; convert it to OME-Zarr"
        raise SourceError(msg)

    rescale = [(float(s.get("RescaleSlope", 1)), float(s.get("RescaleIntercept", 0))) for s in slices]
    stack: NDArray[Any]
    if len(set(rescale)) == 1:
        stack, (slope, intercept) = np.stack([s.pixel_array for s in slices]), rescale[0]
    else:  # PET rescales every slice by itself
        stack = np.stack(
            [(s.pixel_array * m + b).astype(np.float32) for s, (m, b) in zip(slices, rescale, strict=True)]
        )
        slope, intercept = 1.0, 0.0
    return volume_reader(
        uri=str(path),
        stem=stem_of(path.name),
        identity=identity_of_series(series),
        format_=f"dicom:{first.get('Modality', 'unknown')}",
        xyz=np.transpose(stack, (2, 1, 0)),
        affine=affine,
        slope=slope,
        intercept=intercept,
        options=options,
        where="dicom header",
        notes=notes,
    )


def _slice_step(
    path: Path, slices: list[Any], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Vector from slice to slice in mm (LPS), and notes."""
    if len(slices) == 1:
        thickness = slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness")
        if not thickness:
            msg = f"{path}: a single slice without thickness; a volume needs one: give it with --spacing"
            raise SourceError(msg)
        return normal * float(thickness), ("a single slice",)
    distances = np.diff(positions @ normal)
    typical = float(np.median(distances))
    if typical <= REGULAR_MM or np.abs(distances - typical).max() > max(REGULAR_MM, 0.01 * typical):
        msg = (
            f"{path}: slice distances run from {distances.min():.3f} to {distances.max():.3f} mm; expected one distance "
            "(slices are missing, doubled, or of several acquisitions)"
        )
        raise SourceError(msg)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    tilt = math.degrees(math.acos(min(1.0, float(step @ normal) / float(np.linalg.norm(step)))))
    return step, (f"the stack is sheared by {tilt:.1f} degrees (gantry tilt)",) if tilt > 0.5 else ()
