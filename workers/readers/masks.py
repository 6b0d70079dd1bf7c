"""A user's mask file, and whether it lies over the image it is given for."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError, SpecError
from schemas.geometry import Box
from schemas.image import ImageMeta, ReadOptions
from workers.readers.identity import file_identity
from workers.readers.opening import open_image

NIFTI_SUFFIXES = (".nii", ".nii.gz")
NEAR = 1e-3
"""Voxels by which affines written in float32 may differ."""


def read_mask(path: str, meta: ImageMeta) -> tuple[NDArray[np.bool_], str]:
    """Read a user's mask file whole: a picture, TIFF or `.npy` for slides, NIfTI or `.npy` for volumes.

    A slide's mask has the slide's aspect, to one mask pixel. Of a volume and a mask that both state where
    they lie (NIfTI, DICOM), the fields of view agree within half a voxel, a coarser mask's rounding apart;
    any other mask of a volume has its shape, each axis divided by a whole number.

    Parameters
    ----------
    path
        The mask's file.
    meta
        The image it is for.

    Returns
    -------
    mask
        `(y, x)` or `(z, y, x)` (RAS order): True where a pixel is not 0; its frame is stretched over the image.
    sha256
        Identity of the file.

    Raises
    ------
    SourceError
        Unreadable, or of another number of axes.
    SpecError
        It is of another field of view than the image.
    """
    mask, own = load_mask(path, meta.ndim)
    if meta.kind == "slide":
        fits, wanted = _same_aspect(mask.shape, meta.shape_l0), "the slide's aspect"
    elif _is_placed(meta) and _is_placed(own):
        fits, wanted = _same_field(own, meta), "the field of view of the image's affine"
    else:
        fits = all(map(_divides, mask.shape, meta.shape_l0))
        wanted = "the image's shape, or that divided by whole numbers"
    if not fits:
        msg = (
            f"{path}: a mask of shape {mask.shape} does not lie over {meta.uri} of shape {meta.shape_l0}; "
            f"expected {wanted}. Draw it over the whole image, or export it in the image's own frame"
        )
        raise SpecError(msg)
    return mask, file_identity(Path(path))


def load_mask(path: str, ndim: int) -> tuple[NDArray[np.bool_], ImageMeta]:
    """A mask file's pixels that are not 0, `(*S)`, and what its reader knows of it.

    Raises
    ------
    SourceError
        Unreadable, or of another number of axes than `ndim`.
    """
    # A picture or array states no pixel size, and its own is of no matter: it spans the image it is for.
    options = ReadOptions(mpp_um=1.0, spacing_mm=(1.0, 1.0, 1.0))
    reader = open_image(path, ReadOptions() if path.lower().endswith(NIFTI_SUFFIXES) else options)
    try:
        own = reader.meta
        if own.ndim != ndim:
            msg = f"{path}: a mask of {own.ndim} axes; expected {ndim}, as the image has"
            raise SourceError(msg)
        pixels, _ = reader.read(Box(frame="l0", start=(0,) * ndim, stop=own.shape_l0), own.shape_l0, 0)
    finally:
        reader.close()
    return (pixels != 0).any(axis=0), own


def _same_aspect(mask: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether one scale k lays the mask on the image: `|m * k - n| <= k` on every axis."""
    low = max(n / (m + 1) for m, n in zip(mask, image, strict=True))
    high = min(n / (m - 1) if m > 1 else math.inf for m, n in zip(mask, image, strict=True))
    return low <= high


def _divides(m: int, n: int) -> bool:
    """Whether `n` divided by a whole number, rounded down or up, is `m`."""
    k = max(1, round(n / m))
    return m in (n // k, -(-n // k))


def _is_placed(meta: ImageMeta) -> bool:
    """Whether the affine is the source's own, not one made up for an array."""
    return meta.format.startswith(("nifti", "dicom"))


def _same_field(own: ImageMeta, meta: ImageMeta) -> bool:
    """Whether the corners of both volumes meet, in voxels of the image.

    Where the user has corrected the voxel size (`--spacing`), the mask's header says what the image's did:
    it is corrected alike, and only origin and directions are compared.
    """
    image, mask = (np.array(m.affine, dtype=np.float64) for m in (meta, own))
    shape, size = (np.array(m.shape_l0[::-1], dtype=np.float64) for m in (meta, own))
    voxel = np.linalg.norm(image[:3, :3], axis=0)
    if meta.spacing_source == "--spacing":
        mask[:3, :3] *= voxel * shape / size / np.linalg.norm(mask[:3, :3], axis=0)
    coarser = np.maximum(np.linalg.norm(mask[:3, :3], axis=0) / voxel, 1.0)
    first = 0.5 * coarser + NEAR
    last = np.maximum(0.5, coarser - 0.5) + NEAR  # a whole number of coarser voxels may reach past the edge
    to_image = np.linalg.inv(image) @ mask
    for corner in itertools.product((0.0, 1.0), repeat=3):
        at: Any = np.array(corner)
        place = (to_image @ np.append(at * size - 0.5, 1.0))[:3]
        if (np.abs(place - (at * shape - 0.5)) > np.where(at == 0, first, last)).any():
            return False
    return True
