"""Sharing out tasks to replaceable worker processes: fairness, retries after a death, dead letters.

Knows nothing of Ray. One thread owns all state and reads one inbox; callers and futures only put events there,
so there is nothing to lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from schemas.errors import WorkerLostError
from schemas.run import Report
from workers.pool import WORKERS_KEPT, Stage, Task, given_up, log_given_up

DEPTH = 2
"""Calls a replica holds: one runs, the next is already there when it ends."""
DEATHS = 3
"""Deaths of its process a task may cause; before the last chance it runs alone."""
LONGEST_S = 6 * 3600.0
"""A call may take this long in a process that answers (seconds); once its run has reports, see `SLOWER`."""
SLOWER = 20
"""A task may take this many times its run's slowest so far: one image's tasks are alike."""

log = logging.getLogger("gigacam")


class Replica(Protocol):
    """One worker process. Calls run one at a time, in the order made; only `ping` is answered beside them.

    A future raises WorkerLostError when the process died before it finished the call.
    """

    def ping(self) -> Future[str]:
        """Where it runs, once it does; answered even while a task runs, so that long work is no stall."""
        ...

    def load(self, key: str, stage: Stage, drop: str | None) -> Future[None]:
        """Make the stage's worker and keep it under `key`; close the one under `drop`."""
        ...

    def run(self, key: str, stage: str, task: Task) -> Future[Report]:
        """Perform a task with the worker under `key`."""
        ...

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        ...


@dataclass(eq=False)
class _Run:
    stage: Stage
    key: str
    lane: int
    waiting: deque[_Job] = field(default_factory=deque)
    out: queue.SimpleQueue[Report | BaseException] = field(default_factory=queue.SimpleQueue)
    deaths: int = 0
    """Processes that died while they made its worker."""
    slowest: float = 0.0
    """Seconds of its slowest task so far."""
    open: bool = True


@dataclass(eq=False)
class _Job:
    run: _Run
    task: Task
    deaths: int = 0


@dataclass(eq=False)
class _Call:
    """What a replica was asked: a task, or (`job` is None) to make a run's worker."""

    run: _Run
    job: _Job | None
    future: Future[Any]


@dataclass(eq=False)
class _Slot:
    """A replica's place, which outlives the replica."""

    lane: int
    name: str
    replica: Replica
    greeting: Future[str]
    ready: bool = False
    """The process has answered; no call is made before, as Ray may not have found room for it yet."""
    where: str = ""
    since: float = 0.0
    """When the first of `calls` began, or the process was asked for (monotonic seconds)."""
    heard: float = 0.0
    """When the process last gave a sign of life, or had none to give (monotonic seconds)."""
    asked: Future[str] | None = None
    """The ping it has yet to answer."""
    starts: int = 0
    """Starts in a row that failed; after `DEATHS` the place is given up."""
    calls: deque[_Call] = field(default_factory=deque)
    loaded: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Keys of the workers the replica keeps, least recently used first."""
    alone: _Job | None = None
    """A job that killed its process before: nothing else comes here until it is settled."""


class Dispatcher:
    """Runs stages on lanes of replicas.

    Parameters
    ----------
    lanes
        Name and number of replicas of each lane.
    spawn
        Starts a replica of a lane (given by index) and returns at once.
    stall_s
        A replica at work that gives no sign of life for so long (seconds) is killed; one that answers is
        left to work.
    longest_s
        Unless one call takes longer than this; once its run has reports, than `SLOWER` times the slowest
        of them, and than `stall_s`.
    start_s
        A run whose lane has had no process for so long (seconds) fails.
    """

    def __init__(
        self,
        lanes: Sequence[tuple[str, int]],
        spawn: Callable[[int], Replica],
        stall_s: float = 600.0,
        longest_s: float = LONGEST_S,
        start_s: float = 600.0,
    ) -> None:
        self.respawns = 0
        self._spawn = spawn
        self._stall_s = stall_s
        self._longest_s = longest_s
        self._start_s = start_s
        self._sizes = [size for _, size in lanes]
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._runs: deque[_Run] = deque()
        self._stopped: Exception | None = None
        self._slots: list[_Slot] = []
        for lane, (name, size) in enumerate(lanes):
            for i in range(size):
                replica = spawn(lane)
                self._slots.append(_Slot(lane, f"{name}-{i}", replica, replica.ping()))
                self._await_greeting(self._slots[-1])
        self._thread = threading.Thread(target=self._serve, name="gigacam-dispatch", daemon=True)
        self._thread.start()

    # In the callers' threads ----------------------------------------------------------------------------

    def run(self, stage: Stage, lane: int, tasks: Iterable[Task]) -> Iterator[Report]:
        """Reports of `tasks` in completion order, as `workers.pool.Pool.run` promises them."""
        run = _Run(stage, stage.key, lane)
        ahead = 2 * DEPTH * self._sizes[lane]
        todo = iter(tasks)
        pulled = taken = 0
        exhausted = False
        try:
            self._inbox.put(partial(self._open, run))
            # Looked at after the put: whoever sees None here is served or failed by the dispatcher.
            if self._stopped is not None:
                raise WorkerLostError(f"{stage.name}: no worker left. {self._stopped}")
            while True:
                while not exhausted and pulled - taken < ahead:
                    try:
                        job = _Job(run, next(todo))
                    except StopIteration:
                        exhausted = True
                    else:
                        pulled += 1
                        self._inbox.put(partial(self._add, job))
                if pulled == taken:
                    return
                answer = run.out.get()
                if isinstance(answer, BaseException):
                    raise answer
                taken += 1
                yield answer
        finally:
            self._inbox.put(partial(self._end, run))

    def close(self) -> None:
        """Kill the replicas; runs still open raise WorkerLostError."""
        self._inbox.put(partial(self._stop, WorkerLostError("The pool is closed.")))
        self._thread.join()

    # In the dispatcher's thread: events -----------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._stopped is None:
                self._take_events(self._seconds_to_next_check())
                self._watch()
                self._assign()
        except Exception as error:  # a fault of ours: nobody may wait for ever because of it
            log.exception("the dispatcher failed")
            self._stopped = error
        finally:
            for slot in self._slots:
                slot.replica.kill()
        self._take_events(0.0)
        for run in list(self._runs):
            self._fail(run, WorkerLostError(f"{run.stage.name}: no worker left. {self._stopped}"))

    def _take_events(self, timeout: float | None) -> None:
        try:
            event = self._inbox.get(timeout=timeout)
            while True:
                event()
                event = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _stop(self, why: Exception) -> None:
        self._stopped = self._stopped or why

    def _open(self, run: _Run) -> None:
        self._runs.append(run)

    def _add(self, job: _Job) -> None:
        if job.run.open:
            job.run.waiting.append(job)

    def _end(self, run: _Run) -> None:
        if not run.open:
            return
        run.open = False
        run.waiting.clear()
        self._runs.remove(run)
        for slot in self._slots:
            if slot.alone is not None and slot.alone.run is run:
                slot.alone = None

    def _fail(self, run: _Run, error: BaseException) -> None:
        self._end(run)
        run.out.put(error)

    def _greeted(self, slot: _Slot, greeting: Future[str]) -> None:
        if greeting is not slot.greeting or self._stopped:
            return
        error = greeting.exception()
        if error is None:
            slot.ready, slot.starts, slot.where = True, 0, f"{slot.name} {greeting.result()}"
            return
        slot.starts += 1
        if slot.starts < DEATHS:
            self._restart(slot)
            return
        log.warning(
            "worker %s could not be started %d times and is given up: %s", slot.name, slot.starts, error
        )
        slot.replica.kill()
        self._slots.remove(slot)
        if slot.alone is not None:
            slot.alone.run.waiting.appendleft(slot.alone)
        if not any(other.lane == slot.lane for other in self._slots):
            self._stop(WorkerLostError(f"No {slot.name.split('-')[0]} worker could be started: {error}"))

    def _answered(self, slot: _Slot, call: _Call) -> None:
        if call not in slot.calls or self._stopped:  # of a process given up since
            return
        error = call.future.exception()
        if isinstance(error, WorkerLostError):
            self._lost(slot, error)
            return
        self._settle(slot, call, error)

    def _settle(self, slot: _Slot, call: _Call, error: BaseException | None) -> None:
        """Take one finished call off its slot."""
        now = time.monotonic()
        seconds = now - slot.since
        slot.since = slot.heard = now
        slot.asked = None
        slot.calls.remove(call)
        name = call.run.stage.name
        if call.job is None:
            if error is not None:
                slot.loaded.pop(call.run.key, None)
                for run in [run for run in self._runs if run.key == call.run.key]:
                    self._fail(run, error)
            return
        call.run.slowest = max(seconds, call.run.slowest)
        if isinstance(error, Exception):
            report = given_up(name, call.job.task, error, 1, seconds)
        else:
            report = call.future.result()
        self._deliver(slot, call.job, report)

    def _deliver(self, slot: _Slot, job: _Job, report: Report) -> None:
        if slot.alone is job:
            slot.alone = None
        if not job.run.open:
            return
        report = report.model_copy(update={"worker": slot.where, "attempts": report.attempts + job.deaths})
        if report.error:
            log_given_up(report)
        job.run.out.put(report)

    def _lost(self, slot: _Slot, error: WorkerLostError) -> None:
        """Replace a dead process: what it ran is charged with the death, what it had queued is not.

        A report that was on its way when the process died is lost with it: its task is then taken for the
        one that ran, is charged, and done again.
        """
        for call in [call for call in slot.calls if call.future.done() and call.future.exception() is None]:
            self._settle(slot, call, None)
        calls = list(slot.calls)
        slot.calls.clear()
        for call in reversed(calls[1:]):
            if call.job is not None and call.job is not slot.alone and call.run.open:
                call.run.waiting.appendleft(call.job)
        self._restart(slot)
        if calls and calls[0].run.open:
            self._charge(slot, calls[0], error)

    def _charge(self, slot: _Slot, call: _Call, error: WorkerLostError) -> None:
        guilty = call.job or call.run
        guilty.deaths += 1
        what = f"{call.run.stage.name}, {call.job.task.key if call.job else 'making its worker'}"
        log.info("%s: worker process lost (%d of %d): %s", what, guilty.deaths, DEATHS, error)
        why = WorkerLostError(
            f"{what}: the worker process was lost {guilty.deaths} times, the last time: {error}"
        )
        if call.job is None:
            if guilty.deaths >= DEATHS:
                self._fail(call.run, why)
        elif guilty.deaths >= DEATHS:
            self._deliver(slot, call.job, given_up(call.run.stage.name, call.job.task, why, 0))
        elif guilty.deaths == DEATHS - 1:
            slot.alone = call.job
        else:
            call.run.waiting.appendleft(call.job)

    def _restart(self, slot: _Slot) -> None:
        slot.replica.kill()
        self.respawns += 1
        slot.replica = self._spawn(slot.lane)
        slot.greeting = slot.replica.ping()
        self._await_greeting(slot)

    def _await_greeting(self, slot: _Slot) -> None:
        slot.ready = False
        slot.asked = None
        slot.since = time.monotonic()
        slot.loaded.clear()
        slot.greeting.add_done_callback(lambda done: self._inbox.put(partial(self._greeted, slot, done)))

    # In the dispatcher's thread: decisions --------------------------------------------------------------

    def _assign(self) -> None:
        """Fill the replicas, one task of each open run in turn."""
        for slot in self._slots:
            if slot.alone is not None and slot.ready and not slot.calls:
                self._submit(slot, slot.alone)
        for lane in range(len(self._sizes)):
            free = [
                s
                for s in self._slots
                if s.lane == lane and s.ready and s.alone is None and len(s.calls) < DEPTH
            ]
            while free and (run := self._turn(lane)) is not None:
                slot = min(free, key=lambda s: (len(s.calls), run.key not in s.loaded))
                self._submit(slot, run.waiting.popleft())
                if len(slot.calls) >= DEPTH:
                    free.remove(slot)

    def _turn(self, lane: int) -> _Run | None:
        for _ in range(len(self._runs)):
            run = self._runs[0]
            self._runs.rotate(-1)
            if run.lane == lane and run.waiting:
                return run
        return None

    def _submit(self, slot: _Slot, job: _Job) -> None:
        run = job.run
        try:
            if run.key not in slot.loaded:
                # The replica works in order, so this table, kept here, is the one it has when it gets there.
                full = len(slot.loaded) >= WORKERS_KEPT
                drop = slot.loaded.popitem(last=False)[0] if full else None
                self._call(slot, _Call(run, None, slot.replica.load(run.key, run.stage, drop)))
            slot.loaded[run.key] = None
            slot.loaded.move_to_end(run.key)
            self._call(slot, _Call(run, job, slot.replica.run(run.key, run.stage.name, job.task)))
        except Exception as error:  # what cannot be sent fails its own run, not the other images
            slot.loaded.pop(run.key, None)
            self._fail(run, error)

    def _call(self, slot: _Slot, call: _Call) -> None:
        if not slot.calls:
            slot.since = slot.heard = time.monotonic()
        slot.calls.append(call)
        call.future.add_done_callback(lambda _: self._inbox.put(partial(self._answered, slot, call)))

    # In the dispatcher's thread: signs of life ----------------------------------------------------------

    def _due(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """What comes next for each slot that is waited for, and when (monotonic seconds)."""
        awake = {slot.lane for slot in self._slots if slot.ready}
        wanted = {run.lane for run in self._runs if run.waiting}
        for slot in self._slots:
            if slot.calls:
                if slot.asked is None:
                    life = slot.heard + self._stall_s / 2, partial(self._ask, slot)
                else:
                    life = slot.heard + self._stall_s, partial(self._silent, slot)
                limit = self._limit(slot.calls[0])
                yield min(
                    life, (slot.since + limit, partial(self._endless, slot, limit)), key=lambda due: due[0]
                )
            elif slot.lane in wanted - awake:
                yield slot.since + self._start_s, partial(self._no_room, slot)

    def _limit(self, call: _Call) -> float:
        if call.job is None or not call.run.slowest:
            return self._longest_s
        return max(self._stall_s, SLOWER * call.run.slowest)

    def _seconds_to_next_check(self) -> float | None:
        soonest = min((when for when, _ in self._due()), default=None)
        return None if soonest is None else max(soonest - time.monotonic(), 0.0)

    def _watch(self) -> None:
        now = time.monotonic()
        for when, act in list(self._due()):
            if when <= now:
                act()

    def _ask(self, slot: _Slot) -> None:
        slot.asked = ping = slot.replica.ping()
        ping.add_done_callback(lambda done: self._inbox.put(partial(self._answers, slot, done)))

    def _answers(self, slot: _Slot, ping: Future[str]) -> None:
        # An error is no sign of life: a dead process is told by its calls, and any other falls silent.
        if ping is slot.asked and ping.exception() is None:
            slot.asked, slot.heard = None, time.monotonic()

    def _silent(self, slot: _Slot) -> None:
        waited = time.monotonic() - slot.heard
        self._lost(slot, WorkerLostError(f"nothing was heard from it for {waited:.0f} s."))

    def _endless(self, slot: _Slot, limit: float) -> None:
        why = f"it answers, but did not finish within {limit:.0f} s, the most that was expected."
        self._lost(slot, WorkerLostError(why))

    def _no_room(self, slot: _Slot) -> None:
        waited = time.monotonic() - slot.since
        for run in [run for run in self._runs if run.lane == slot.lane and run.waiting]:
            why = f"no worker process was started within {waited:.0f} s; is there room for one?"
            self._fail(run, WorkerLostError(f"{run.stage.name}: {why}"))
