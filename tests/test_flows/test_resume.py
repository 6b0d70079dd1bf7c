"""A run that is stopped, however, goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner
from zarr.storage import LocalStore

from flows.cli import app, main
from schemas.heatmap import HeatmapSpec, TileStatus
from schemas.run import RunReport
from tests.test_flows.networks import write_factory_card
from tests.test_flows.runs import explain, stored_bytes, tiles_of
from workers.stitching.grid import all_blocks
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore

SLIDE = "procedural:slide?width=701&height=2503&tissue=0.4&seed=5"
"""Tall: its upper block is finished while tiles of the lower one are still to come."""
STORES = ("tiles.zarr", "heatmap.ome.zarr")
SLOW_S = 0.25
"""A unit of the slow network takes this long: time to be stopped in."""

pytestmark = pytest.mark.usefixtures("no_pictures")


def write_card(folder: Path, function: str = "pooled_channels", **args: Any) -> str:
    return write_factory_card(
        folder, function, {"cell": 16, **args}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(128, 128), mpp=0.5, scale=(0.0, 255.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_card(tmp_path_factory.mktemp("card"))


def folder_of(report: RunReport) -> Path:
    return Path(report.images[0].output)


def assert_same_stores(one: Path, other: Path) -> None:
    for store in STORES:
        a, b = stored_bytes(one / store), stored_bytes(other / store)
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name]] == []


def unit_files(folder: Path) -> dict[Path, int]:
    """Modification times of every file that holds a unit's values."""
    return {
        p: p.stat().st_mtime_ns
        for name in ("maps", "scores", "status", "target_index")
        for p in (folder / "tiles.zarr" / name).rglob("c/*")
        if p.is_file()
    }


UNIT = 8
ASKED: dict[str, Any] = {
    "tissue": "none",
    "unit": UNIT,
    "heatmap": HeatmapSpec(downsample=1),
}


FORKS = multiprocessing.get_context("forkserver")
"""Where processes of their own come from that need not import torch first, each for itself."""
FORKS.set_forkserver_preload(["flows.batch", "flows.steps", "workers.stitcher", "tests.test_flows.networks"])


def command_line(words: list[str], said: Path) -> None:
    """Be the command line; what it says on standard error goes to a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    main(words)


class TestStoppedFromOutside:
    """Signals to a process that computes, in a row: each run goes on where the one before was stopped."""

    def start(self, card: str, out: Path) -> BaseProcess:
        words = [
            "explain", SLIDE, "--model", card, "--out", str(out), "--pool", "serial", "--direct", "--threads", "1", "--tissue", "none", "--unit", str(UNIT), "--downsample", "1",
        ]  # fmt: skip
        process = FORKS.Process(target=command_line, args=(words, out.with_suffix(".txt")))
        process.start()
        return process

    def wait_until(self, process: BaseProcess, out: Path, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.is_alive(), out.with_suffix(".txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_kill_interrupt_kill(self, tmp_path: Path) -> None:
        card = write_card(tmp_path / "m", "slow_pooled_channels", seconds=SLOW_S)
        undisturbed = explain(SLIDE, card, tmp_path / "whole", **ASKED)
        whole = folder_of(undisturbed)
        tiles = tiles_of(undisturbed)
        assert tiles.info.units >= 12
        folder = tmp_path / "out" / whole.name

        def units_done() -> int:
            try:
                status = zarr.open_array(folder / "tiles.zarr" / "status" / "explain", mode="r")[:]
            except FileNotFoundError:
                return 0
            return len(np.unique(np.flatnonzero(status == TileStatus.DONE) // UNIT))

        def blocks_done() -> int:
            return sum(
                int(np.count_nonzero(zarr.open_array(p, mode="r")[:]))
                for p in (folder / "heatmap.ome.zarr" / "blocks").glob("[0-9]*")
            )

        out = tmp_path / "out"
        process = self.start(card, out)
        self.wait_until(process, out, lambda: units_done() >= 3)
        process.kill()
        process.join()
        killed_at = units_done()
        assert 3 <= killed_at < tiles.info.units
        before = unit_files(folder)

        process = self.start(card, out)
        self.wait_until(process, out, lambda: units_done() >= killed_at + 2)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
        said = out.with_suffix(".txt").read_text()
        assert "run the same command again to resume" in said.splitlines()[-1]
        interrupted_at = units_done()
        assert killed_at + 2 <= interrupted_at < tiles.info.units
        now = unit_files(folder)
        done = before.keys() - {
            p for p in before if int(p.relative_to(folder).parts[-1 - _axes(p)]) >= killed_at
        }
        assert done
        assert all(now[p] == before[p] for p in done)

        process = self.start(card, out)
        self.wait_until(process, out, lambda: blocks_done() >= 1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed_at = units_done()
        grid = HeatmapStore.open(whole / STORES[1]).grid
        blocks = sum(len(all_blocks(grid, level)) for level in range(len(grid.levels)))
        assert 1 <= blocks_done() < blocks

        resumed = explain(SLIDE, card, out, **ASKED)
        assert resumed.images[0].status == "complete"
        pending = tiles.info.planned - UNIT * killed_at
        assert resumed.images[0].provenance["tiles_this_run"] == max(0, pending)
        assert_same_stores(folder, whole)


def _axes(path: Path) -> int:
    """How many chunk axes follow the unit in the name of a chunk file."""
    parts = path.parts
    return len(parts) - 2 - max(i for i, part in enumerate(parts) if part == "c")


class Killed(BaseException):
    """What a process that dies raises nowhere: no handler of the code under test may catch it."""


class DyingDisk:
    """Store writes that stop, for good, before the n-th; the one in hand is left half written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int | None = None) -> None:
        self.writes = 0
        disk = self
        write = LocalStore.set
        one_at_a_time = asyncio.Lock()  # so that none is in flight when one dies

        async def counted(self: LocalStore, key: str, value: Any) -> None:
            async with one_at_a_time:
                if disk.writes == last:
                    path = self.root / f"{key}.0123456789abcdef.partial"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(value.to_bytes()[:7])
                    raise Killed
                disk.writes += 1
                await write(self, key, value)

        monkeypatch.setattr(LocalStore, "set", counted)


SMALL: dict[str, Any] = {"unit": 9, "tissue": "none", "heatmap": HeatmapSpec(downsample=2)}


KILLS = 12


def test_killed_in_the_middle_of_a_write(tmp_path: Path, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a dozen places from the first metadata to the last block: units half written, blocks half written."""
    slide = SLIDE.replace("701", "601").replace("2503", "451")
    with monkeypatch.context() as patched:
        disk = DyingDisk(patched)
        undisturbed = explain(slide, card, tmp_path / "whole", **SMALL)
    whole, info = folder_of(undisturbed), tiles_of(undisturbed).info
    assert info.units >= 3
    in_the_middle = 0
    for last in np.unique(np.linspace(0, disk.writes - 1, KILLS).astype(int)).tolist():
        out = tmp_path / f"killed-{last}"
        with monkeypatch.context() as patched:
            DyingDisk(patched, last)
            with pytest.raises(Killed):
                explain(slide, card, out, **SMALL)
        folder, pending = out / whole.name, info.planned
        if (folder / STORES[0]).exists():
            left = TilesStore.open(folder / STORES[0])
            pending = sum(len(left.unit_rows(unit)) for unit in left.pending_units())
        resumed = explain(slide, card, out, **SMALL)
        assert resumed.images[0].status == "complete"
        assert resumed.images[0].provenance["tiles_this_run"] == pending
        in_the_middle += 0 < pending < info.planned
        assert_same_stores(folder, whole)
    assert in_the_middle >= 2


def test_the_same_request_again_computes_nothing(tmp_path: Path, card: str) -> None:
    first = explain(SLIDE, card, tmp_path, **SMALL)
    folder = folder_of(first)
    before = {store: stored_bytes(folder / store) for store in STORES}
    chunks = [p for p in folder.rglob("c/**/*") if p.is_file()]
    when = {p: p.stat().st_mtime_ns for p in chunks}
    again = explain(SLIDE, card, tmp_path, **SMALL)
    assert again.exit_code == 0
    assert again.images[0].provenance["tiles_this_run"] == 0
    assert {store: stored_bytes(folder / store) for store in STORES} == before
    assert {p: p.stat().st_mtime_ns for p in chunks} == when


def test_another_importance_stitches_again_and_computes_nothing(tmp_path: Path, card: str) -> None:
    asked = {**SMALL, "overlap": 0.3}
    explain(SLIDE, card, tmp_path / "a", **asked)
    flat = {**asked, "heatmap": HeatmapSpec(downsample=2, importance="flat")}
    tiles = stored_bytes(tmp_path / "a")
    again = explain(SLIDE, card, tmp_path / "a", **flat)
    anew = explain(SLIDE, card, tmp_path / "b", **flat)
    assert again.images[0].status == "complete"
    assert again.images[0].provenance["tiles_this_run"] == 0
    assert_same_stores(folder_of(again), folder_of(anew))
    changed = stored_bytes(tmp_path / "a")
    assert all(changed[name] == tiles[name] for name in tiles if "tiles.zarr" in name)
    assert any(changed.get(name) != tiles[name] for name in tiles if "heatmap.ome.zarr/0/" in name)


def test_another_target_in_the_same_place_is_refused_unless_fresh(tmp_path: Path, card: str) -> None:
    first = explain(SLIDE, card, tmp_path, targets=("r",), **SMALL)
    folder = folder_of(first)
    before = {store: stored_bytes(folder / store) for store in STORES}
    other = explain(SLIDE, card, tmp_path, targets=("g",), **SMALL)
    assert other.images[0].status == "failed"
    assert "cam.targets" in other.images[0].error
    assert "--fresh" in other.images[0].error
    assert {store: stored_bytes(folder / store) for store in STORES} == before

    words = [
        "explain",
        SLIDE,
        "--model",
        card,
        "--out",
        str(tmp_path),
        "--target",
        "g",
        "--pool",
        "serial",
        "--direct",
    ]
    run = CliRunner().invoke(app, [*words, "--threads", "1", "--unit", "9", "--downsample", "2"])
    assert run.exit_code == 1
    assert "cam.targets (there ['r'], asked ['g'])" in run.stdout

    fresh = explain(SLIDE, card, tmp_path, targets=("g",), fresh=True, **SMALL)
    assert fresh.images[0].status == "complete"
    assert fresh.images[0].provenance["tiles_this_run"] == tiles_of(fresh).info.planned > 0
    for store in STORES:
        assert stored_bytes(folder / f"{store}.old-1") == before[store]
    alone = explain(SLIDE, card, tmp_path / "alone", targets=("g",), **SMALL)
    assert_same_stores(folder, folder_of(alone))
