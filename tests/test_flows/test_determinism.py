"""The same bytes, wherever and in whatever order a run is computed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flows.batch
from schemas.heatmap import HeatmapSpec
from schemas.run import PoolSettings, Report, RunReport
from tests.test_flows.networks import write_convnet_card
from tests.test_flows.runs import explain, heatmap_of, stored_bytes, tiles_of, values_of
from workers.pool import SerialPool, Stage, Task

SLIDE = "procedural:slide?width=2101&height=501&tissue=0.5&seed=7"
"""Two blocks at level 0, whose seam tiles overlap."""
ASKED: dict[str, Any] = {
    "methods": ("gradcam", "eigencam"),
    "overlap": 0.4,
    "unit": 3,
    "batch": 2,
    "tissue": "none",
    "heatmap": HeatmapSpec(downsample=1),
}
STORES = ("tiles.zarr", "heatmap.ome.zarr")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_convnet_card(tmp_path_factory.mktemp("card"), "slide", tile=(96, 96), mpp=1.0)


@pytest.fixture(scope="module")
def serial(card: str, tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    report = explain(SLIDE, card, tmp_path_factory.mktemp("serial"), **ASKED)
    assert report.images[0].status == "complete"
    assert tiles_of(report).info.units > 20
    assert heatmap_of(report).grid.blocks(0) == (1, 2)
    return report


def assert_same_bytes(one: RunReport, other: RunReport) -> None:
    assert one.images[0].status == other.images[0].status == "complete"
    for store in STORES:
        a, b = (stored_bytes(Path(r.images[0].output) / store) for r in (one, other))
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name]] == []


def assert_close(one: RunReport, other: RunReport) -> None:
    """Within 1e-5 of the largest magnitude, and finite in the same places."""
    pairs = [(values_of(heatmap_of(one)), values_of(heatmap_of(other)))]
    rows = np.arange(tiles_of(one).info.tiles)
    for method in ASKED["methods"]:
        pairs += [
            (tiles_of(one).maps_of(method, t, rows), tiles_of(other).maps_of(method, t, rows)) for t in (0, 1)
        ]
    pairs.append((tiles_of(one).scores(), tiles_of(other).scores()))
    for a, b in pairs:
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.nanmax(np.abs(a))))


class Shuffled(SerialPool):
    """A serial pool that takes the tasks of a stage in another order."""

    def run(self, stage: Stage, tasks: Iterable[Task]) -> Iterator[Report]:
        shuffled = list(tasks)
        random.Random(4).shuffle(shuffled)
        return super().run(stage, shuffled)


def test_shuffled_units_give_the_same_bytes(
    tmp_path: Path, card: str, serial: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.batch, "open_pool", lambda settings: Shuffled(threads=settings.threads))
    assert_same_bytes(serial, explain(SLIDE, card, tmp_path, **ASKED))


@pytest.mark.ray
def test_ray_actors_give_the_same_bytes(
    tmp_path: Path, card: str, serial: RunReport, three_actors: PoolSettings
) -> None:
    """Three, that is; one does in `test_explain_flow`."""
    report = explain(SLIDE, card, tmp_path, pool=three_actors, **ASKED)
    assert "ray local, 3 CPU actors" in report.pool
    assert_same_bytes(serial, report)


@pytest.mark.parametrize("other", [{"batch": 1}, {"batch": 3}, {"unit": 32, "batch": 32}])
def test_other_batches_agree(tmp_path: Path, card: str, serial: RunReport, other: dict[str, int]) -> None:
    assert_close(serial, explain(SLIDE, card, tmp_path, **{**ASKED, **other}))


def test_another_thread_count_agrees(tmp_path: Path, card: str, serial: RunReport) -> None:
    threads = torch.get_num_threads()
    try:
        report = explain(SLIDE, card, tmp_path, pool=PoolSettings(kind="serial", threads=2), **ASKED)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert_close(serial, report)
