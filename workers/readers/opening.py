"""`open_image`: from a URI to the reader that serves it. Heavy libraries are imported where they are needed."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import SourceError
from schemas.image import ReadOptions
from workers.readers.reader import Reader

VENDOR_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi")
"""Suffixes only a slide scanner gives: where OpenSlide rejects such a file it is damaged, not merely unknown."""


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
        msg = f"{path}: no such file or folder"
        raise SourceError(msg)
    return _open_file(path, options)


def _open_file(path: Path, options: ReadOptions) -> Reader:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        from workers.readers.volume import open_nifti

        return open_nifti(path, options)
    return _open_slide(path, options)


def _open_slide(path: Path, options: ReadOptions) -> Reader:
    from workers.readers.slide import CompressionRefused, SlideReader, detect

    if detect(path) is not None:
        try:
            return SlideReader(path, options)
        except CompressionRefused as refusal:
            msg = f"{path}: {refusal}"
            raise SourceError(msg) from refusal
    if path.suffix.lower() in VENDOR_SUFFIXES:
        msg = (
            f"{path}: the file exists ({path.stat().st_size:,} bytes) but is truncated or not a slide: OpenSlide does "
            f"not recognise its content, expected of a {path.suffix} file; copy it again from its source"
        )
        raise SourceError(msg)
    msg = f"{path}: not an image that can be read here"
    raise SourceError(msg)
