"""Images that are arrays: in memory, `.npy`, and small pictures (PNG, JPEG) decoded whole."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ImageMeta, Kind, LevelMeta, ReadOptions, stem_of
from workers.readers.identity import file_identity
from workers.readers.region import read_region
from workers.readers.spacing import slide_spacing, volume_spacing

Take = Callable[[int, tuple[slice, ...]], NDArray[Any]]
"""`take(level, window) -> (C, *window)`: level pixels of a spatial window."""


class ArrayReader:
    """A source whose levels can be sliced; NaN reads as background."""

    def __init__(self, meta: ImageMeta, take: Take) -> None:
        self.meta = meta
        self._take = take

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `workers.readers.reader.Reader.read`."""
        return read_region(self.meta, self._fetch, box_l0, shape_px, level)

    def close(self) -> None:
        """Nothing to release: the array goes with the reader."""

    def _fetch(
        self, level: int, start: tuple[int, ...], stop: tuple[int, ...]
    ) -> tuple[NDArray[Any], tuple[float, ...]]:
        pixels = self._take(level, tuple(slice(a, b) for a, b in zip(start, stop, strict=True)))
        if self.meta.dtype == "float32":
            pixels = np.nan_to_num(pixels.astype(np.float32), nan=self.meta.background, copy=False)
        return pixels, tuple(map(float, start))


def diagonal_affine(spacing: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """4 x 4 affine of a volume that states no orientation: (x, y, z) index * spacing, from `(z, y, x)` mm."""
    z, y, x = spacing
    return ((x, 0.0, 0.0, 0.0), (0.0, y, 0.0, 0.0), (0.0, 0.0, z, 0.0), (0.0, 0.0, 0.0, 1.0))


def array_meta(
    *,
    uri: str,
    stem: str,
    identity: str,
    format_: str,
    kind: Kind,
    channels: int,
    dtype: np.dtype[Any],
    levels: Sequence[LevelMeta],
    options: ReadOptions,
    found: tuple[str, tuple[float, ...]] | None = None,
    background: float | None = None,
    notes: tuple[str, ...] = (),
) -> ImageMeta:
    """Settle the spacing of an array source and describe it.

    Raises
    ------
    SourceError
        No plausible pixel size, or a type that is no real number.
    """
    if not (np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating) or dtype == np.bool_):
        msg = f"{uri}: holds {dtype}; expected integers or real numbers"
        raise SourceError(msg)
    spacing: tuple[float, ...]
    affine = None
    if kind == "slide":
        pixel_sizes = [] if found is None else [(found[0], (found[1][0], found[1][1]))]
        spacing, source, more = slide_spacing(uri, options, pixel_sizes)
        notes += more
    else:
        spacing, source = volume_spacing(uri, options, found and found[1], found[0] if found else "")
        affine = diagonal_affine(spacing)
    if background is None:
        background = 255.0 if kind == "slide" and dtype == np.uint8 and channels == 3 else 0.0
    return ImageMeta(
        uri=uri,
        stem=stem,
        identity=identity,
        kind=kind,
        format=format_,
        channels=channels,
        dtype="uint8" if dtype == np.uint8 and kind == "slide" else "float32",
        levels=tuple(levels),
        spacing=spacing,
        spacing_source=source,
        affine=affine,
        source_orientation="RAS" if kind == "volume" else "",
        background=background,
        notes=notes,
    )


def array_reader(
    array: NDArray[Any],
    options: ReadOptions,
    *,
    uri: str = "array",
    identity: str | None = None,
    format_: str = "numpy",
) -> ArrayReader:
    """Read from an array in memory (or mapped).

    Parameters
    ----------
    array
        `(y, x)`, `(c, y, x)` or `(y, x, c)` with c = 3 and uint8: a slide;
        `(z, y, x)` or `(c, z, y, x)`: a volume, taken to be in RAS order.
    options
        Has to give `mpp_um` (slides) or `spacing_mm` (volumes): an array knows no pixel size.
    identity
        sha256 hex; None: of the array's type, shape and bytes.

    Raises
    ------
    SourceError
        No pixel size, or a shape that is neither.
    """
    kind, pixels = channels_first(uri, array)
    if identity is None:
        digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        identity = digest.hexdigest()
    shape = pixels.shape[1:]
    meta = array_meta(
        uri=uri,
        stem=stem_of(Path(uri).name),
        identity=identity,
        format_=format_,
        kind=kind,
        channels=pixels.shape[0],
        dtype=array.dtype,
        levels=(LevelMeta(shape=shape, downsample=(1.0,) * len(shape)),),
        options=options,
        background=lowest(pixels) if kind == "volume" else None,
    )
    return ArrayReader(meta, lambda level, window: pixels[(slice(None), *window)])


def channels_first(uri: str, array: NDArray[Any]) -> tuple[Kind, NDArray[Any]]:
    """Tell slide from volume by shape and type; view the array as `(C, *S)`."""
    shape = array.shape
    if array.size == 0:
        msg = f"{uri}: an array of shape {shape} holds no pixel"
        raise SourceError(msg)
    if len(shape) == 2:
        return "slide", array[None]
    if len(shape) == 3:
        if array.dtype == np.uint8 and shape[0] == 3:
            return "slide", array
        if array.dtype == np.uint8 and shape[2] == 3:
            return "slide", np.moveaxis(array, -1, 0)
        return "volume", array[None]
    if len(shape) == 4:
        return "volume", array
    msg = f"{uri}: an array of shape {shape}; expected (y, x), uint8 (3, y, x) or (y, x, 3), (z, y, x) or (c, z, y, x)"
    raise SourceError(msg)


def lowest(array: NDArray[Any]) -> float:
    """Smallest finite value as float32 gives it back; 0 where there is none."""
    values = array[np.isfinite(array)] if np.issubdtype(array.dtype, np.floating) else array
    return float(np.float32(values.min())) if values.size else 0.0


def open_npy(path: Path, options: ReadOptions) -> ArrayReader:
    """Open a `.npy` file, mapped, not loaded."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of many types where the header, which is Python, is damaged
        msg = f"{path}: not a readable .npy array ({error}); save it again with numpy.save"
        raise SourceError(msg) from error
    return array_reader(array, options, uri=str(path), identity=file_identity(path), format_="npy")


def open_picture(path: Path, options: ReadOptions) -> ArrayReader:
    """Open a PNG or JPEG; its pixel size has to be given.

    Raises
    ------
    SourceError
        Above 64 Mpx (it can only be decoded whole), damaged, or of a depth that is not 8 bit.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below is stricter.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            if math.prod(picture.size) > WHOLE_IMAGE_LIMIT_PX:
                msg = (
                    f"{path}: {math.prod(picture.size) / 1e6:.0f} Mpx can only be decoded whole, at most "
                    f"{WHOLE_IMAGE_LIMIT_PX / 1e6:.0f} Mpx are; convert it to a tiled pyramidal TIFF or OME-Zarr"
                )
                raise SourceError(msg)
            if picture.mode.startswith(("I", "F")):
                msg = (
                    f"{path}: a picture of mode {picture.mode}; expected 8 bits a channel. Convert it to TIFF"
                )
                raise SourceError(msg)
            grey = picture.mode in ("L", "1")
            if "A" in picture.getbands() or "transparency" in picture.info:
                rgba = picture.convert("RGBA")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            else:
                pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except SourceError:
        raise
    except Exception as error:  # Pillow raises many types on a damaged picture
        msg = (
            f"{path}: not a readable picture ({error}); copy it again from its source, or convert it to TIFF"
        )
        raise SourceError(msg) from error
    return array_reader(
        pixels, options, uri=str(path), identity=file_identity(path), format_=f"pillow:{picture.format}"
    )
