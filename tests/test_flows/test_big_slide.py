"""A slide of 10 gigapixels costs what its tissue costs: little memory, little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.plan import PlanSummary
from schemas.run import RunReport
from tests.test_flows.networks import write_factory_card

MIB = 1 << 20
TISSUE = {10_000: 0.01, 100_000: 0.003}
"""Share of a slide by its side: a dozen tiles, and hundreds in several units among 150,000 places."""
RATIO = 1.3
"""How much more memory 10 gigapixels may take than 100 megapixels."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_factory_card(
        tmp_path_factory.mktemp("card"), "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(256, 256), mpp=0.5, scale=(0.0, 255.0),
    )  # fmt: skip


def slide(side: int) -> str:
    return f"procedural:slide?width={side}&height={side}&tissue={TISSUE[side]}&seed=1"


CHILD = """
import json, resource, runpy, sys
code = 0
sys.argv = ["gigacam", *sys.argv[1:]]
try:
    runpy.run_module("flows.cli", run_name="__main__")
except SystemExit as end:
    code = end.code or 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak if sys.platform == "darwin" else peak * 1024}), file=sys.stderr)
sys.exit(code)
"""
"""The command line in a process of its own, which says in its last line what memory it had at most."""


def command(*words: str) -> tuple[str, int, float]:
    """Standard output, peak memory in bytes and wall seconds of one command, process start included."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])["peak"], time.perf_counter() - began


def explain(side: int, card: str, out: Path) -> tuple[int, float]:
    """Peak bytes and wall seconds of `explain --pool serial`."""
    words = [
        "--pool",
        "serial",
        "--direct",
        "--threads",
        "1",
        "--target",
        "r",
        "--unit",
        "128",
        "--batch",
        "8",
    ]
    _, peak, seconds = command("explain", slide(side), "--model", card, "--out", str(out), *words)
    (image,) = RunReport.model_validate_json((out / "run.json").read_text()).images
    assert image.status == "complete"
    assert image.counts is not None
    tissue = TISSUE[side] * side * side / 256**2
    assert 0.5 * tissue < image.counts.done == image.counts.planned < 3 * tissue + 10
    print(f"explain {side} x {side}: {image.counts.done} tiles, peak {peak / MIB:.0f} MiB, {seconds:.1f} s")
    return peak, seconds


def test_memory_does_not_grow_with_the_slide(tmp_path: Path, card: str) -> None:
    small, _ = explain(10_000, card, tmp_path / "small")
    large, _ = explain(100_000, card, tmp_path / "large")
    assert large < 2048 * MIB
    assert large < RATIO * small


def test_plan_lays_every_tile_of_a_big_slide(tmp_path: Path, card: str) -> None:
    text, peak, seconds = command(
        "plan", slide(100_000), "--model", card, "--out", str(tmp_path / "out"), "--json"
    )
    (plan,) = (PlanSummary.model_validate(item) for item in json.loads(text))
    assert plan.shape_l0 == (100_000, 100_000)
    assert 0.5 * 0.003 < plan.tissue_fraction < 2 * 0.003
    assert 0.5 * 458 < plan.tiles < 3 * 458
    assert peak < 2048 * MIB
    assert not (tmp_path / "out").exists()
    print(f"plan: {plan.tiles} tiles, peak {peak / MIB:.0f} MiB, {seconds:.1f} s")


@pytest.mark.slow
def test_plan_of_a_big_slide_takes_less_than_5_s(tmp_path: Path, card: str) -> None:
    _, _, seconds = min(
        (command("plan", slide(100_000), "--model", card, "--out", str(tmp_path)) for _ in range(2)),
        key=lambda run: run[2],
    )
    print(f"plan: {seconds:.1f} s")
    assert seconds < 5
