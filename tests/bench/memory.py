"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
from pathlib import Path

import torch

from tests.bench.contenders import CASES, prepared

BATCH = 8


def peak_memory(case: str, contender: str) -> float:
    """MiB a tile that one call of a contender adds to the resident memory of a fresh process, at its highest."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports are done once
    with context.Pool(1) as pool:
        return float(pool.apply(_peak, (case, contender)))


def _peak(name: str, contender: str) -> float:
    torch.set_num_threads(1)
    case = CASES[name]
    x = case.x(min(BATCH, case.batch))
    net = case.net()
    with torch.no_grad():
        net(x[:1])  # what the convolutions' library keeps for good
    run = prepared(contender, case, net, x)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here (Linux)
    before = _status("VmRSS")
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    return (_status("VmHWM") - before) / 1024 / len(x)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key))
