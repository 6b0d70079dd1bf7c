"""What every reader offers; the rest of the project sees images only through this."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.image import ImageMeta


class Reader(Protocol):
    """An open source. Not shared between threads or processes; open one where it is used."""

    @property
    def meta(self) -> ImageMeta:
        """Frame, scale and identity."""
        ...

    def read(
        self, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read `box_l0` from `level`, resampled once (anti-aliased) to exactly `shape_px`.

        Parameters
        ----------
        box_l0
            Level-0 box; it may reach past the image.
        shape_px
            Shape of the result, array order.
        level
            Level to read from; 0 is the finest.

        Returns
        -------
        pixels
            `(C, *shape_px)`: uint8 for slides, float32 for volumes and arrays that are not uint8.
        coverage
            `(*shape_px)` bool: False where the pixel's centre lies outside the image.

        Raises
        ------
        SourceError
            The region cannot be read; the next call starts from a fresh handle.
        """
        ...

    def close(self) -> None:
        """Release the handle; a later `read` opens it again."""
        ...
