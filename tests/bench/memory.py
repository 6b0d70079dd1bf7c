"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing as mp
import os
from pathlib import Path

import torch

from tests.bench.contenders import CASES, prepared

BATCH = 8


def peak_memory(case: str, contender: str) -> float:
    """MiB a tile that one call of a contender adds to the resident memory of a process of its own, at its highest.

    Of its second call: the first fills caches and, with us, proves the head.
    """
    # Tensors get pages of their own and give them back: else what an earlier call freed would hide the next.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports are done once
    with context.Pool(1) as pool:
        return float(pool.apply(_peak, (case, contender)))


def _peak(name: str, contender: str) -> float:
    torch.set_num_threads(1)
    case = CASES[name]
    x = case.x(min(BATCH, case.batch))
    run = prepared(contender, case, case.net(), x)
    with contextlib.redirect_stderr(io.StringIO()):
        run()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here (Linux)
        before = _status("VmRSS")
        run()
    return (_status("VmHWM") - before) / 1024 / len(x)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key))
