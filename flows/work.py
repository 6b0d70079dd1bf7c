"""One image's work on a pool: who is told, and what was lost, noted and spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from flows.progress import Event
from schemas.errors import GigacamError
from schemas.run import Report
from workers.planner import Job
from workers.pool import Pool, Stage, Task


class Work:
    """What the stages of an image have in common."""

    def __init__(self, job: Job, name: str, pool: Pool, tell: Callable[[Event], None]) -> None:
        self.job, self.name, self.pool, self.tell = job, name, pool, tell
        self.lost: list[str] = []
        self.notes: list[str] = []
        self.devices: set[str] = set()
        self.seconds: dict[str, float] = {}

    def note(self, stage: str, report: Report) -> None:
        """Add up what a worker said of a task."""
        self.notes.extend(report.notes)
        self.devices |= {report.device} - {""}
        self.seconds[stage] = self.seconds.get(stage, 0.0) + report.seconds
        for part, value in report.seconds_by.items():
            key = f"{stage}.{part}"
            self.seconds[key] = self.seconds.get(key, 0.0) + value

    def each_tile_once(self, stage: Stage, sizes: Mapping[Task, int]) -> Iterable[Report]:
        """Reports of tasks that go over tiles, `sizes` of them each; a failed task is among what was lost."""
        done, failed, total = 0, 0, sum(sizes.values())
        began = time.perf_counter()
        for report in self.pool.run(stage, list(sizes)):
            assert report.task is not None
            if report.error:
                self.lost.append(f"{report.key}: {report.error}")
            yield report
            self.note(stage.name, report)
            rows = sizes[report.task]
            done, failed = done + rows, failed + (rows if report.error else report.failed)
            rate = done / max(1e-9, time.perf_counter() - began)
            self.tell(Event(self.name, stage.name, done, total, failed, rate))

    def each_done(self, stage: Stage, tasks: Sequence[Task]) -> None:
        """Tasks without which the image cannot go on.

        Raises
        ------
        GigacamError
            One failed.
        """
        for report in self.pool.run(stage, tasks):
            if report.error:
                msg = f"{self.job.request.uri}: {report.key}: {report.error}"
                raise GigacamError(msg)
            self.note(stage.name, report)
