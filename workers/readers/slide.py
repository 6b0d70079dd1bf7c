"""Slides through OpenSlide; the only file that imports it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray
from openslide import OpenSlide, OpenSlideCache, OpenSlideError
from PIL import Image

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ImageMeta, LevelMeta, ReadOptions, stem_of
from workers.readers.identity import slide_identity
from workers.readers.region import read_region
from workers.readers.spacing import resolution_um, slide_spacing

CACHE_BYTES = 64 << 20
"""Decoded tiles a handle keeps; per handle, so that many open slides stay bounded."""
ORIGIN_SEARCH_PX = 8
"""How many level px a read may start earlier to begin on a whole level pixel."""


class CompressionRefused(Exception):
    """OpenSlide knows the format but not the codec; another decoder may."""


def detect(path: Path) -> str | None:
    """OpenSlide's vendor name for `path`, or None where it does not recognise the file."""
    vendor: str | None = OpenSlide.detect_format(path)
    return vendor


class SlideReader:
    """One slide through one OpenSlide handle.

    OpenSlide's errors latch: after one, every call on that handle fails. The handle is therefore
    dropped after any error, and the next read opens a fresh one.

    Parameters
    ----------
    path
        The slide's (first) file.
    identity
        Given where the content is more than this file (a DICOM series).

    Raises
    ------
    CompressionRefused
        OpenSlide recognises the file and refuses its codec.
    SourceError
        Not readable, or without a plausible pixel size.
    """

    def __init__(self, path: Path, options: ReadOptions, identity: str | None = None) -> None:
        self._path = path
        self._slide: OpenSlide | None = None
        self.meta: ImageMeta = self._probe(options, identity or slide_identity(path))

    def _probe(self, options: ReadOptions, identity: str) -> ImageMeta:
        try:
            slide = self._open()
            properties = dict(slide.properties)
            sizes, downsamples = slide.level_dimensions, slide.level_downsamples
        except (OpenSlideError, KeyError, ValueError) as error:  # a property lost, or one that is no text
            self.close()
            if "compression" in str(error).lower():
                raise CompressionRefused(str(error)) from error
            msg = f"{self._path}: OpenSlide cannot open it ({error}); the file is damaged or of a variant it does not read"
            raise SourceError(msg) from error
        self._check_pixels(sizes)
        spacing, source, notes = slide_spacing(str(self._path), options, _pixel_sizes(properties))
        return ImageMeta(
            uri=str(self._path),
            stem=stem_of(self._path.name),
            identity=identity,
            kind="slide",
            format=f"openslide:{properties.get(openslide.PROPERTY_NAME_VENDOR, 'unknown')}",
            channels=3,
            dtype="uint8",
            levels=tuple(
                LevelMeta(shape=(h, w), downsample=(float(d), float(d)))
                for (w, h), d in zip(sizes, downsamples, strict=True)
            ),
            spacing=spacing,
            spacing_source=source,
            background=255.0,
            notes=notes,
        )

    def _check_pixels(self, sizes: tuple[tuple[int, int], ...]) -> None:
        """One readable place is enough: a slide with bad tiles is opened, one without any pixel is not."""
        (w0, h0), last = sizes[0], len(sizes) - 1
        reason = ""
        for location, level in (((w0 // 2, h0 // 2), 0), ((0, 0), 0), ((0, 0), last)):
            try:
                self._open().read_region(location, level, (1, 1))
            except OpenSlideError as error:
                self.close()
                reason = str(error)
            else:
                return
        msg = (
            f"{self._path}: opens, but no pixel can be read ({reason}); "
            "the image data are damaged: copy the file again from its source"
        )
        raise SourceError(msg)

    def _open(self) -> OpenSlide:
        if self._slide is None:
            self._slide = OpenSlide(self._path)
            self._slide.set_cache(OpenSlideCache(CACHE_BYTES))
        return self._slide

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `workers.readers.reader.Reader.read`; pixels are `(3, *shape_px)` uint8."""
        return read_region(self.meta, self._fetch, box_l0, shape_px, level)

    @property
    def objective(self) -> str:
        """Magnification of the objective, as the file says it; empty where it does not."""
        return str(self._open().properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, ""))

    @property
    def associated(self) -> tuple[str, ...]:
        """Names of the pictures beside the slide: `label` and `macro` may show a patient's name."""
        return tuple(sorted(self._open().associated_images))

    def associated_image(self, name: str) -> NDArray[np.uint8]:
        """`(h, w, 3)` of one of `associated`.

        Raises
        ------
        SourceError
            There is no such picture, or it cannot be read.
        """
        try:
            return np.asarray(_on_white(self._open().associated_images[name]))
        except (KeyError, OpenSlideError) as error:
            self.close()
            msg = f"{self._path}: its picture {name!r} cannot be read ({error})"
            raise SourceError(msg) from error

    def close(self) -> None:
        """Release the handle; a later `read` opens it again."""
        if self._slide is not None:
            self._slide.close()
            self._slide = None

    def _fetch(
        self, level: int, start: tuple[int, ...], stop: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
        lv = self.meta.levels[level]
        location, origin, size = [], [], []
        for a, b, n, ds in zip(start, stop, lv.shape, lv.downsample, strict=True):
            at_l0 = level_origin(a, ds)
            at_lv = at_l0 / ds
            location.append(at_l0)
            origin.append(at_lv)
            # A fractional origin would end in a pixel that is part outside the level: leave it out.
            size.append(max(1, min(math.ceil(b - at_lv), math.floor(n - at_lv + 1e-9))))
        try:
            picture = self._open().read_region((location[1], location[0]), level, (size[1], size[0]))
        except OpenSlideError as error:
            self.close()
            msg = (
                f"{self._path}: level {level} cannot be read at x {location[1]}, y {location[0]} (level-0 px), "
                f"{size[1]} x {size[0]} px ({error}); that part of the file is damaged: copy the file again from its source"
            )
            raise SourceError(msg) from error
        rgb = np.asarray(_on_white(picture))
        return np.moveaxis(rgb, -1, 0), tuple(origin)


def level_origin(start_lv: int, downsample: float) -> int:
    """Level-0 px to ask OpenSlide for, at or up to 8 level px before `start_lv`.

    OpenSlide takes whole level-0 px only and places a level at the exact quotient `x / downsample`,
    interpolating linearly between level pixels where that is a fraction (measured: within 2 grey levels
    of that model, tile seams included). The quotient nearest to a whole number at or before `start_lv`
    is chosen; what fraction is left (at most half a level-0 px) is a blur that the caller's origin accounts for,
    not a shift.
    """
    if downsample == 1.0 or start_lv == 0:
        return round(start_lv * downsample)
    best, best_error = 0, math.inf
    for k in range(start_lv, max(-1, start_lv - ORIGIN_SEARCH_PX), -1):
        x = round(k * downsample)
        if x > start_lv * downsample:  # would leave out part of the first pixel asked for
            continue
        error = abs(x / downsample - k) + 1e-3 * (start_lv - k)
        if error < best_error - 1e-9:
            best, best_error = x, error
    return best


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.getchannel("A").getextrema() == (255, 255):
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _pixel_sizes(properties: dict[str, str]) -> list[tuple[str, tuple[float, float]]]:
    found: list[tuple[str, tuple[float, float]]] = []
    x, y = (
        _number(properties.get(n)) for n in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    )
    if x is not None and y is not None:
        found.append(("openslide.mpp-x", (y, x)))
    x, y = (_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    if x is not None and y is not None:
        um = resolution_um(x, y, properties.get("tiff.ResolutionUnit", "inch"))
        if um is not None:
            found.append(("TIFF resolution tags", um))
    return found


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def library_version() -> str:
    """Version of the OpenSlide library in use."""
    return f"OpenSlide {openslide.__library_version__}"
