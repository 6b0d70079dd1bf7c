"""What every pool promises, asked of each of them; then what only Ray's can be asked."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from schemas.errors import GigacamError, ModelError, WorkerLostError
from schemas.run import PoolSettings, Report, UnitTask
from tests.conformance import workers as w
from workers.pool import WORKERS_KEPT, Pool, SerialPool, Stage, Worker, open_pool

if TYPE_CHECKING:
    from workers.ray_pool import RayPool


@pytest.fixture(scope="module")
def ray_pool(ray_session: None) -> Iterator[RayPool]:
    from workers.ray_pool import RayPool

    pool = RayPool(PoolSettings(kind="ray", workers=2))
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=["serial", pytest.param("ray", marks=pytest.mark.ray)])
def pool(request: pytest.FixtureRequest) -> Pool:
    if request.param == "ray":
        return cast(Pool, request.getfixturevalue("ray_pool"))
    return open_pool(PoolSettings(kind="serial"))


def stage(folder: Path, worker: type[Worker] = w.Counting, **init: object) -> Stage:
    return Stage("count", worker, w.Init(folder=str(folder), **init))


def units(n: int) -> list[UnitTask]:
    return [UnitTask(unit=i) for i in range(n)]


def marks(folder: Path, name: str) -> int:
    path = folder / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def unit_of(report: Report) -> int:
    assert isinstance(report.task, UnitTask)
    return report.task.unit


class TestEveryPool:
    def test_each_task_is_done_once_and_reported(self, pool: Pool, tmp_path: Path) -> None:
        reports = list(pool.run(stage(tmp_path), units(30)))
        assert sorted(r.done for r in reports) == [i * i for i in range(30)]
        assert {r.key for r in reports} == {f"unit {i}" for i in range(30)}
        assert all(
            r.worker and not r.error and r.attempts == 1 and r.done == unit_of(r) ** 2 for r in reports
        )
        assert all(marks(tmp_path, f"unit{i}") == 1 for i in range(30))

    def test_no_tasks_no_reports_no_worker(self, pool: Pool, tmp_path: Path) -> None:
        assert list(pool.run(stage(tmp_path), [])) == []
        assert marks(tmp_path, "init") == 0

    def test_reports_survive_pickling(self, pool: Pool, tmp_path: Path) -> None:
        for report in pool.run(stage(tmp_path, poison=1), units(3)):
            assert pickle.loads(pickle.dumps(report)) == report
            assert Report.model_validate_json(report.model_dump_json()) == report

    def test_tasks_are_pulled_lazily_in_the_callers_thread(self, pool: Pool, tmp_path: Path) -> None:
        pulled = 0
        threads = set()

        def endless() -> Iterator[UnitTask]:
            nonlocal pulled
            for i in itertools.count():
                pulled += 1
                threads.add(threading.get_ident())
                yield UnitTask(unit=i)

        reports = pool.run(stage(tmp_path), endless())
        assert pulled == 0
        for taken in range(1, 20):
            next(reports)
            assert pulled <= taken + 4 * pool.capacity
        time.sleep(0.2)
        assert pulled <= 19 + 4 * pool.capacity
        reports.close()  # type: ignore[attr-defined]
        assert threads == {threading.get_ident()}

    def test_an_error_of_the_task_source_is_the_callers(self, pool: Pool, tmp_path: Path) -> None:
        def broken() -> Iterator[UnitTask]:
            yield UnitTask(unit=0)
            raise KeyError("no such block")

        with pytest.raises(KeyError, match="no such block"):
            list(pool.run(stage(tmp_path), broken()))
        assert len(list(pool.run(stage(tmp_path), units(3)))) == 3

    def test_run_inside_a_run(self, pool: Pool, tmp_path: Path) -> None:
        inner = []
        outer = []
        for report in pool.run(stage(tmp_path, name="outer"), units(6)):
            outer.append(unit_of(report))
            inner += [unit_of(r) for r in pool.run(stage(tmp_path, name="inner"), units(4))]
        assert sorted(outer) == list(range(6))
        assert sorted(inner) == sorted(list(range(4)) * 6)

    def test_runs_from_several_threads(self, pool: Pool, tmp_path: Path) -> None:
        done: dict[int, list[int]] = {}

        def one(image: int) -> None:
            done[image] = sorted(unit_of(r) for r in pool.run(stage(tmp_path, name=str(image)), units(12)))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert done == {i: list(range(12)) for i in range(4)}

    def test_our_final_errors_get_one_attempt(
        self, pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "gigacam")
        reports = {unit_of(r): r for r in pool.run(stage(tmp_path, w.RaisesOurs, poison=2), units(6))}
        assert reports[2].error == "slide.svs: damaged at level 2"
        assert (reports[2].attempts, reports[2].done, reports[2].key) == (1, 0, "unit 2")
        assert marks(tmp_path, "failed") == 1
        assert [i for i, r in reports.items() if r.error] == [2]
        assert [r.getMessage() for r in caplog.records] == [
            "count, unit 2: given up after 1 attempt: slide.svs: damaged at level 2"
        ]

    @pytest.mark.parametrize(
        ("worker", "attempts", "error"),
        [
            (w.RaisesOSError, 3, "OSError: [Errno 5] Input/output error"),
            (w.Counting, 2, "ValueError: unexpected"),
        ],
    )
    def test_other_errors_are_tried_again(
        self, pool: Pool, tmp_path: Path, worker: type[Worker], attempts: int, error: str
    ) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        for_ever = {unit_of(r): r for r in pool.run(stage(tmp_path / "a", worker, poison=1), units(3))}
        assert (for_ever[1].error, for_ever[1].attempts) == (error, attempts)
        assert "in fail" in for_ever[1].notes[0]
        assert marks(tmp_path / "a", "failed") == attempts
        recovers = stage(tmp_path / "b", worker, poison=1, times=attempts - 1)
        in_the_end = {unit_of(r): r for r in pool.run(recovers, units(3))}
        assert (in_the_end[1].error, in_the_end[1].attempts, in_the_end[1].done) == ("", attempts, 1)

    def test_a_worker_that_cannot_be_made_raises_its_own_error(self, pool: Pool, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no layer 'layer9'") as caught:
            list(pool.run(stage(tmp_path, w.CannotBeMade), units(30)))
        assert type(caught.value) is ModelError
        assert caught.value.message.startswith("model.toml: no layer")
        assert marks(tmp_path, "unit0") == 0
        with pytest.raises((w.Unpicklable, GigacamError), match="1 and 2"):
            list(pool.run(stage(tmp_path, w.CannotBeMadeOddly), units(3)))
        assert len(list(pool.run(stage(tmp_path), units(3)))) == 3

    def test_closing_early_drops_what_has_not_begun(self, pool: Pool, tmp_path: Path) -> None:
        reports = pool.run(stage(tmp_path, sleep=0.02), units(200))
        next(reports)
        reports.close()  # type: ignore[attr-defined]
        assert len(list(pool.run(stage(tmp_path, name="next"), units(1)))) == 1
        time.sleep(0.3)
        ran = len(list(tmp_path.glob("unit*")))
        time.sleep(0.2)
        assert ran == len(list(tmp_path.glob("unit*"))) <= 1 + 4 * pool.capacity

    def test_a_stages_worker_stays_from_run_to_run(self, pool: Pool, tmp_path: Path) -> None:
        for _ in range(3):
            list(pool.run(stage(tmp_path, name="same"), units(8)))
        assert 1 <= marks(tmp_path, "initsame") <= pool.capacity
        list(pool.run(stage(tmp_path, name="other"), units(1)))
        assert marks(tmp_path, "initother") == 1

    def test_workers_long_unused_are_closed(self, pool: Pool, tmp_path: Path) -> None:
        for i in range(WORKERS_KEPT + 1):
            list(pool.run(stage(tmp_path, name=f"{i}"), units(1)))
        assert (marks(tmp_path, "init0"), marks(tmp_path, "close0")) == (1, 1)
        assert marks(tmp_path, f"close{WORKERS_KEPT}") == 0
        assert len(list(pool.run(stage(tmp_path, name="0"), units(1)))) == 1
        assert marks(tmp_path, "init0") == 2

    def test_interrupt_reaches_the_caller_at_once(self, pool: Pool, tmp_path: Path) -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        started = time.monotonic()
        try:
            alarm.start()
            with pytest.raises(KeyboardInterrupt):
                list(pool.run(stage(tmp_path, sleep=1.0), units(20)))
        finally:
            alarm.join()
            signal.signal(signal.SIGINT, before)
        assert time.monotonic() - started < 0.95
        assert len(list(pool.run(stage(tmp_path, name="after"), units(2)))) == 2

    def test_says_what_it_is(self, pool: Pool) -> None:
        assert pool.capacity == (1 if isinstance(pool, SerialPool) else 2)
        assert pool.description.startswith(("serial, ", "ray local, 2 CPU actors x 1 thread"))


@pytest.mark.parametrize("kind", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_closed_pool_refuses(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_session")
    pool = open_pool(PoolSettings(kind=kind, workers=1))
    open_run = pool.run(stage(tmp_path, sleep=0.01), units(100))
    next(open_run)
    pool.close()
    pool.close()
    with pytest.raises(WorkerLostError, match="closed"):
        list(open_run)
    with pytest.raises(WorkerLostError, match="closed"):
        list(pool.run(stage(tmp_path), units(1)))


def test_serial_stops_when_the_device_is_lost(tmp_path: Path) -> None:
    with pytest.raises(WorkerLostError, match="unit 1: the device was lost"):
        list(SerialPool().run(stage(tmp_path, w.LosesDevice, poison=1), units(3)))
    assert marks(tmp_path, "failed") == 1


@pytest.mark.ray
def test_a_poisonous_unit_takes_no_neighbour(
    ray_pool: RayPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = ray_pool.respawns
    other: list[Report] = []
    beside = threading.Thread(target=lambda: other.extend(ray_pool.run(stage(tmp_path, name="b"), units(20))))
    beside.start()
    reports = {unit_of(r): r for r in ray_pool.run(stage(tmp_path, w.Dies, poison=3), units(12))}
    beside.join(60)
    assert set(reports) == set(range(12))
    assert [i for i, r in reports.items() if r.error] == [3]
    assert "unit 3: the worker process was lost 3 times" in reports[3].error
    assert "\n" not in reports[3].error
    assert (reports[3].attempts, marks(tmp_path, "failed"), ray_pool.respawns - before) == (3, 3, 3)
    assert {r.attempts for i, r in reports.items() if i != 3} == {1}
    assert sorted(unit_of(r) for r in other if not r.error and r.attempts == 1) == list(range(20))
    assert capfd.readouterr().out == ""  # where results go, Ray tells no obituaries


@pytest.mark.ray
def test_a_lost_device_costs_the_process_not_the_unit(ray_pool: RayPool, tmp_path: Path) -> None:
    before = ray_pool.respawns
    reports = {
        unit_of(r): r for r in ray_pool.run(stage(tmp_path, w.LosesDevice, poison=0, times=1), units(4))
    }
    assert {i: (r.error, r.attempts) for i, r in reports.items()} == {
        0: ("", 2),
        1: ("", 1),
        2: ("", 1),
        3: ("", 1),
    }
    assert ray_pool.respawns - before == 1


@pytest.mark.ray
def test_long_work_is_no_stall_and_a_stuck_process_is(ray_session: None, tmp_path: Path) -> None:
    import ray

    from workers.ray_pool import RayPool

    def free_cpus() -> float:
        offer: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        return offer.get("CPU", 0.0)

    free = free_cpus()
    pool = RayPool(PoolSettings(kind="ray", workers=1), stall_s=2.0)
    (slow,) = pool.run(stage(tmp_path, name="slow", sleep=3.0), units(1))
    assert (slow.error, slow.attempts, pool.respawns) == ("", 1, 0)
    reports = {
        unit_of(r): r for r in pool.run(stage(tmp_path, w.HoldsTheInterpreter, poison=0, times=1), units(2))
    }
    assert {i: (r.error, r.attempts) for i, r in reports.items()} == {0: ("", 2), 1: ("", 1)}
    assert pool.respawns == 1
    open_run = pool.run(stage(tmp_path, name="open", sleep=0.01), units(50))
    next(open_run)
    pool.close()  # the Ray is another's and stays: no actor of ours may
    deadline = time.monotonic() + 10
    while free_cpus() < free and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_cpus() >= free
    assert pool.respawns == 1
    with pytest.raises(WorkerLostError, match="closed"):
        list(open_run)


@pytest.mark.ray
def test_ray_shares_fairly_and_works_on_while_another_run_is_read(ray_pool: RayPool, tmp_path: Path) -> None:
    big = ray_pool.run(stage(tmp_path, name="big", sleep=0.03), units(60))
    read_big = [unit_of(next(big))]
    small = [unit_of(r) for r in ray_pool.run(stage(tmp_path, sleep=0.03, name="small"), units(20))]
    assert sorted(small) == list(range(20))
    # Nobody took a report of the big run, whose pulled tasks are done by now all the same, and no others.
    assert all(marks(tmp_path, f"unit{i}") == 2 for i in range(1, 8))
    assert all(marks(tmp_path, f"unit{i}") == 0 for i in range(20, 60))
    read_big += [unit_of(r) for r in big]
    assert sorted(read_big) == list(range(60))


@pytest.mark.ray
def test_actors_are_told_their_threads_and_find_no_device(ray_pool: RayPool, tmp_path: Path) -> None:
    (report,) = ray_pool.run(stage(tmp_path, w.TellsThreads), units(1))
    assert report.notes == ("1", "")


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "threads", "lanes"),
    [
        (2, 0, None, None, ["2 CPU actors x 1 thread"]),
        (8, 0, None, 4, ["2 CPU actors x 4 threads"]),
        (1, 0, None, 4, ["1 CPU actor x 4 threads"]),
        (8, 0, 3, 1, ["3 CPU actors x 1 thread"]),
        (1, 1, None, None, ["1 GPU actor x 1 thread", "1 CPU actor x 1 thread"]),
        (16, 1, None, None, ["1 GPU actor x 8 threads", "8 CPU actors x 1 thread"]),
        (16, 4, None, None, ["4 GPU actors x 2 threads", "8 CPU actors x 1 thread"]),
        (16, 4, 2, 4, ["2 GPU actors x 4 threads", "2 CPU actors x 4 threads"]),
    ],
)
def test_actors_follow_what_ray_has(
    cpus: int, gpus: int, workers: int | None, threads: int | None, lanes: list[str]
) -> None:
    from workers.ray_pool import plan_lanes

    planned = plan_lanes(cpus, gpus, PoolSettings(kind="ray", workers=workers, threads=threads))
    assert [str(lane) for lane in planned] == lanes
    if workers is None:
        assert sum(lane.size * lane.cpus for lane in planned) <= cpus
    for lane in planned:
        assert ("CUDA_VISIBLE_DEVICES" in lane.options["runtime_env"]["env_vars"]) == (lane.name == "cpu")
        assert lane.options["num_gpus"] == (lane.name == "gpu")


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_its_own_is_quiet_interruptible_and_gone_afterwards(tmp_path: Path) -> None:
    script = """
import os, sys, time
from tests.conformance.test_pools import stage, units
from schemas.run import PoolSettings
from workers.pool import open_pool
from pathlib import Path

pool = open_pool(PoolSettings(kind="ray", workers=1))
print(pool.description, flush=True)
try:
    for report in pool.run(stage(Path(sys.argv[1]), sleep=0.5), units(1000)):
        print("report", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
pool.close()
from workers.ray_pool import ray
print("ray is up" if ray.is_initialized() else "ray is gone", flush=True)
"""
    root = Path(__file__).parents[2]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupt,
    ) as process:
        assert process.stdout is not None
        first = [process.stdout.readline(), process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert first == ["ray local, 1 CPU actor x 1 thread\n", "report\n"]
    assert (out.splitlines()[-2:], err, process.returncode) == (["interrupted", "ray is gone"], "", 0)
    assert time.monotonic() - interrupted < 20


def allow_interrupt() -> None:
    """A shell's background job starts with SIGINT ignored, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
