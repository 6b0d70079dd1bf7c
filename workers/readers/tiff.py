"""TIFF and OME-TIFF that OpenSlide does not read: tifffile + imagecodecs, decoding only the tiles needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import WHOLE_IMAGE_LIMIT_PX, ImageMeta, LevelMeta, ReadOptions, stem_of
from workers.readers.arrays import array_meta
from workers.readers.identity import combined_identity, file_identity
from workers.readers.region import read_region
from workers.readers.spacing import resolution_um

TO_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SCANNERS = ("svs", "ndpi", "scn", "bif", "philips")
"""Flavours that OpenSlide reads: where it did not recognise one, the file is damaged."""


def is_tiff(path: Path) -> bool:
    """Whether a file starts as a TIFF does."""
    with path.open("rb") as file:
        return file.read(4) in MAGIC


def beyond_openslide(path: Path) -> bool:
    """Whether a TIFF holds more than OpenSlide's generic reader shows of it.

    That reader takes the first image of any tiled TIFF as 8-bit RGB: of an OME-TIFF it drops channels,
    levels and pixel size, of deeper pixels the lower bits.
    """
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            return bool(file.is_ome or page.bitspersample != 8)
    except Exception:  # of many types where the file is damaged; who opens it says so
        return False


class TiffReader:
    """One slide in a TIFF, all its levels; decodes the tiles or strips that a read needs.

    Parameters
    ----------
    refusal
        What OpenSlide said when it refused the codec; empty where it did not recognise the file.

    Raises
    ------
    SourceError
        Damaged, of an unknown codec, in one piece above 64 Mpx, or without a plausible pixel size.
    """

    def __init__(self, path: Path, options: ReadOptions, refusal: str = "") -> None:
        self._path = path
        self._options = options
        self._refusal = refusal
        self._file: Any = None
        self._levels: list[Any] = []
        self._axes = ""
        self._alpha = False
        try:
            self.meta: ImageMeta = self._probe()
        except SourceError:
            self.close()
            raise
        except Exception as error:  # tifffile and codecs raise many types on a damaged file
            raise self._problem(error) from error

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `workers.readers.reader.Reader.read`."""
        return read_region(self.meta, self._fetch, box_l0, shape_px, level)

    def close(self) -> None:
        """Release the file; a later `read` opens it again."""
        self._levels = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> Any:
        """Open the file where it is not; return the series that is the slide: the largest."""
        if self._file is None:
            self._file = tifffile.TiffFile(self._path)
        series = max(self._file.series, key=lambda s: math.prod(_plane(s.axes, s.shape)))
        if not self._levels:
            # tiles that a file leaves out are glass on a slide, nothing in fluorescence
            missing = 255 if series.dtype == np.uint8 and series.keyframe.samplesperpixel > 1 else 0
            self._levels = [
                zarr.open_array(series.aszarr(level=i, fillvalue=missing), mode="r")
                for i in range(len(series.levels))
            ]
        return series

    def _problem(self, error: Exception) -> SourceError:
        self.close()
        refused = f"OpenSlide: {self._refusal}; tifffile: " if self._refusal else ""
        return SourceError(
            f"{self._path}: its pixels cannot be decoded ({refused}{error}); "
            "the file is damaged or uses a codec without a decoder here: convert it to JPEG- or deflate-compressed TIFF"
        )

    def _probe(self) -> ImageMeta:
        series = self._open()
        page = series.keyframe
        flavour = next((f for f in SCANNERS if getattr(self._file, f"is_{f}")), "")
        if flavour and not self._refusal:
            msg = f"{self._path}: claims to be {flavour.upper()}, but OpenSlide does not recognise it: truncated or damaged; copy it again from its source"
            raise SourceError(msg)
        self._check_layout(series, page)
        self._axes = series.axes
        sizes = dict(zip(series.axes, series.shape, strict=True))
        self._alpha = page.samplesperpixel == 4 and page.extrasamples != () and "S" in sizes
        channels = 3 if self._alpha else sizes.get("S", 1) * sizes.get("C", 1)
        note = self._choose(sizes)
        if note.startswith("channel") or ",channel" in note:
            channels = sizes.get("S", 1)
        shapes = [_plane(level.axes, level.shape) for level in series.levels]
        self._fetch(
            len(shapes) - 1, (0, 0), (1, 1)
        )  # before the pixel size: a codec problem has no remedy there
        identity = file_identity(self._path)
        return array_meta(
            uri=str(self._path),
            stem=stem_of(self._path.name) + (f"-{note.replace('=', '')}" if note else ""),
            identity=combined_identity(identity, note) if note else identity,
            format_="tifffile:ome" if self._file.is_ome else "tifffile",
            kind="slide",
            channels=channels,
            dtype=np.dtype(series.dtype),
            levels=[
                LevelMeta(shape=shape, downsample=level_downsample(shapes[0], shape)) for shape in shapes
            ],
            options=self._options,
            found=self._pixel_size(series, page),
        )

    def _check_layout(self, series: Any, page: Any) -> None:
        size = self._path.stat().st_size
        pieces = [stop for level in series.levels for stop in _ends(level.keyframe)]
        lost = sum(stop > size for stop in pieces)
        if lost:
            msg = (
                f"{self._path}: truncated: {lost} of {len(pieces)} tiles or strips lie beyond its end "
                f"({size:,} bytes); copy it again from its source"
            )
            raise SourceError(msg)
        for array in self._levels:
            piece = math.prod(_plane(series.axes, array.chunks))
            if piece > WHOLE_IMAGE_LIMIT_PX:
                msg = (
                    f"{self._path}: is stored in pieces of {piece / 1e6:.0f} Mpx, at most "
                    f"{WHOLE_IMAGE_LIMIT_PX / 1e6:.0f} Mpx are decoded at once; convert it to a tiled TIFF"
                )
                raise SourceError(msg)
        photometric = tifffile.PHOTOMETRIC(page.photometric).name
        if photometric not in ("RGB", "MINISBLACK", "YCBCR"):
            msg = f"{self._path}: photometric interpretation {photometric}; expected RGB, YCbCr or grey. Convert it to RGB"
            raise SourceError(msg)

    def _choose(self, sizes: dict[str, int]) -> str:
        """Check that everything beside y, x and channels is chosen; a tag such as `time=1`, or ''."""
        other = {a: n for a, n in sizes.items() if a not in "YXSCT" and n > 1}
        if other:
            msg = f"{self._path}: axes {sizes}; expected one plane of y, x (and channels). Convert a stack to OME-Zarr or NIfTI"
            raise SourceError(msg)
        picked = []
        for axis, name, given in (("T", "time", self._options.time), ("C", "channel", self._options.channel)):
            n = sizes.get(axis, 1)
            if axis == "T" and n > 1 and given is None:
                msg = f"{self._path}: has {n} time points; choose one with --time 0..{n - 1}"
                raise SourceError(msg)
            if given is not None and not 0 <= given < n:
                msg = f"{self._path}: --{name} {given} is out of range; the image has {n}"
                raise SourceError(msg)
            if given is not None and n > 1:
                picked.append(f"{name}={given}")
        return ",".join(picked)

    def _pixel_size(self, series: Any, page: Any) -> tuple[str, tuple[float, ...]] | None:
        if self._file.is_ome:
            size = ome_pixel_size(self._file.ome_metadata, self._file.series.index(series))
            if size is not None:
                return "OME PhysicalSize", size
        tags = [page.tags.get(name) for name in ("XResolution", "YResolution", "ResolutionUnit")]
        if any(tag is None for tag in tags):
            return None
        (xn, xd), (yn, yd) = tags[0].value, tags[1].value
        if not xd or not yd:
            return None
        um = resolution_um(xn / xd, yn / yd, tifffile.RESUNIT(tags[2].value).name)
        return None if um is None else ("TIFF resolution tags", um)

    def _fetch(
        self, level: int, start: tuple[int, ...], stop: tuple[int, ...]
    ) -> tuple[NDArray[Any], tuple[float, ...]]:
        window = {"Y": slice(start[0], stop[0]), "X": slice(start[1], stop[1])}
        index: list[Any] = []
        for axis in self._axes:
            if axis in "YX":
                index.append(window[axis])
            elif axis == "S":
                index.append(slice(None))
            elif axis == "C":
                chosen = self._options.channel
                index.append(slice(None) if chosen is None else slice(chosen, chosen + 1))
            else:
                index.append((self._options.time or 0) if axis == "T" else 0)
        try:
            self._open()
            pixels = np.asarray(self._levels[level][tuple(index)])
        except Exception as error:  # each codec raises its own type
            raise self._problem(error) from error
        kept = [a for a in self._axes if a in "YXSC"]
        order = [a for a in "CSYX" if a in kept]
        pixels = np.transpose(pixels, [kept.index(a) for a in order])
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        return on_white(pixels) if self._alpha else pixels, tuple(map(float, start))


def on_white(rgba: NDArray[Any]) -> NDArray[Any]:
    """`(4, y, x)` with alpha -> `(3, y, x)` over white, in the type's own range."""
    top = float(np.iinfo(rgba.dtype).max) if np.issubdtype(rgba.dtype, np.integer) else 1.0
    alpha = rgba[3:] / top
    over = rgba[:3] * alpha + top * (1 - alpha)
    return (np.rint(over) if np.issubdtype(rgba.dtype, np.integer) else over).astype(rgba.dtype)


def level_downsample(shape_l0: tuple[int, ...], shape: tuple[int, ...]) -> tuple[float, ...]:
    """Level-0 px a level px: the whole factor whose rounding explains the level's size, else the ratio of sizes."""
    result = []
    for n0, n in zip(shape_l0, shape, strict=True):
        factor = round(n0 / n)
        result.append(float(factor) if n in (n0 // factor, -(-n0 // factor)) else n0 / n)
    return tuple(result)


def ome_pixel_size(xml: str, index: int) -> tuple[float, float] | None:
    """`(y, x)` um of the `index`-th image of an OME-XML text; None where it does not say."""
    try:
        pixels = [e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("}Pixels")]
        attributes = pixels[index].attrib
        y, x = (
            float(attributes[f"PhysicalSize{a}"]) * TO_UM[attributes.get(f"PhysicalSize{a}Unit", "µm")]
            for a in "YX"
        )
    except (ElementTree.ParseError, IndexError, KeyError, ValueError):
        return None
    return (y, x) if y > 0 and x > 0 else None


def _ends(page: Any) -> list[int]:
    """Where each tile or strip of a page ends in the file, in bytes."""
    return [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]


def _plane(axes: str, shape: tuple[int, ...]) -> tuple[int, int]:
    sizes = dict(zip(axes, shape, strict=True))
    return sizes.get("Y", 1), sizes.get("X", 1)
