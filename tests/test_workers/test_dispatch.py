"""The dispatcher against replicas that are threads here: scripted deaths and stalls, in milliseconds."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from schemas.errors import ModelError, WorkerLostError
from schemas.frozen import Frozen
from schemas.run import BlockTask, Report, UnitTask
from workers.dispatch import DEATHS, DEPTH, Dispatcher
from workers.pool import WORKERS_KEPT, Stage, Task, Worker, perform


class Deadly(BaseException):
    """Stands for the end of the process."""


class Name(Frozen):
    name: str = ""


class Squares:
    """Test worker; `seen` tells what was begun, by which thread, in order."""

    seen: list[tuple[str, str, int]]

    def __init__(self, init: Name) -> None:
        self.name = init.name

    def expect(self, task: Task) -> None:
        """Nothing to read."""

    def run(self, task: Task) -> Report:
        assert isinstance(task, UnitTask)
        self.seen.append((threading.current_thread().name, self.name, task.unit))
        self.work(task.unit)
        return Report(stage="s", key=task.key, done=task.unit**2)

    def work(self, unit: int) -> None:
        pass

    def close(self) -> None:
        self.seen.append((threading.current_thread().name, f"close {self.name}", -1))


class Thread:
    """A replica: a thread that takes calls in order and 'dies' of `Deadly`, or when killed.

    `deaf`: it answers no ping while it works.
    """

    def __init__(self, name: str, stillborn: str = "", deaf: bool = False) -> None:
        self.deaf = deaf
        self.pings = 0
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.open: list[Future[Any]] = []
        self.dead = ""
        self.workers: dict[str, Worker] = {}
        self.most = 0
        if stillborn:
            self.die(stillborn)
        threading.Thread(target=self.serve, name=name, daemon=True).start()

    def serve(self) -> None:
        while not self.dead and (call := self.calls.get()) is not None:
            future, work = call
            try:
                answer = work()
            except Deadly:
                self.die("segmentation fault")
            except Exception as error:
                self.settle(future, partial(future.set_exception, error))
            else:
                self.settle(future, partial(future.set_result, answer))

    def settle(self, future: Future[Any], how: Callable[[], None]) -> None:
        with self.lock:
            if future not in self.open:
                return
            self.open.remove(future)
        how()

    def die(self, why: str) -> None:
        self.dead = why
        self.calls.put(None)
        for future in list(self.open):
            self.settle(future, partial(future.set_exception, WorkerLostError(why)))

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.open.append(future)
        self.most = max(self.most, len(self.open))
        if self.dead:
            self.settle(future, partial(future.set_exception, WorkerLostError(self.dead)))
        self.calls.put((future, work))
        return future

    def ping(self) -> Future[str]:
        self.pings += 1
        if self.pings == 1 or self.deaf:
            return self.call(lambda: "here")
        answer: Future[str] = Future()
        answer.set_result("here")
        return answer

    def load(self, key: str, stage: Stage, drop: str | None) -> Future[None]:
        def work() -> None:
            if drop:
                self.workers.pop(drop).close()
            self.workers[key] = stage.worker(stage.init)

        return self.call(work)

    def run(self, key: str, stage: str, task: Task) -> Future[Report]:
        return self.call(lambda: perform(self.workers[key], stage, task))

    def kill(self) -> None:
        self.die("killed")


class Floor:
    """A dispatcher with its replicas."""

    def __init__(
        self,
        size: int = 2,
        stall_s: float = 60.0,
        stillborn: tuple[int, ...] = (),
        deaf: bool = False,
        **limits: float,
    ) -> None:
        self.replicas: list[Thread] = []
        self.stillborn = stillborn
        self.deaf = deaf
        self.dispatcher = Dispatcher([("cpu", size)], self.spawn, stall_s, **limits)

    def spawn(self, lane: int) -> Thread:
        n = len(self.replicas)
        self.replicas.append(Thread(f"r{n}", "no such module" if n in self.stillborn else "", self.deaf))
        return self.replicas[-1]

    def run(self, worker: type[Worker], n: int, name: str = "") -> Iterator[Report]:
        stage = Stage("s", worker, Name(name=name))
        return self.dispatcher.run(stage, 0, (UnitTask(unit=i) for i in range(n)))


@pytest.fixture
def floors() -> Iterator[Callable[..., Floor]]:
    made: list[Floor] = []

    def make(*args: Any, **kwargs: Any) -> Floor:
        made.append(Floor(*args, **kwargs))
        return made[-1]

    Squares.seen = []
    yield make
    for floor in made:
        floor.dispatcher.close()


def errors(reports: list[Report]) -> dict[str, str]:
    return {r.key: r.error for r in reports if r.error}


def test_everything_is_done_with_few_calls_per_replica(floors: Callable[..., Floor]) -> None:
    floor = floors(size=3)
    reports = list(floor.run(Squares, 200))
    assert sorted(r.done for r in reports) == [i * i for i in range(200)]
    assert max(replica.most for replica in floor.replicas) <= DEPTH
    assert floor.dispatcher.respawns == 0


def test_overhead_is_small(floors: Callable[..., Floor]) -> None:
    floor = floors(size=2)
    list(floor.run(Squares, 5))
    started = time.perf_counter()
    assert len(list(floor.run(Squares, 500))) == 500
    assert (time.perf_counter() - started) / 500 < 0.005


def test_only_the_running_unit_is_charged_and_the_last_chance_is_alone(floors: Callable[..., Floor]) -> None:
    class Poison(Squares):
        def work(self, unit: int) -> None:
            if unit == 4:
                raise Deadly

    floor = floors(size=2)
    reports = list(floor.run(Poison, 30))
    assert len(reports) == 30
    assert set(errors(reports)) == {"unit 4"}
    assert {r.key: r.attempts for r in reports if r.attempts > 1} == {"unit 4": DEATHS}
    assert floor.dispatcher.respawns == DEATHS
    tries = [thread for thread, _, unit in Squares.seen if unit == 4]
    assert len(tries) == DEATHS
    # The replica of the last try did nothing else: it made the worker, ran the unit, and died.
    assert [unit for thread, _, unit in Squares.seen if thread == tries[-1]] == [4]


def test_a_death_that_was_chance_costs_an_attempt_only(floors: Callable[..., Floor]) -> None:
    class Unlucky(Squares):
        deaths = 0

        def work(self, unit: int) -> None:
            if unit in (2, 5) and Unlucky.deaths < 2:
                Unlucky.deaths += 1
                raise Deadly

    reports = list(floors(size=1).run(Unlucky, 8))
    assert len(reports) == 8
    assert not errors(reports)
    assert sum(r.attempts for r in reports) == 10


@pytest.mark.parametrize("seed", range(10))
def test_one_report_a_task_whatever_dies(floors: Callable[..., Floor], seed: int) -> None:
    chance = random.Random(seed)

    class Fragile(Squares):
        def work(self, unit: int) -> None:
            if chance.random() < 0.1:
                raise Deadly

    floor = floors(size=3)
    got: dict[int, list[str]] = {}

    def one(run: int) -> None:
        reports = floor.run(Fragile, 40, str(run))
        if run == 3:
            next(reports)
            reports.close()  # type: ignore[attr-defined]
        else:
            got[run] = [r.key for r in reports]

    threads = [threading.Thread(target=one, args=(run,)) for run in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {run: sorted(keys) for run, keys in got.items()} == {
        run: sorted(f"unit {i}" for i in range(40)) for run in range(3)
    }
    assert floor.dispatcher.respawns > 0


def test_a_worker_that_kills_its_maker_fails_its_run_only(floors: Callable[..., Floor]) -> None:
    class Bomb(Squares):
        def __init__(self, init: Name) -> None:
            raise Deadly

    floor = floors(size=2)
    beside = floor.run(Squares, 40)
    got = [next(beside)]
    with pytest.raises(WorkerLostError, match="making its worker: the worker process was lost 3 times"):
        list(floor.run(Bomb, 10))
    got += list(beside)
    assert len(got) == 40
    assert not errors(got)
    assert floor.dispatcher.respawns <= DEATHS + 1


def test_a_failed_load_fails_every_run_that_shares_it(floors: Callable[..., Floor]) -> None:
    gate = threading.Event()

    class Refuses(Squares):
        def __init__(self, init: Name) -> None:
            gate.wait(5)
            raise ModelError("model.toml: no")

    floor = floors(size=1)
    caught: list[str] = []

    def one() -> None:
        with pytest.raises(ModelError) as raised:
            list(floor.run(Refuses, 5))
        caught.append(raised.value.message)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(5)
    assert caught == ["model.toml: no"] * 2
    assert len(list(floor.run(Squares, 3))) == 3


class Hangs(Squares):
    def work(self, unit: int) -> None:
        if unit == 1:
            time.sleep(1.0)


def test_a_silent_replica_is_killed_and_the_unit_charged(floors: Callable[..., Floor]) -> None:
    started = time.monotonic()
    reports = list(floors(size=2, stall_s=0.1, deaf=True).run(Hangs, 6))
    assert len(reports) == 6
    assert "nothing was heard from it for" in errors(reports)["unit 1"]
    assert set(errors(reports)) == {"unit 1"}
    assert time.monotonic() - started < 0.9


def test_long_work_in_a_process_that_answers_is_no_stall(floors: Callable[..., Floor]) -> None:
    class Slow(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.3)

    floor = floors(size=2, stall_s=0.04)  # every unit takes seven times as long, the first included
    reports = list(floor.run(Slow, 4))
    assert (len(reports), errors(reports), floor.dispatcher.respawns) == (4, {}, 0)
    assert max(replica.pings for replica in floor.replicas) > 10


def test_what_never_ends_is_given_up_though_the_process_answers(floors: Callable[..., Floor]) -> None:
    class Forever(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.9)

    first = list(floors(size=1, stall_s=0.02, longest_s=0.1).run(Forever, 1))
    assert "it answers, but did not finish" in errors(first)["unit 0"]

    class Tens(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.9 if unit == 3 else 0.01)

    after = list(floors(size=1, stall_s=0.02).run(Tens, 5))  # reports of 10 ms before it: twenty times that
    assert set(errors(after)) == {"unit 3"}
    assert "it answers, but did not finish" in errors(after)["unit 3"]


def test_a_slower_unit_is_no_stall(floors: Callable[..., Floor]) -> None:
    class Slows(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.05 if unit < 2 else 0.3 if unit == 3 else 0.0)

    floor = floors(size=1, stall_s=0.1)
    reports = list(floor.run(Slows, 5))  # 0.3 s is more than 0.1 s, less than twenty times 0.05 s
    assert (len(reports), errors(reports), floor.dispatcher.respawns) == (5, {}, 0)


def test_closing_starts_no_replica(floors: Callable[..., Floor]) -> None:
    class Brief(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.01)

    floor = floors(size=3)
    reports = floor.run(Brief, 100)
    next(reports)
    floor.dispatcher.close()
    assert (len(floor.replicas), floor.dispatcher.respawns) == (3, 0)
    assert all(replica.dead for replica in floor.replicas)
    with pytest.raises(WorkerLostError, match="closed"):
        list(reports)


def test_runs_take_turns(floors: Callable[..., Floor]) -> None:
    class Brief(Squares):
        def work(self, unit: int) -> None:
            time.sleep(0.005)

    floor = floors(size=1)
    big, small = floor.run(Brief, 100, "big"), floor.run(Brief, 2, "small")
    next(big)
    assert len(list(small)) == 2
    begun = [name for _, name, _ in Squares.seen]
    assert begun.count("big") <= 1 + 4 * DEPTH
    assert len(list(big)) == 99


def test_least_recently_used_workers_are_dropped(floors: Callable[..., Floor]) -> None:
    floor = floors(size=1)
    for i in range(WORKERS_KEPT):
        list(floor.run(Squares, 1, str(i)))
    list(floor.run(Squares, 1, "0"))
    list(floor.run(Squares, 1, "new"))
    assert [name for _, name, _ in Squares.seen if name.startswith("close")] == ["close 1"]
    assert len(floor.replicas[0].workers) == WORKERS_KEPT


def test_places_that_never_start_are_given_up(
    floors: Callable[..., Floor], caplog: pytest.LogCaptureFixture
) -> None:
    limping = floors(size=2, stillborn=(1, 2, 3))
    assert len(list(limping.run(Squares, 10))) == 10
    assert limping.dispatcher.respawns == DEATHS - 1
    assert "no such module" in caplog.text
    none = floors(size=2, stillborn=tuple(range(6)))
    with pytest.raises(WorkerLostError, match="No cpu worker could be started: no such module"):
        list(none.run(Squares, 10))


def test_no_room_for_any_worker_is_said_in_time(
    floors: Callable[..., Floor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Thread, "ping", lambda self: Future())
    with pytest.raises(WorkerLostError, match="no worker process was started within"):
        list(floors(size=2, start_s=0.1).run(Squares, 3))


def test_what_cannot_be_sent_fails_its_run_only(
    floors: Callable[..., Floor], monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = floors(size=1)
    load = Thread.load

    def picky(self: Thread, key: str, stage: Stage, drop: str | None) -> Future[None]:
        if stage.init == Name(name="odd"):
            raise TypeError("cannot pickle '_thread.lock' object")
        return load(self, key, stage, drop)

    monkeypatch.setattr(Thread, "load", picky)
    with pytest.raises(TypeError, match="cannot pickle"):
        list(floor.run(Squares, 3, "odd"))
    assert len(list(floor.run(Squares, 3))) == 3


def test_a_fault_of_the_dispatcher_leaves_nobody_waiting(floors: Callable[..., Floor]) -> None:
    floor = floors(size=1)
    assert len(list(floor.run(Squares, 2))) == 2
    floor.dispatcher._inbox.put(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(WorkerLostError, match="division by zero"):
        list(floor.run(Squares, 3))


def test_blocks_are_tasks_too(floors: Callable[..., Floor]) -> None:
    class Blocks(Squares):
        def run(self, task: Task) -> Report:
            assert isinstance(task, BlockTask)
            return Report(stage="s", key=task.key)

    task = BlockTask(level=1, block=(0, 3))
    (report,) = floors().dispatcher.run(Stage("s", Blocks, Name()), 0, [task])
    assert (report.key, report.task, report.worker.split("-")[0]) == ("level 1 block 0,3", task, "cpu")
