"""Methods of the whole image along the whole path: one direction, the same bits wherever and however often it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from zarr.storage import LocalStore

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.heatmap import HeatmapSpec
from schemas.image import ImageRequest
from schemas.run import ExplainRequest, GroupTask, PoolSettings, Report, RunReport
from tests.test_flows.networks import write_convnet_card
from tests.test_flows.runs import explain, stored_bytes, tiles_of
from tests.test_flows.test_resume import DyingDisk, Killed
from workers.costs import summarise
from workers.explainer import ExplainInit, tiles_per_second
from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.planner import open_model, plan_image
from workers.pool import Task
from workers.readers import open_image
from workers.reducer import Collector, Solver
from workers.store.reductions import GROUPS_MOST, Reductions
from workers.store.tiles import TilesStore

SLIDE = "procedural:slide?width=1501&height=1003&tissue=0.5&seed=7"
METHODS = ("gradcam", "eigencam_slide", "eigengradcam_slide+centred=true")
ASKED: dict[str, Any] = {
    "methods": METHODS,
    "unit": 3,
    "batch": 2,
    "tissue": "none",
    "heatmap": HeatmapSpec(downsample=4),
}
STORES = ("tiles.zarr", "heatmap.ome.zarr")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_convnet_card(tmp_path_factory.mktemp("card"), "slide", tile=(128, 128), mpp=1.0)


@pytest.fixture(scope="module")
def written() -> list[str]:
    """What the serial run writes, in order."""
    return []


@pytest.fixture(scope="module")
def serial(card: str, written: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    out = tmp_path_factory.mktemp("serial")
    write = LocalStore.set

    async def noted(self: LocalStore, key: str, value: Any) -> None:
        written.append(str((self.root / key).relative_to(out)))
        await write(self, key, value)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LocalStore, "set", noted)
        report = explain(SLIDE, card, out, **ASKED)
    assert report.images[0].status == "complete"
    assert tiles_of(report).info.units == 8
    return report


@pytest.fixture
def groups_collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups that are summed from now on."""
    groups = []
    run = Collector.run

    def counted(self: Collector, task: Task) -> Report:
        assert isinstance(task, GroupTask)
        groups.append(task.group)
        return run(self, task)

    monkeypatch.setattr(Collector, "run", counted)
    return groups


def folder_of(report: RunReport) -> Path:
    return Path(report.images[0].output)


def sums_of(report: RunReport) -> Reductions:
    tiles = tiles_of(report)
    return Reductions(tiles.path, tiles.info)


def assert_same_stores(one: Path, other: Path) -> None:
    for store in STORES:
        a, b = stored_bytes(one / store), stored_bytes(other / store)
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name]] == []


def cells_of(report: RunReport, card: str, rows: NDArray[np.int64]) -> dict[str, list[NDArray[np.float64]]]:
    """`(K, Z)` of some tiles, by hand: read one by one, no pool, no store; by method and target."""
    info = tiles_of(report).info
    model = load_model(load_card(card), layer=info.spec.cam.layer, tile=info.spec.grid.tile_px)
    reader = open_image(info.image.uri, info.spec.read)
    found: dict[str, list[NDArray[np.float64]]] = {"": [], "0": [], "1": []}
    for start, stop in tiles_of(report).boxes(rows).tolist():
        box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
        pixels, _ = reader.read(box, info.lattice.tile_px, info.lattice.level)
        split = model.net.forward(model.prepare(pixels[None]))
        a = split.activations.detach().double()[0].flatten(1)
        found[""].append(a.numpy())
        for target in (0, 1):
            g = model.net.grad(split.scores[:, target], split.activations, retain=True)[0].flatten(1)
            found[str(target)].append((a * g.double()).numpy())
    reader.close()
    return found


def dense(m: NDArray[np.float64], centred: bool) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Direction with its sign, mean, and explained share of the cells of a whole image `(cells, K)`."""
    mean = m.mean(axis=0) if centred else np.zeros(m.shape[1])
    _, singular, vectors = np.linalg.svd(m - mean, full_matrices=False)
    v = vectors[0]
    v = v if ((m - mean) @ v * (m - mean).sum(axis=1)).sum() > 0 else -v
    return v, mean, float(singular[0] ** 2 / (singular**2).sum())


def assert_dense(report: RunReport, card: str, method: str, entered: NDArray[np.int64]) -> None:
    """State and maps are those of the singular vectors of all cells of the tiles that entered."""
    info = tiles_of(report).info
    rows = np.flatnonzero(tiles_of(report).done_rows())
    cells = cells_of(report, card, rows)
    gradient, centred = "grad" in method, "centred" in method
    states = {s.target: s for s in report.images[0].states if s.method == method}
    assert list(states) == (list(info.spec.cam.targets) if gradient else [""])
    for target, name in enumerate(info.spec.cam.targets):
        of = cells[str(target) if gradient else ""]
        m = np.concatenate([tile.T for row, tile in zip(rows, of, strict=True) if row in entered])
        v, mean, explained = dense(m, centred)
        expected = np.stack([(tile.T - mean) @ v for tile in of])
        maps = tiles_of(report).maps_of(method, target, rows).reshape(len(rows), -1)
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        state = states[name if gradient else ""]
        assert state.explained == pytest.approx(explained, rel=1e-4)
        assert (state.tiles, state.planned) == (len(entered), info.planned)


@pytest.mark.parametrize("method", METHODS[1:])
def test_it_is_the_direction_of_all_tiles_at_once(card: str, serial: RunReport, method: str) -> None:
    planned = tiles_of(serial).info.planned
    assert_dense(serial, card, method, np.arange(planned))
    lines = [note for note in serial.images[0].notes if note.startswith(method)]
    assert len(lines) == (2 if "grad" in method else 1)
    assert f"from all {planned} tiles, explains" in lines[0]


def test_a_volume(tmp_path: Path) -> None:
    card = write_convnet_card(tmp_path / "m", "volume", tile=(32, 32, 48), spacing_mm=(1.0, 1.0, 1.0))
    volume = "procedural:volume?shape=48,64,96&spacing=1,1,1&seed=3"
    method = "eigengradcam_slide"
    report = explain(volume, card, tmp_path / "out", methods=(method,), tissue="none", unit=2)
    assert report.images[0].status == "complete"
    assert_dense(report, card, method, np.arange(tiles_of(report).info.planned))


@pytest.mark.ray
def test_ray_actors_give_the_same_bytes(
    tmp_path: Path, card: str, serial: RunReport, three_actors: PoolSettings
) -> None:
    report = explain(SLIDE, card, tmp_path, pool=three_actors, **ASKED)
    assert report.images[0].status == "complete"
    assert_same_stores(folder_of(report), folder_of(serial))
    assert report.images[0].states == serial.images[0].states


def test_nothing_of_the_sums_is_left_behind(serial: RunReport) -> None:
    sums, info = sums_of(serial), tiles_of(serial).info
    assert sums.unsolved() == []
    assert sums.pending_groups() == []
    assert not [name for name in stored_bytes(sums.path) if name.startswith("collected/") and "/c/" in name]
    assert info.units <= GROUPS_MOST
    assert [row for group in range(info.units) for row in sums.rows(group)] == list(range(info.planned))


@pytest.mark.parametrize(
    ("place", "nth", "left"),
    [("collected/", 0, 8), ("collected/", 8, 6), ("status/collect/c/", 3, 5), ("status/collect/c/", 7, 1),
     ("state/eigencam_slide/c/", 0, 0), ("state/eigengradcam_slide+centred=true/zarr.json", -1, 0)],
)  # fmt: skip
def test_killed_while_it_sums(
    tmp_path: Path,
    card: str,
    serial: RunReport,
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
    groups_collected: list[int],
    place: str,
    nth: int,
    left: int,
) -> None:
    """Killed in a write: what is there is kept, only the rest is computed, and all bytes are the same."""
    # a new store's metadata come first, in a draft
    last = [i for i, key in enumerate(written) if f"/tiles.zarr/{place}" in key][nth]
    with monkeypatch.context() as patched:
        DyingDisk(patched, last)
        with pytest.raises(Killed):
            explain(SLIDE, card, tmp_path / "out", **ASKED)
    tiles = TilesStore.open(tmp_path / "out" / folder_of(serial).name / "tiles.zarr")
    assert len(Reductions(tiles.path, tiles.info).pending_groups()) == left
    groups_collected.clear()
    resumed = explain(SLIDE, card, tmp_path / "out", **ASKED)
    assert resumed.images[0].status == "complete"
    assert groups_collected == list(range(8))[8 - left :]
    assert_same_stores(folder_of(resumed), folder_of(serial))
    assert resumed.images[0].states == serial.images[0].states


def test_a_tile_that_cannot_be_read_is_left_out(
    tmp_path: Path, card: str, serial: RunReport, unreadable: list[list[int]], groups_collected: list[int]
) -> None:
    """The state is of the others; read in a retry, the tile is explained by that same state."""
    row = 10
    planned = tiles_of(serial).info.planned
    others = np.delete(np.arange(planned), row)
    unreadable.append(tiles_of(serial).boxes()[row, 0].tolist())
    report = explain(SLIDE, card, tmp_path, **ASKED)
    image = report.images[0]
    assert image.status == "gaps"
    assert [failure.tile for failure in image.failures] == [row]
    assert any(f"from {planned - 1} of {planned} tiles" in note for note in image.notes)
    for method in METHODS[1:]:
        assert_dense(report, card, method, others)
    state = {name: sums_of(report).state(name) for name in METHODS[1:]}

    unreadable.clear()
    groups_collected.clear()
    again = explain(SLIDE, card, tmp_path, retry_failed=True, **ASKED)
    assert again.images[0].status == "complete"
    assert groups_collected == []
    assert again.images[0].states == image.states
    for method in METHODS[1:]:
        np.testing.assert_array_equal(sums_of(again).state(method), state[method])
        assert_dense(again, card, method, others)

    fresh = explain(SLIDE, card, tmp_path, fresh=True, **ASKED)
    assert groups_collected == list(range(tiles_of(serial).info.units))
    assert_same_stores(folder_of(fresh), folder_of(serial))


def test_no_tile_that_can_be_read(tmp_path: Path, card: str, unreadable: list[list[int]]) -> None:
    first = explain(SLIDE, card, tmp_path / "a", **{**ASKED, "methods": ("gradcam",)})
    unreadable += tiles_of(first).boxes()[:, 0].tolist()
    image = explain(SLIDE, card, tmp_path / "b", **ASKED).images[0]
    assert image.status == "gaps"
    assert image.counts is not None
    assert image.counts.done == 0
    assert all("damaged" in failure.reason for failure in image.failures)
    assert {(state.tiles, state.doubtful) for state in image.states} == {(0, True)}


def test_a_group_that_is_given_up_is_said(
    tmp_path: Path, card: str, serial: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Collector.run

    def broken(self: Collector, task: Task) -> Report:
        if task == GroupTask(group=2):
            raise SourceError("group 2 is cursed")
        return run(self, task)

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "run", broken)
        report = explain(SLIDE, card, tmp_path, **ASKED)
    image = report.images[0]
    assert image.status == "gaps"
    assert image.failed_tasks == ("group 2: group 2 is cursed",)
    assert "group 2 is cursed" in image.error
    rows = sums_of(report).rows(2)
    left = np.setdiff1d(np.arange(tiles_of(report).info.planned), rows)
    assert_dense(report, card, "eigencam_slide", left)
    (folder_of(report) / "report.json").unlink()
    again = explain(SLIDE, card, tmp_path, **ASKED).images[0]
    assert again.status == "gaps"
    assert "group 2: given up by an earlier run" in again.error
    assert again.states == image.states
    assert again.states != serial.images[0].states


def test_what_cannot_be_solved_fails_the_image_and_goes_on_there(
    tmp_path: Path,
    card: str,
    serial: RunReport,
    monkeypatch: pytest.MonkeyPatch,
    groups_collected: list[int],
) -> None:
    def broken(self: Solver, task: Task) -> Report:
        raise SourceError("no memory left to solve")

    with monkeypatch.context() as patched:
        patched.setattr(Solver, "run", broken)
        image = explain(SLIDE, card, tmp_path, **ASKED).images[0]
    assert image.status == "failed"
    assert "state of eigencam_slide: no memory left to solve" in image.error
    groups_collected.clear()
    report = explain(SLIDE, card, tmp_path, **ASKED)
    assert groups_collected == []
    assert_same_stores(folder_of(report), folder_of(serial))


def test_more_units_than_groups(tmp_path: Path, card: str, groups_collected: list[int]) -> None:
    report = explain(SLIDE, card, tmp_path, **{**ASKED, "methods": METHODS[1:2], "unit": 1, "overlap": 0.3})
    info = tiles_of(report).info
    assert info.units == info.planned > GROUPS_MOST
    assert groups_collected == list(range(GROUPS_MOST))
    sums = sums_of(report)
    assert [row for group in range(GROUPS_MOST) for row in sums.rows(group)] == list(range(info.planned))
    assert_dense(report, card, METHODS[1], np.arange(info.planned))


def test_the_plan_counts_two_passes(tmp_path: Path, card: str) -> None:
    settings = PoolSettings(kind="serial")

    def planned(*methods: str) -> Any:
        request = ExplainRequest(
            images=(SLIDE,), model=card, out=str(tmp_path), methods=methods, tissue="none", unit=4, batch=4
        )
        model = open_model(request)
        job = plan_image(ImageRequest(uri=SLIDE), request, model)
        return summarise(job, request, model, settings)

    one, two = planned("gradcam"), planned("gradcam", "eigencam_slide")
    assert two.batches == 2 * one.batches
    channels = 24
    sums = 8 * (channels + 1) ** 2 * min(one.units, GROUPS_MOST)
    assert two.tiles_bytes - one.tiles_bytes > sums
    assert any(
        "eigencam_slide: every tile is read and goes through the network twice" in n for n in two.notes
    )
    assert not any("twice" in note for note in one.notes)


def test_a_rate_is_measured_without_a_state(tmp_path: Path, card: str) -> None:
    request = ExplainRequest(
        images=(SLIDE,), model=card, out=str(tmp_path), methods=METHODS, tissue="none", batch=2
    )
    job = plan_image(ImageRequest(uri=SLIDE), request, open_model(request))
    assert tiles_per_second(job.tiles, ExplainInit(tiles="", tiles_id="", model=card), job.plan.boxes[:2]) > 0
