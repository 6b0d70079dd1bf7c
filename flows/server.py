"""A Prefect server for as long as a command runs, where none is configured.

Prefect starts one by itself, too, when a flow first asks for it. This one begins to load while the command still
loads what it needs, keeps out of the terminal, outlives a Ctrl-C by as long as it takes to be told of it, and goes
when the command is gone, however that ended.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from flows.progress import Listener
    from schemas.run import ExplainRequest, PoolSettings, RunReport

START_S = 180.0
"""Migrations of a fresh SQLite took 14 s on an idle machine, 60 s on a crowded one."""
ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    # What Prefect's own temporary server is told: no schedules, no late runs, only what records runs.
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    # A quarter of the first start; a server that is there to stay registers them when it starts.
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}


Run = Callable[["ExplainRequest", "PoolSettings"], "RunReport"]


@contextmanager
def recorded(told: Listener, pool: PoolSettings) -> Iterator[Run]:
    """What yields explains a request through Prefect, as often as asked, and tells `told` how far it is.

    The server and, where `pool` wants one, a local Ray start side by side and serve every request.

    Raises
    ------
    RuntimeError
        The server did not come up.
    """
    from flows.settings import quiet_environment

    quiet_environment()
    # What happens is told by `told`; Prefect's own lines go to the server, not to the terminal as well.
    logging.getLogger("prefect").propagate = False
    with temporary_server() as wait, _ray(pool):
        from flows.explain import NotComplete, explain
        from flows.progress import LISTENER

        wait()

        def run(request: ExplainRequest, pool: PoolSettings) -> RunReport:
            before = LISTENER.set(told)
            try:
                report: RunReport = explain(request, pool)
            except NotComplete as error:
                return error.report
            finally:
                LISTENER.reset(before)
            return report

        yield run


@contextmanager
def _ray(pool: PoolSettings) -> Iterator[None]:
    if pool.kind != "ray":
        yield
        return
    from workers.ray_pool import start_ray_for, stop_ray

    started = start_ray_for(pool)
    try:
        yield
    finally:
        if started:
            stop_ray()


@contextmanager
def temporary_server() -> Iterator[Callable[[], None]]:
    """Start a server unless Prefect knows of one; what it yields waits until flows can run.

    Raises
    ------
    RuntimeError
        When waited for: the server did not come up. Its last lines are in the message.
    """
    import prefect.settings

    if prefect.settings.get_current_settings().api.url:
        yield lambda: None
        return
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(port)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # a Ctrl-C in the terminal is the command's alone
        )
        url = f"http://127.0.0.1:{port}/api"
        try:
            with prefect.settings.temporary_settings({prefect.settings.PREFECT_API_URL: url}):
                yield lambda: _wait(process, port, said)
                _tell_all()
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        try:
            connection.request("GET", "/api/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):  # not listening yet
            time.sleep(0.05)
        finally:
            connection.close()
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()[-20:]
    msg = "\n".join(["the Prefect server did not start; --direct does without. It said:", *lines])
    raise RuntimeError(msg)


def _tell_all() -> None:
    """Send what Prefect's threads still hold: the last states and lines of the log."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=5.0)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(port: int) -> None:
    """Be the server, until standard input ends: that is when who started it is gone."""
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error"
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    server.run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
