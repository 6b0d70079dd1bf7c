"""Synthetic whole slides with planted lesions, as files with their truth and as training tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from schemas.errors import SpecError
from workers.synthetic.tissue import BAND_PX, DISTRACTOR, LESION, U8, Focus, Planted, lay_out, paint

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_TILE = 256
_PRESENT = 0.03  # share of a tile from which a class counts as present
_TRAINING_SLIDES = 3


@dataclass(frozen=True)
class SlideTruth:
    """What was planted, and the grey values (mean of R, G and B, before compression) of both kinds."""

    size: int
    mpp: float
    foci: tuple[Focus, ...]
    lesion_mean: float
    lesion_sd: float
    distractor_mean: float
    distractor_sd: float

    def summary(self) -> str:
        return (
            f"lesions grey {self.lesion_mean:.1f} sd {self.lesion_sd:.1f}, "
            f"distractors grey {self.distractor_mean:.1f} sd {self.distractor_sd:.1f}"
        )


def write_slide(
    path: Path,
    truth_path: Path,
    *,
    size: int = 8192,
    seed: int | tuple[int, ...],
    mpp: float = 0.5,
    planted: Sequence[Planted] = (),
    progress: Progress | None = None,
) -> SlideTruth:
    """Write an H&E-like pyramidal slide that OpenSlide opens, and its truth.

    Parameters
    ----------
    path
        Pyramidal tiled JPEG TIFF to write; levels halve down to about 512 px.
    truth_path
        uint8 TIFF of the same size and levels: 0 rest (glass and ordinary tissue), 1 distractor, 2 lesion, 3 mixed focus.
    size
        Side in level-0 px, a multiple of 256, at least 1024.
    seed
        Equal seeds give equal slides.
    mpp
        Micrometres a level-0 px, written as TIFF resolution.
    planted
        Foci instead of the usual ones (see `lay_out`), at least one lesion and one distractor among them.
    progress
        Called with (bands done, bands in all).

    Raises
    ------
    SpecError
        The size cannot be drawn.
    """
    if size < 1024 or size % _TILE:
        msg = f"synthetic slide: size is {size} px; expected a multiple of {_TILE}, at least 1024"
        raise SpecError(msg)
    layout = lay_out(size, seed, planted)
    half = np.empty((size // 2, size // 2, 3), np.uint8)
    truth = np.empty((size, size), np.uint8)
    moments = {LESION: np.zeros(3), DISTRACTOR: np.zeros(3)}

    def tiles() -> Iterator[U8]:
        for y0, rgb, band_truth in paint(layout, seed):
            rows = slice(y0, y0 + len(rgb))
            half[y0 // 2 : rows.stop // 2] = _halve(rgb)
            truth[rows] = band_truth
            for kind, sums in moments.items():
                grey = rgb[band_truth == kind].mean(axis=1, dtype=np.float64)
                sums += (grey.size, grey.sum(), np.square(grey).sum())
            yield from _tiles(rgb)
            if progress is not None:
                progress(-(-rows.stop // BAND_PX), -(-size // BAND_PX))

    levels = int(np.log2(size // 512))
    with tifffile.TiffWriter(path, bigtiff=False) as tif:
        jpeg: dict[str, Any] = {
            "photometric": "rgb",
            "compression": "jpeg",
            "compressionargs": {"level": 85},
        }
        tif.write(tiles(), shape=(size, size, 3), dtype=np.uint8, **jpeg, **_page(mpp))
        level = half
        for k in range(1, levels + 1):
            tif.write(level, subfiletype=1, **jpeg, **_page(mpp * 2**k))
            level = _halve(level)
    with tifffile.TiffWriter(truth_path, bigtiff=False) as tif:
        for k in range(levels + 1):
            labels = np.ascontiguousarray(truth[:: 2**k, :: 2**k])
            tif.write(
                labels,
                subfiletype=int(k > 0),
                photometric="minisblack",
                compression="zlib",
                **_page(mpp * 2**k),
            )
    (lesion_mean, lesion_sd), (distractor_mean, distractor_sd) = (
        _mean_sd(moments[kind]) for kind in (LESION, DISTRACTOR)
    )
    return SlideTruth(size, mpp, layout.foci, lesion_mean, lesion_sd, distractor_mean, distractor_sd)


def training_tiles(
    n: int,
    tile_px: int,
    seed: int,
    *,
    slide_px: int = 4096,
    planted: Sequence[Planted] = (),
    kinds: Sequence[int] = (DISTRACTOR, LESION),
) -> tuple[U8, NDArray[np.float32], NDArray[np.bool_]]:
    """Cut labelled tiles from three other synthetic slides (of `slide_px`), aimed at each kind of focus and at tissue in turn.

    Parameters
    ----------
    planted, kinds
        Foci of each slide (the usual ones if none are named), and the kinds K that are labelled.

    Returns
    -------
    x
        `(n, 3, tile_px, tile_px)` uint8.
    y
        `(n, K)` float32: whether a focus of each kind is present (more than 3 % of the tile).
    mask
        `(n, K)` bool: False where a trace of that kind (0-3 %) makes the answer ambiguous.
    """
    rng = np.random.default_rng((seed, 1))
    x = np.empty((n, 3, tile_px, tile_px), np.uint8)
    share = np.empty((n, len(kinds)), np.float32)
    for k, part in enumerate(np.array_split(np.arange(n), _TRAINING_SLIDES)):
        # a tuple never equals the plain seed of a slide that is written
        source = (seed, 2, k)
        bands = list(paint(lay_out(slide_px, source, planted), source))
        rgb = np.concatenate([band for _, band, _ in bands])
        truth = np.concatenate([band for _, _, band in bands])
        tissue = rgb.min(axis=2) < 225
        places = [*(truth == kind for kind in reversed(kinds)), tissue]
        aims = [np.flatnonzero(where[::8, ::8]) for where in places]
        for i in part:
            aim = aims[i % len(aims)]
            row, column = np.divmod(int(rng.choice(aim)), slide_px // 8)
            corner = np.array([row, column]) * 8 - rng.integers(0, tile_px, 2)
            top, left = np.clip(corner, 0, slide_px - tile_px)
            box = np.s_[top : top + tile_px, left : left + tile_px]
            x[i] = rgb[box].transpose(2, 0, 1)
            share[i] = [(truth[box] == kind).mean() for kind in kinds]
    return x, (share > _PRESENT).astype(np.float32), (share == 0) | (share > _PRESENT)


def _page(mpp: float) -> dict[str, Any]:
    per_cm = 1e4 / mpp
    return {
        "tile": (_TILE, _TILE),
        "resolution": (per_cm, per_cm),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    }


def _tiles(band: U8) -> Iterator[U8]:
    for y in range(0, band.shape[0], _TILE):
        for x in range(0, band.shape[1], _TILE):
            yield np.ascontiguousarray(band[y : y + _TILE, x : x + _TILE])


def _halve(rgb: U8) -> U8:
    quad = rgb[::2, ::2].astype(np.uint16)
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        quad += rgb[dy::2, dx::2]
    return ((quad + 2) >> 2).astype(np.uint8)


def _mean_sd(sums: NDArray[np.float64]) -> tuple[float, float]:
    mean = sums[1] / sums[0]
    return float(mean), float(np.sqrt(sums[2] / sums[0] - mean**2))
