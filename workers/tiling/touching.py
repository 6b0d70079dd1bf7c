"""Which tiles reach a box."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tiles_touching(
    boxes: NDArray[np.int64], start: tuple[int, ...], stop: tuple[int, ...]
) -> NDArray[np.int64]:
    """Ascending indices of the `boxes` `(N, 2, axes)` that share a pixel with `[start, stop)`, one frame."""
    meets = np.all((boxes[:, 0] < np.asarray(stop)) & (boxes[:, 1] > np.asarray(start)), axis=1)
    return np.flatnonzero(meets).astype(np.int64)
