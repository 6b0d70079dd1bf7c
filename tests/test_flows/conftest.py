"""What the tests of the whole path share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import workers.export.overview
from schemas.errors import SourceError
from schemas.geometry import Box
from workers.readers.procedural import ProceduralReader


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `overview.png` out: drawing it takes longer than all else on a small image."""
    monkeypatch.setattr(workers.export.overview, "write_overview", lambda *_: None)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Starts of tiles of procedural images that cannot be read, while they are in this list."""
    bad: list[list[int]] = []
    read = ProceduralReader.read

    def damaged(
        self: ProceduralReader, box_l0: Box, shape_px: tuple[int, ...], level: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if list(box_l0.start) in bad:
            msg = f"damaged at {box_l0.start}"
            raise SourceError(msg)
        return read(self, box_l0, shape_px, level)

    monkeypatch.setattr(ProceduralReader, "read", damaged)
    return bad
