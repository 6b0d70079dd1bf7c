"""Where work runs: the one protocol, and the pool that runs it here, one task after another."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from schemas.bag import AttributeTask
from schemas.errors import GigacamError, WorkerLostError
from schemas.frozen import Frozen, digest
from schemas.run import BlockTask, GroupTask, PoolSettings, RankTask, Report, SolveTask, UnitTask

Task = UnitTask | BlockTask | GroupTask | SolveTask | AttributeTask | RankTask

TRANSIENT_ATTEMPTS = 3
"""Tries of a task that meets an OSError or a retryable error of ours."""
WORKERS_KEPT = 4
"""Workers a process keeps: the stages of the images in flight."""

log = logging.getLogger("gigacam")


class Worker(Protocol):
    """One stage's work on one image; made once where it runs and kept from task to task."""

    def __init__(self, init: Any) -> None: ...

    def run(self, task: Task) -> Report:
        """Do the task, all of it, to the store; may be called twice for one task."""
        ...

    def expect(self, task: Task) -> None:
        """Told, perhaps from another thread while `run` is at work, what comes next: reading may begin.

        A hint: never raises, and `run` may be called with another task.
        """
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

    @property
    def key(self) -> str:
        """Digest of the worker's class and init value: stages of one key share a worker."""
        return digest(
            {"worker": f"{self.worker.__module__}.{self.worker.__qualname__}", "init": digest(self.init)}
        )


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
        """Reports in completion order; nothing happens before the first is asked for.

        `tasks` is pulled in the caller's thread, a bounded number ahead of the reports taken. A task that
        is given up yields a report whose `error` says why; a worker that cannot be made raises its own
        error, since no task could run. Closing the iterator early drops the tasks not yet begun.
        """
        ...

    def close(self) -> None:
        """Stop the workers; a second call does nothing, and `run` raises from now on."""
        ...


def perform(worker: Worker, stage: str, task: Task, attempts: int = 2) -> Report:
    """Run one task in this process, again where that may help: the same policy in every pool.

    Parameters
    ----------
    worker, stage, task
        What does it, the stage's name, and what is to be done.
    attempts
        Tries of a task that raises anything else than an error of ours or an OSError. Those of ours that
        are not `retryable` are final; the retryable ones and OSError get `TRANSIENT_ATTEMPTS`.

    Returns
    -------
    Report
        The worker's, with `task` and `attempts` filled in, or one whose `error` says why it was given up.

    Raises
    ------
    WorkerLostError
        The process lost its device (CUDA answers every later call with the same error).
    """
    started = time.perf_counter()
    for attempt in itertools.count(1):
        try:
            return worker.run(task).model_copy(update={"task": task, "attempts": attempt})
        except Exception as error:
            if "CUDA error" in str(error):
                raise WorkerLostError(f"{stage}, {task.key}: the device was lost ({error}).") from error
            transient = error.retryable if isinstance(error, GigacamError) else isinstance(error, OSError)
            final = isinstance(error, GigacamError) and not transient
            if final or attempt >= (TRANSIENT_ATTEMPTS if transient else attempts):
                return given_up(stage, task, error, attempt, time.perf_counter() - started)
            if transient:
                # Jitter, so that workers which met one busy disk don't all return to it at once.
                time.sleep(0.1 * 3 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def given_up(stage: str, task: Task, error: Exception, attempts: int, seconds: float = 0.0) -> Report:
    """The report of a task that is not tried again; an unexpected error's place is kept in `notes`."""
    ours = isinstance(error, GigacamError)
    place = () if ours else ("".join(traceback.format_exception(error))[-2000:],)
    return Report(
        stage=stage,
        key=task.key,
        task=task,
        seconds=seconds,
        error=str(error) if ours else f"{type(error).__name__}: {error}",
        attempts=attempts,
        notes=place,
    )


def log_given_up(report: Report) -> None:
    """Say once, in the driver, that a task was given up."""
    log.warning(
        "%s, %s: given up after %d attempt%s: %s",
        report.stage,
        report.key,
        report.attempts,
        "" if report.attempts == 1 else "s",
        report.error,
        extra={"notes": report.notes},
    )


class SerialPool:
    """Runs tasks here, one at a time, in the order given.

    Parameters
    ----------
    attempts
        Tries of a task that fails for no reason we know.
    threads
        torch threads of a worker, for `description`; None: all cores.
    """

    def __init__(self, attempts: int = 2, threads: int | None = None) -> None:
        self._attempts = attempts
        self._threads = threads or os.cpu_count() or 1
        self._workers: OrderedDict[str, Worker] = OrderedDict()
        # Held while a task runs, never while a report is being looked at: nested runs take turns.
        self._lock = threading.Lock()
        self._closed = False

    @property
    def description(self) -> str:
        return f"serial, {self._threads} thread{'s' * (self._threads != 1)}"

    @property
    def capacity(self) -> int:
        return 1

    def run(self, stage: Stage, tasks: Iterable[Task]) -> Iterator[Report]:
        key = stage.key
        coming = iter(tasks)
        task = next(coming, None)
        while task is not None:
            following = next(coming, None)
            with self._lock:
                worker = self._worker(key, stage)
                if following is not None:
                    worker.expect(following)
                report = perform(worker, stage.name, task, self._attempts)
            task, report = following, report.model_copy(update={"worker": "serial"})
            if report.error:
                log_given_up(report)
            yield report

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._workers:
                self._workers.popitem()[1].close()

    def _worker(self, key: str, stage: Stage) -> Worker:
        if self._closed:
            raise WorkerLostError(f"{stage.name}: the pool is closed.")
        if key not in self._workers:
            self._workers[key] = stage.worker(stage.init)
            if len(self._workers) > WORKERS_KEPT:
                self._workers.popitem(last=False)[1].close()
        self._workers.move_to_end(key)
        return self._workers[key]


def open_pool(settings: PoolSettings) -> Pool:
    """The pool that `settings` names; "auto" is the caller's choice to make, and means serial here."""
    if settings.kind == "ray":
        from workers.ray_pool import RayPool  # ray takes a second to import: only who asks pays

        return RayPool(settings)
    return SerialPool(threads=settings.threads)
