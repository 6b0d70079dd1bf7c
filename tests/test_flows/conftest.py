"""What the tests of the whole path share."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import flows.batch
import workers.export.overview
from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.run import PoolSettings, Report
from workers.pool import Pool, Stage, Task
from workers.readers.procedural import ProceduralReader


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """Commands run in the process of the tests make SIGTERM an interrupt; afterwards it is what it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@dataclass
class Lent:
    """A pool that the run it is lent to does not end."""

    pool: Pool

    @property
    def description(self) -> str:
        return self.pool.description

    @property
    def capacity(self) -> int:
        return self.pool.capacity

    def run(self, stage: Stage, tasks: Iterable[Task]) -> Iterator[Report]:
        return self.pool.run(stage, tasks)

    def close(self) -> None:
        """Its owner does."""


@pytest.fixture(scope="session")
def actors(ray_session: None) -> Iterator[Pool]:
    """Three Ray actors of one thread: they serve run after run, so that torch is imported three times, not thirty."""
    from workers.ray_pool import RayPool

    pool = RayPool(PoolSettings(kind="ray", workers=3, threads=1))
    yield pool
    pool.close()


@pytest.fixture
def three_actors(actors: Pool, monkeypatch: pytest.MonkeyPatch) -> PoolSettings:
    """Runs go to the three actors; what to ask for."""
    monkeypatch.setattr(flows.batch, "open_pool", lambda _: Lent(actors))
    return PoolSettings(kind="ray", workers=3, threads=1)


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
