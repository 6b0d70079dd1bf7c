"""Heat over pixels: registration of the heatmap on a picture, its colours, and the look of places without a value.

Numerics only: arrays in, arrays out; which colour map is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import Coverage

Rgb = tuple[int, int, int]
T = TypeVar("T", bound=np.generic)

SHOWN_FROM = 0.10
"""Share of the window below which heat is not drawn at all: a value near zero leaves the tissue as it is."""
FULL_ALPHA = 0.85
"""Opacity at the end of the window: structure stays visible below."""
FAILED_FILL: Rgb = (150, 150, 150)
FAILED_LINE: Rgb = (20, 20, 20)
PENDING_FILL: Rgb = (205, 218, 235)
LEFT_OUT_SHADE = 0.72
OUTLINE_SHADE = 0.45
_HATCH_PERIOD = 10


def place(
    heat: NDArray[T], heat_l0: Sequence[float], picture_shape: Sequence[int], picture_l0: Sequence[float]
) -> NDArray[T]:
    """Heatmap pixels under the centres of picture pixels.

    Parameters
    ----------
    heat
        `(h, w)` values or codes of one level.
    heat_l0, picture_l0
        Level-0 px a pixel and axis; pixel `i` of either spans `[i * size, (i + 1) * size)` from level-0 0.
    picture_shape
        `(H, W)` of the result.
    """
    index = [
        np.minimum(((np.arange(n) + 0.5) * p / h).astype(np.int64), have - 1)
        for n, p, h, have in zip(picture_shape, picture_l0, heat_l0, heat.shape, strict=True)
    ]
    return heat[np.ix_(*index)]


def level_for(levels: int, downsample: Sequence[int], picture_l0: Sequence[float]) -> int:
    """The finest pyramid level whose pixel is not smaller than the picture's on any axis, else the coarsest.

    No heatmap pixel falls between two picture pixels then: each is drawn, or has gone into a coarser one.
    """
    for level in range(levels):
        if all(d * 2**level >= p for d, p in zip(downsample, picture_l0, strict=True)):
            return level
    return levels - 1


def heat_rgba(
    values: NDArray[np.float32], window: tuple[float, float], signed: bool, lut: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Colour and opacity of each value.

    Parameters
    ----------
    values
        `(H, W)`, NaN where nobody looked.
    window
        Values at the two ends of the colour map; beyond them the end colours go on.
    signed
        Opacity grows with |value| from zero, to either end of the window; else with value from its start.
    lut
        `(256, 3)` uint8.

    Returns
    -------
    NDArray
        `(H, W, 4)` float32 in 0..1; opacity 0 where nobody looked.
    """
    start, stop = window
    share = np.clip((np.nan_to_num(values) - start) / (stop - start), 0, 1)
    rgba = np.empty((*values.shape, 4), np.float32)
    rgba[..., :3] = lut[np.rint(share * 255).astype(np.uint8)] / np.float32(255)
    strength = np.abs(2 * share - 1) if signed else share
    rgba[..., 3] = np.where(np.isfinite(values), heat_alpha(strength), 0)
    return rgba


def heat_alpha(strength: NDArray[np.floating]) -> NDArray[np.float32]:
    """Opacity of heat whose strength is a share 0..1 of the window."""
    grown = np.clip((strength - SHOWN_FROM) / (1 - SHOWN_FROM), 0, 1) ** 0.6
    return np.asarray(FULL_ALPHA * grown, np.float32)


def compose(
    picture: NDArray[np.uint8],
    values: NDArray[np.float32],
    coverage: NDArray[np.uint8],
    window: tuple[float, float],
    signed: bool,
    lut: NDArray[np.uint8],
) -> NDArray[np.uint8]:
    """Draw heat on a picture: `layer` over it.

    Parameters
    ----------
    picture
        `(H, W, 3)` uint8.
    values, coverage
        `(H, W)`, what `place` gives.
    window, signed, lut
        See `heat_rgba`.

    Returns
    -------
    NDArray
        `(H, W, 3)` uint8.
    """
    over = layer(values, coverage, window, signed, lut)
    alpha = over[..., 3:]
    return np.rint(picture * (1 - alpha) + 255 * over[..., :3] * alpha).astype(np.uint8)


def layer(
    values: NDArray[np.float32],
    coverage: NDArray[np.uint8],
    window: tuple[float, float],
    signed: bool,
    lut: NDArray[np.uint8],
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.float32]:
    """What is drawn over a picture.

    Evaluated pixels take heat and a thin outline around all of them, failed ones a grey hatch with an outline, those left out by choice are
    dimmed, those still to come are tinted; background and what lies outside stay as they are.

    Parameters
    ----------
    values, coverage, window, signed, lut
        See `compose`.
    origin
        Row and column of the first pixel, where this is a part of something larger: the hatch goes on across parts.

    Returns
    -------
    NDArray
        `(H, W, 4)` float32 in 0..1, colours not multiplied by opacity.
    """
    over = heat_rgba(values, window, signed, lut)
    for code, colour, alpha in (
        (Coverage.LEFT_OUT, (0, 0, 0), 1 - LEFT_OUT_SHADE),
        (Coverage.PENDING, PENDING_FILL, 0.5),
        (Coverage.FAILED, FAILED_FILL, 0.75),
    ):
        over[coverage == code] = (*(c / 255 for c in colour), alpha)
    # Weak heat is transparent: only a line can tell "looked and found nothing" from "nobody looked".
    line = outline(coverage == Coverage.EVALUATED, 1)
    seen = OUTLINE_SHADE * over[line, 3:]
    covered = 1 - OUTLINE_SHADE * (1 - over[line, 3:])
    over[line] = np.concatenate([over[line, :3] * seen / covered, covered], axis=1)
    failed = coverage == Coverage.FAILED
    over[failed & (hatch(failed.shape, origin) | outline(failed))] = (*(c / 255 for c in FAILED_LINE), 1)
    return over


def hatch(shape: tuple[int, ...], origin: tuple[int, int] = (0, 0)) -> NDArray[np.bool_]:
    """`(H, W)` diagonal lines."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows + columns + sum(origin)) % _HATCH_PERIOD < 2)


def outline(region: NDArray[np.bool_], width: int = 2) -> NDArray[np.bool_]:
    """The pixels of `region` `(H, W)` within `width` px of one that does not belong to it."""
    padded = np.pad(region, width, mode="edge")
    inner = region.copy()
    for shift in range(-width, width + 1):
        for axis in (0, 1):
            inner &= np.roll(padded, shift, axis)[width:-width, width:-width]
    return region & ~inner
