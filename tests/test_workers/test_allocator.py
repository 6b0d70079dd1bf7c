"""Freed blocks stay with the process: what a loop takes and gives back costs page faults once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from workers.ray_pool import Lane

LOOP = """
import resource, sys, threading
from workers.allocator import keep_freed_memory
asked = sys.argv[1] == "keep"
if asked and not keep_freed_memory():
    sys.exit(7)
size = 80 << 20
def loop():
    b"x" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * size
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
else:
    loop()
"""
PAGES = (80 << 20) // 4096
"""Of one array."""


def faults(how: str, where: str = "main", environment: dict[str, str] | None = None) -> int:
    done = subprocess.run(
        [sys.executable, "-c", LOOP, how, where],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 7:
        pytest.skip("needs glibc: other C libraries have no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc, which runs on Linux")
def test_freed_memory_is_used_again() -> None:
    assert faults("keep") < PAGES
    assert faults("as it is") > PAGES, "nothing was to be gained on this machine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc, which runs on Linux")
def test_a_thread_of_an_actor_keeps_as_much() -> None:
    environment = Lane("cpu", 1, 1, 1).options["runtime_env"]["env_vars"]
    assert faults("keep", "thread", environment) < PAGES
    assert faults("keep", "thread") > PAGES, "a thread's heap is not bounded on this machine"
