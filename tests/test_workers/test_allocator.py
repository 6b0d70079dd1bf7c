"""Freed blocks stay with the process: what a loop takes and gives back costs page faults once."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOP = """
import resource, sys
from workers.allocator import keep_freed_memory
asked = sys.argv[1] == "keep"
if asked and not keep_freed_memory():
    sys.exit(7)
size = 40 << 20
b"x" * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    b"x" * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (40 << 20) // 4096
"""Of one array."""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=False)
    if done.returncode == 7:
        pytest.skip("needs glibc: other C libraries have no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc, which runs on Linux")
def test_freed_memory_is_used_again() -> None:
    assert faults("keep") < PAGES
    assert faults("as it is") > PAGES, "nothing was to be gained on this machine"
