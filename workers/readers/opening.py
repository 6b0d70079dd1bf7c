"""`open_image`: from a URI to the reader that serves it. Heavy libraries are imported where they are needed."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import SourceError
from schemas.image import ReadOptions
from workers.readers.identity import folder_identity, slide_identity
from workers.readers.reader import Reader

VENDOR_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi")
"""Suffixes only a slide scanner gives: where OpenSlide rejects such a file it is damaged, not merely unknown."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


def open_image(uri: str, options: ReadOptions | None = None) -> Reader:
    """Open an image by path or `procedural:` URI.

    Parameters
    ----------
    uri
        A file, a folder that is one image (OME-Zarr, DICOM series, MRXS companion), or `procedural:...`.
    options
        What the user settles over the metadata.

    Raises
    ------
    SourceError
        Missing, unsupported, damaged, or without a plausible pixel size; the message says which and what to do.
    """
    options = options or ReadOptions()
    if uri.startswith("procedural:"):
        from workers.readers.procedural import open_procedural

        return open_procedural(uri, options)
    if "://" in uri and not uri.startswith("file://"):
        msg = f"{uri}: images are opened from a file system only; download it first and give the local path"
        raise SourceError(msg)
    path = Path(uri.removeprefix("file://")).expanduser()
    if not path.exists():
        msg = f"{path}: no such file or folder; check the path"
        raise SourceError(msg)
    return _open_folder(path, options) if path.is_dir() else _open_file(path, options)


def identity_of(uri: str) -> str:
    """Identity (sha256 hex) of what `uri` names, without opening its pixels.

    A volume chosen from several by `--time` or `--channel` has an identity of its own, derived from this one.

    Raises
    ------
    SourceError
        There is no such file, or it cannot be read.
    """
    if uri.startswith("procedural:"):
        return open_image(uri).meta.identity
    path = Path(uri.removeprefix("file://")).expanduser()
    if path.is_dir():
        from workers.readers.ngff import is_zarr

        path = companion_slide(path) or path
        if path.is_dir() and is_zarr(path):
            return folder_identity(path)
    elif not path.name.lower().endswith(DICOM_SUFFIXES):
        return slide_identity(path)
    if path.is_file() and not path.name.lower().endswith(DICOM_SUFFIXES):
        return slide_identity(path)
    from workers.readers.dicom import identity_of_series, series_at

    return identity_of_series(series_at(path))


def companion_slide(folder: Path) -> Path | None:
    """The `.mrxs` file beside the folder that holds its pixels; None where `folder` is no such folder."""
    slide = folder.with_name(f"{folder.name}.mrxs")
    return slide if slide.is_file() and (folder / "Slidedat.ini").is_file() else None


def _open_folder(path: Path, options: ReadOptions) -> Reader:
    from workers.readers.ngff import is_zarr, open_zarr

    if is_zarr(path):
        return open_zarr(path, options)
    slide = companion_slide(path)
    return _open_slide(slide, options) if slide else _open_dicom(path, options)


def _open_file(path: Path, options: ReadOptions) -> Reader:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        from workers.readers.volume import open_nifti

        return open_nifti(path, options)
    if name.endswith((".npy", *PICTURE_SUFFIXES)):
        from workers.readers.arrays import open_npy, open_picture

        return open_npy(path, options) if name.endswith(".npy") else open_picture(path, options)
    if name.endswith(DICOM_SUFFIXES):
        return _open_dicom(path, options)
    if name.endswith((".h5", ".hdf5")):
        from workers.readers.features import FeaturesReader

        return FeaturesReader(path, options)
    return _open_slide(path, options)


def _open_dicom(path: Path, options: ReadOptions) -> Reader:
    from workers.readers.dicom import identity_of_series, open_series, series_at, slide_file

    series = series_at(path)
    if not series[0].is_slide:
        return open_series(path, series, options)
    from workers.readers.slide import SlideReader

    return SlideReader(slide_file(series, path), options, identity_of_series(series))


def _open_slide(path: Path, options: ReadOptions) -> Reader:
    from workers.readers.dicom import is_dicom
    from workers.readers.slide import CompressionRefused, SlideReader, detect
    from workers.readers.tiff import TiffReader, beyond_openslide, is_tiff

    refusal = ""
    vendor = detect(path)
    if vendor == "generic-tiff" and beyond_openslide(path):
        return TiffReader(path, options)
    if vendor is not None:
        try:
            return SlideReader(path, options)
        except CompressionRefused as error:
            refusal = str(error)
    elif path.suffix.lower() in VENDOR_SUFFIXES:
        msg = (
            f"{path}: the file exists ({path.stat().st_size:,} bytes) but is truncated or not a slide: OpenSlide does "
            f"not recognise its content, expected of a {path.suffix} file; copy it again from its source"
        )
        raise SourceError(msg)
    if is_tiff(path):
        return TiffReader(path, options, refusal)
    if is_dicom(path):
        return _open_dicom(path, options)
    msg = (
        f"{path}: not an image that can be read here; expected a slide, TIFF, NIfTI, DICOM, OME-Zarr, "
        ".npy, PNG or JPEG (by content or by suffix)"
    )
    raise SourceError(msg)
