"""The C library's allocator, told to keep what a network gives back."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
KEPT_BYTES = 1 << 30
"""Blocks below this size are taken from the heap, and so much free heap is kept."""
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Environment of processes that compute in another thread than their first, as Ray's actors do: a thread's own heap ends at
64 MiB, and `keep_freed_memory` would not reach what is larger."""


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to a gigabyte for the next allocation.

    By default it takes every feature map anew from the system and gives it back, page by page, for each layer of each batch: a
    fifth of a small network's time on a CPU. What a process holds at its highest stays the same; it holds it until it ends.

    Returns
    -------
    bool
        Whether the C library took it; other libraries than glibc are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, KEPT_BYTES) == 1 for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD))
