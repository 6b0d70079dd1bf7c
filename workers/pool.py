"""Where work runs: the one protocol, and the pool that runs it here, one task after another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from schemas.frozen import Frozen
from schemas.run import BlockTask, PoolSettings, Report, UnitTask

Task = UnitTask | BlockTask


class Worker(Protocol):
    """One stage's work on one image; made once where it runs and kept from task to task."""

    def __init__(self, init: Any) -> None: ...

    def run(self, task: Task) -> Report:
        """Do the task, all of it, to the store; may be called twice for one task."""
        ...

    def close(self) -> None:
        """Release handles."""
        ...


@dataclass(frozen=True)
class Stage:
    """A named kind of work: the class that does it, its frozen init value, and what it needs."""

    name: str
    worker: type[Worker]
    init: Frozen
    resource: Literal["cpu", "device"] = "cpu"


class Pool(Protocol):
    """Runs the tasks of a stage; one pool serves all images of a run.

    `run` may be called from several threads at once (one an image) and from inside an iteration of
    another `run`: work already submitted goes on while the inner one is consumed.
    """

    @property
    def description(self) -> str:
        """One line for people: kind, workers, threads, device."""
        ...

    @property
    def capacity(self) -> int:
        """How many tasks run at once."""
        ...

    def run(self, stage: Stage, tasks: Iterable[Task]) -> Iterator[Report]:
        """Reports in completion order.

        `tasks` is pulled lazily, a bounded number ahead. A task that is given up yields a report whose
        `error` says why; a worker that cannot be made raises its own error, since no task could run.
        """
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...
