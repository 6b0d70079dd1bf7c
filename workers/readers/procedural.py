"""Images of any size without a file: pixels are a pure function of position and seed.

A pixel has the value of the function at its centre, whatever box and level it is read through; nothing is
stored, and the cost of a read depends on its pixels alone.
"""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ImageMeta, LevelMeta, ReadOptions
from workers.readers.arrays import diagonal_affine
from workers.readers.identity import text_identity
from workers.readers.patterns import PATTERNS, Pattern
from workers.readers.region import centres_inside, check_request
from workers.readers.spacing import slide_spacing, volume_spacing

PREFIX = "procedural:"
SLIDE_DEFAULTS = {"tissue": "0.3", "seed": "0", "mpp": "0.5", "downsamples": "", "pattern": "he"}
VOLUME_DEFAULTS = {"seed": "0", "spacing": "1,1,1", "pattern": "body"}


class ProceduralReader:
    """A slide or volume computed where it is read."""

    def __init__(self, meta: ImageMeta, pattern: Pattern) -> None:
        self.meta = meta
        self._pattern = pattern

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `workers.readers.reader.Reader.read`."""
        check_request(self.meta, box_l0, shape_px, level)
        ranges = centres_inside(box_l0, shape_px, self.meta.shape_l0)
        within = tuple(slice(a, b) for a, b in ranges)
        coverage = np.zeros(shape_px, dtype=np.bool_)
        coverage[within] = True
        centres = [
            a + (np.arange(first, last, dtype=np.float64) + 0.5) * ((b - a) / n)
            for (first, last), a, b, n in zip(ranges, box_l0.start, box_l0.stop, shape_px, strict=True)
        ]
        if coverage.all():
            return self._pattern.values(centres), coverage
        dtype = np.uint8 if self.meta.dtype == "uint8" else np.float32
        out = np.full((self.meta.channels, *shape_px), self.meta.background, dtype=dtype)
        if all(b > a for a, b in ranges):
            out[(slice(None), *within)] = self._pattern.values(centres)
        return out, coverage

    def close(self) -> None:
        """Nothing to release."""


def open_procedural(uri: str, options: ReadOptions) -> ProceduralReader:
    """Open `procedural:slide?...` or `procedural:volume?...`.

    Raises
    ------
    SourceError
        An unknown kind or parameter, or a value that is none.
    """
    kind, _, query = uri.removeprefix(PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
        if kind == "slide":
            return _slide(uri, _parameters(pairs, SLIDE_DEFAULTS, ("width", "height")), options)
        if kind == "volume":
            return _volume(uri, _parameters(pairs, VOLUME_DEFAULTS, ("shape",)), options)
    except ValueError as error:
        msg = f"{uri}: {error}"
        raise SourceError(msg) from error
    msg = f"{uri}: unknown procedural image {kind!r}; expected procedural:slide?width=..&height=.. or procedural:volume?shape=z,y,x"
    raise SourceError(msg)


def _parameters(
    pairs: list[tuple[str, str]], defaults: dict[str, str], needed: tuple[str, ...]
) -> dict[str, str]:
    given = dict(pairs)
    known = {*defaults, *needed}
    if len(given) != len(pairs) or not set(given) <= known:
        msg = f"parameters {[k for k, _ in pairs]}; each of {sorted(known)} may stand once, and no other"
        raise ValueError(msg)
    missing = [name for name in needed if name not in given]
    if missing:
        msg = f"parameter(s) {missing} are missing"
        raise ValueError(msg)
    return {**defaults, **given}


def _slide(uri: str, given: dict[str, str], options: ReadOptions) -> ProceduralReader:
    width, height, seed = int(given["width"]), int(given["height"]), int(given["seed"])
    tissue, mpp = float(given["tissue"]), float(given["mpp"])
    if min(width, height) < 1 or not 0 <= tissue <= 1:
        msg = f"width {width}, height {height}, tissue {tissue}: sizes must be at least 1, tissue within 0..1"
        raise ValueError(msg)
    if given["downsamples"]:
        downsamples = [float(d) for d in given["downsamples"].split(",")]
    else:
        downsamples = [1.0]
        while max(width, height) / downsamples[-1] > 1024:
            downsamples.append(downsamples[-1] * 4)
    if downsamples[0] != 1 or any(b <= a for a, b in itertools.pairwise(downsamples)):
        msg = f"downsamples {downsamples}: the first is 1 and they grow"
        raise ValueError(msg)
    pattern = _pattern(given["pattern"], "slide", (height, width), seed, tissue)
    spacing, source, notes = slide_spacing(uri, options, [("procedural mpp", (mpp, mpp))])
    canonical = {
        "width": width, "height": height, "seed": seed, "tissue": tissue, "mpp": mpp,
        "downsamples": ",".join(f"{d!r}" for d in downsamples), "pattern": given["pattern"],
    }  # fmt: skip
    meta = ImageMeta(
        uri=uri,
        stem=f"procedural-slide-{width}x{height}",
        identity=text_identity(_canonical("slide", canonical)),
        kind="slide",
        format=f"procedural:{given['pattern']}",
        channels=pattern.channels,
        dtype=pattern.dtype,
        levels=tuple(
            LevelMeta(shape=(max(1, int(height / d)), max(1, int(width / d))), downsample=(d, d))
            for d in downsamples
        ),
        spacing=spacing,
        spacing_source=source,
        background=pattern.background,
        notes=notes,
    )
    return ProceduralReader(meta, pattern)


def _volume(uri: str, given: dict[str, str], options: ReadOptions) -> ProceduralReader:
    shape = tuple(int(n) for n in given["shape"].split(","))
    seed = int(given["seed"])
    if len(shape) != 3 or min(shape) < 1:
        msg = f"shape {shape}: three sizes z,y,x of at least 1 are needed"
        raise ValueError(msg)
    stated = tuple(float(s) for s in given["spacing"].split(","))
    spacing, source = volume_spacing(uri, options, stated, "procedural spacing")
    pattern = _pattern(given["pattern"], "volume", shape, seed, 1.0)
    canonical = {
        "shape": ",".join(map(str, shape)), "seed": seed,
        "spacing": ",".join(f"{s!r}" for s in stated), "pattern": given["pattern"],
    }  # fmt: skip
    meta = ImageMeta(
        uri=uri,
        stem="procedural-volume-" + "x".join(map(str, shape)),
        identity=text_identity(_canonical("volume", canonical)),
        kind="volume",
        format=f"procedural:{given['pattern']}",
        channels=pattern.channels,
        dtype=pattern.dtype,
        levels=(LevelMeta(shape=shape, downsample=(1.0, 1.0, 1.0)),),
        spacing=spacing,
        spacing_source=source,
        affine=diagonal_affine(spacing),
        source_orientation="RAS",
        background=pattern.background,
    )
    return ProceduralReader(meta, pattern)


def _pattern(name: str, kind: str, shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    make = PATTERNS[kind].get(name)
    if make is None:
        msg = f"pattern {name!r}; a {kind} has {sorted(PATTERNS[kind])}"
        raise ValueError(msg)
    return make(shape, seed, tissue)


def _canonical(kind: str, parameters: dict[str, Any]) -> str:
    return f"{PREFIX}{kind}?" + "&".join(f"{k}={v}" for k, v in sorted(parameters.items()))
