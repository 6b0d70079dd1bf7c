"""The pool on Ray actors: one a GPU for the device's work, or one a CPU; the only file that imports ray."""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from schemas.errors import GigacamError, WorkerLostError
from schemas.run import PoolSettings, Report
from workers.allocator import ONE_HEAP
from workers.dispatch import Dispatcher
from workers.pool import Stage, Task, Worker, perform

# Read by ray when it is imported: no usage reports; workers run under this interpreter even where the driver
# was started by `uv run`; and devices are hidden from CPU actors by us, not by a default that is to change.
for _name in (
    "RAY_USAGE_STATS_ENABLED",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
):
    os.environ.setdefault(_name, "0")
# Ray prints a paragraph on stdout for every worker that dies; we say so ourselves, and stdout is for results.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402

log = logging.getLogger("gigacam")

OBJECT_STORE_BYTES = 128 * 2**20
"""Of a local Ray: only reports and small init values pass through it."""
SENTENCE_END = re.compile(r"[.](?=\s|$)|\n")


def start_ray(address: str = "", cpus: int | None = None) -> bool:
    """Connect to the Ray at `address`, else `RAY_ADDRESS`, else start one here; quietly, without a dashboard.

    Parameters
    ----------
    address
        Ray address; empty: see above.
    cpus
        CPUs that a Ray started here offers; None: as many as this process may use.

    Returns
    -------
    bool
        Whether this call started or joined it, so that the caller has to call `stop_ray`.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    local: dict[str, Any] = {
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(local if address == "local" else {}),
    )
    return True


def start_ray_for(settings: PoolSettings) -> bool:
    """`start_ray` with room for the workers asked for and one more, as CPU actors beside GPU ones come on top."""
    room = (settings.workers + 1) * (settings.threads or 1) if settings.workers else None
    return start_ray(settings.address, max(room, os.cpu_count() or 1) if room else None)


def stop_ray() -> None:
    """End or leave the Ray that `start_ray` started or joined."""
    ray.shutdown()


class RayPool:
    """Runs tasks on Ray actors that are respawned when they die.

    Where Ray offers GPUs, each gets an actor for stages that need the device, and CPU actors do the rest;
    otherwise one lane of CPU actors does both.

    Parameters
    ----------
    settings
        `workers` actors of `threads` threads at `address`.
    stall_s
        See `workers.dispatch.Dispatcher`.
    """

    def __init__(self, settings: PoolSettings, stall_s: float = 600.0) -> None:
        self._started = start_ray_for(settings)
        try:
            offer: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            cpus, gpus = int(offer.get("CPU", 0)), int(offer.get("GPU", 0))
            self._lanes = plan_lanes(cpus, gpus, settings)
            asked = sum(lane.size * lane.cpus for lane in self._lanes)
            if asked > cpus:
                log.warning(
                    "%d CPUs are asked of Ray, which has %d: some workers may never start", asked, cpus
                )
            place = settings.address or os.environ.get("RAY_ADDRESS", "") or "local"
            self._description = f"ray {place}, {', '.join(map(str, self._lanes))}"
            sizes = [(lane.name, lane.size) for lane in self._lanes]
            self._dispatcher = Dispatcher(sizes, lambda i: _Actor(self._lanes[i]), stall_s)
        except BaseException:
            if self._started:
                stop_ray()
            raise

    @property
    def description(self) -> str:
        return self._description

    @property
    def capacity(self) -> int:
        return sum(lane.size for lane in self._lanes)

    @property
    def respawns(self) -> int:
        """How many actors were replaced so far."""
        return self._dispatcher.respawns

    def run(self, stage: Stage, tasks: Iterable[Task]) -> Iterator[Report]:
        lane = 0 if stage.resource == "device" else len(self._lanes) - 1
        return self._dispatcher.run(stage, lane, tasks)

    def close(self) -> None:
        self._dispatcher.close()
        if self._started:
            self._started = False
            stop_ray()


@dataclass(frozen=True)
class Lane:
    """Actors of one kind: how many, the threads of each, and the CPUs it claims of Ray."""

    name: Literal["gpu", "cpu"]
    size: int
    threads: int
    cpus: int

    def __str__(self) -> str:
        actors, threads = "s" * (self.size != 1), "s" * (self.threads != 1)
        return f"{self.size} {self.name.upper()} actor{actors} x {self.threads} thread{threads}"

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options of the actors; a CPU actor finds no device, as another one owns it."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = dict.fromkeys(names, str(self.threads))
        if self.name == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
            env |= ONE_HEAP
        return {
            "num_cpus": self.cpus,
            "num_gpus": int(self.name == "gpu"),
            "max_restarts": 0,  # the dispatcher counts deaths and respawns
            "max_task_retries": 0,
            "runtime_env": {"env_vars": env},
        }


def plan_lanes(cpus: int, gpus: int, settings: PoolSettings) -> list[Lane]:
    """The actors for what Ray has: one lane for all work, or (GPU, CPU).

    With GPUs, half of the CPUs feed the devices unless `threads` says otherwise, the rest stitch and write.
    """
    threads = settings.threads or 1
    claim = min(
        threads, max(1, cpus)
    )  # more threads than Ray has CPUs: what would never start is not asked for
    if not gpus:
        return [Lane("cpu", settings.workers or max(1, cpus // threads), threads, claim)]
    devices = min(gpus, settings.workers or gpus)
    share = settings.threads or max(1, cpus // (2 * devices))
    rest = cpus - devices * share
    # A device's actor claims no CPU where that would leave none for stitching.
    gpu = Lane("gpu", devices, share, share if rest >= claim else 0)
    return [gpu, Lane("cpu", max(1, rest // threads), threads, claim)]


class _Host:
    """The actor: keeps the workers of several stages. Errors are returned, for Ray would wrap a raised one."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    @ray.method(concurrency_group="signs")
    def ping(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def load(self, key: str, worker: type[Worker], init: Any, drop: str | None) -> Exception | None:
        try:
            if drop is not None:
                self._workers.pop(drop).close()
            self._workers[key] = worker(init)
        except Exception as error:
            return portable(error)
        return None

    @ray.method(concurrency_group="signs")
    def expect(self, key: str, task: Task) -> None:
        if key in self._workers:
            self._workers[key].expect(task)

    def run(self, key: str, stage: str, task: Task) -> Report | Exception:
        try:
            return perform(self._workers[key], stage, task)
        except Exception as error:
            return portable(error)


def portable(error: Exception) -> Exception:
    """`error` with its traceback as a note, or its text in a GigacamError where it would not survive pickling."""
    error.add_note("In the worker:\n" + "".join(traceback.format_exception(error)))
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        same = False
    return error if same else GigacamError(f"{type(error).__name__}: {error}")


class _Actor:
    """A `_Host` as a `workers.dispatch.Replica`."""

    def __init__(self, lane: Lane) -> None:
        # Pings and hints have a thread of their own: a host at work still answers.
        host = ray.remote(concurrency_groups={"signs": 1})(_Host)  # type: ignore[call-overload]
        self._actor: Any = host.options(**lane.options).remote()

    def ping(self) -> Future[str]:
        return _future(self._actor.ping.remote())

    def load(self, key: str, stage: Stage, drop: str | None) -> Future[None]:
        return _future(self._actor.load.remote(key, stage.worker, stage.init, drop))

    def run(self, key: str, stage: str, task: Task) -> Future[Report]:
        answer = _future(self._actor.run.remote(key, stage, task))
        self._actor.expect.remote(key, task)  # a host at work on another task reads ahead
        return answer

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


def _future(ref: Any) -> Future[Any]:
    """The answer to a call; what the host returned as an error, or Ray's own, is raised."""
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            value = done.result()
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)
        elif isinstance(error, RayTaskError):  # arguments that could not be unpickled over there
            answer.set_exception(error.cause if isinstance(error.cause, Exception) else error)
        elif isinstance(error, RayError):
            answer.set_exception(WorkerLostError(_reason(error)))
        else:
            answer.set_exception(error)

    ref.future().add_done_callback(settle)
    return answer


def _reason(error: RayError) -> str:
    """The one sentence of Ray's page on a dead actor that says what happened."""
    text = str(error).strip().rpartition("exit detail: ")[2]
    return f"{type(error).__name__}: {re.split(SENTENCE_END, text)[0]}"
