"""What tests share: which of them run, and the one Ray of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The small networks of the tests gain nothing from a second thread, and several processes may share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A slow machine is no failure: examples are bounded by number, not by time.
settings.register_profile("gigacam", deadline=None)
settings.load_profile("gigacam")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


SERVICES = {"prefect": "prefect_session", "ray": "ray_session"}
"""Marks, and the fixture of each; a test of both goes with the first."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        if getattr(config.option, "loadgroup", False) and hasattr(item, "_id"):
            # xdist 3.8 hands groups on in a field that pytest 9.2 reads no more (pytest-xdist issue 1386): without
            # this, every test goes its own way, and both processes make every fixture.
            item._id = type(item._id).parse(f"{item.nodeid}@{group}")
    # The two long chains first and side by side; what is short fills up the end (with --no-loadscope-reorder).
    items.sort(key=lambda item: groups[item] not in SERVICES)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long; run with --slow"))
    wants_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wants_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in wants_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _group(item: pytest.Item) -> str:
    """Under xdist: one process has the session's Prefect server, one its Ray, and a file's fixtures are made once."""
    names = getattr(item, "fixturenames", ())
    shared = [m for m, fixture in SERVICES.items() if fixture in names or item.get_closest_marker(m)]
    if "browser" in names:  # one process starts it
        return "browser"
    return shared[0] if shared else item.path.name


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of 6 logical CPUs, whatever the machine has; pools opened meanwhile join it."""
    from workers.ray_pool import start_ray  # before ray, as it sets what ray reads on import

    started = start_ray("local", cpus=6)
    import ray

    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def prefect_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Prefect server of a session, on a database of its own; gives the URL of its API."""
    from flows.settings import quiet_environment

    quiet_environment()
    from prefect.settings import PREFECT_API_URL

    from flows.server import temporary_server

    database = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('prefect')}/prefect.db"
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("PREFECT_API_URL", raising=False)
        patched.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", database)
        with temporary_server() as wait:
            wait()
            url = PREFECT_API_URL.value()
            assert url is not None
            yield url
