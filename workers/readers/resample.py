"""The one resampling of the project: separable triangle filter, anti-aliased, in continuous coordinates.

Output pixel `i` of an axis is centred at `start + (i + 0.5) * scale` (source px, pixel `j` spans
`[j, j + 1)`); source pixel `j` has weight `max(0, 1 - |j + 0.5 - centre| / support)` with
`support = max(1, scale)`, normalised over the pixels there are, so that nothing from outside leaks in.
The same definition as Pillow's `resize(BILINEAR, box=...)`, which serves 8-bit pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ALIGNED_PX = 1e-6
"""A shift below this many pixels is none."""


def triangle_weights(size: int, start: float, scale: float, count: int) -> NDArray[np.float64]:
    """Weights `(count, size)` that turn `size` source pixels into `count` output pixels; rows sum to 1."""
    support = max(1.0, scale)
    centre = start + (np.arange(count) + 0.5) * scale
    # A centre past the last source pixel's reach (levels that round down) takes the border pixel.
    centre = np.clip(centre, 0.5 - 0.5 * support, size - 0.5 + 0.5 * support)
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(size) + 0.5 - centre[:, None]) / support)
    normal: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normal


def resample(
    source: NDArray[Any], start: tuple[float, ...], scale: tuple[float, ...], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Resample `source` once.

    Parameters
    ----------
    source
        `(C, *S)`, uint8 or a real type.
    start, scale
        First edge of the output and size of an output pixel, in source px, array order.
    shape
        Output shape, array order.

    Returns
    -------
    array
        `(C, *shape)`, C-contiguous: uint8 for uint8 (rounded half up), float32 otherwise.
    """
    dtype = np.uint8 if source.dtype == np.uint8 else np.float32
    if aligned(source.shape[1:], start, scale, shape):
        window = tuple(slice(round(a), round(a) + n) for a, n in zip(start, shape, strict=True))
        return np.array(source[(slice(None), *window)], dtype=dtype, order="C")
    stop = tuple(a + s * n for a, s, n in zip(start, scale, shape, strict=True))
    inside = all(a >= 0 and b <= n for a, b, n in zip(start, stop, source.shape[1:], strict=True))
    if source.dtype == np.uint8 and source.ndim == 3 and source.shape[0] in (1, 3) and inside:
        return _pillow(source, start, stop, shape)
    return separable(source, start, scale, shape)


def aligned(
    size: tuple[int, ...], start: tuple[float, ...], scale: tuple[float, ...], shape: tuple[int, ...]
) -> bool:
    """Whether the output is a plain window of the source."""
    return all(
        abs(s - 1) * n <= ALIGNED_PX and abs(a - round(a)) <= ALIGNED_PX and 0 <= round(a) <= m - n
        for m, a, s, n in zip(size, start, scale, shape, strict=True)
    )


def separable(
    source: NDArray[Any], start: tuple[float, ...], scale: tuple[float, ...], shape: tuple[int, ...]
) -> NDArray[Any]:
    """`resample` by one weight matrix an axis, for any number of axes and any real type."""
    out = source.astype(np.float32)
    for axis, (a, s, n) in enumerate(zip(start, scale, shape, strict=True), start=1):
        weights = triangle_weights(out.shape[axis], a, s, n).astype(np.float32)
        out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
    if source.dtype == np.uint8:
        return np.ascontiguousarray(np.floor(np.clip(out, 0, 255) + 0.5).astype(np.uint8))
    return np.ascontiguousarray(out)


def _pillow(
    source: NDArray[np.uint8], start: tuple[float, ...], stop: tuple[float, ...], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    interleaved = np.ascontiguousarray(np.moveaxis(source, 0, -1))
    picture = Image.fromarray(interleaved if source.shape[0] == 3 else interleaved[..., 0])
    resized = picture.resize(
        (shape[1], shape[0]), Image.Resampling.BILINEAR, box=(start[1], start[0], stop[1], stop[0])
    )
    pixels = np.asarray(resized).reshape(*shape, source.shape[0])
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
