"""The main job through Prefect and Ray: what is recorded, what fails alone, what an inbox gives up, what a loss costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import prefect.artifacts
import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun

import flows.explain
from flows.batch import explain_batch
from flows.explain import NotComplete, explain, scan_inbox
from flows.inbox import move, settled
from flows.progress import LISTENER, Event
from flows.settings import resolve_pool
from schemas.errors import SpecError
from schemas.run import ExplainRequest, PoolSettings, RunReport
from tests.test_flows.networks import write_convnet_card, write_factory_card
from tests.test_flows.runs import explain as explain_directly
from tests.test_flows.runs import heatmap_of, stored_bytes

DATA = Path(__file__).parents[1] / "data"
SLIDE = DATA / "CMU-1-Small-Region.svs"
PROCEDURAL = "procedural:slide?width=1501&height=1003&tissue=0.5&seed=4"
TRUNCATED = DATA / "slides_bad" / "CMU-1-Small-Region.truncated.svs"
CT, MR = DATA / "totalseg_ct_3mm_slab30.nii.gz", DATA / "mni152_2009a_t1_1mm.nii.gz"
SERIAL = PoolSettings(kind="serial", threads=1)
RAY = PoolSettings(kind="ray", workers=1, threads=1)

pytestmark = [pytest.mark.prefect, pytest.mark.usefixtures("prefect_session", "no_pictures")]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_convnet_card(tmp_path_factory.mktemp("card"), "slide", tile=(224, 224), mpp=1.0)


@pytest.fixture(scope="module")
def slow_card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_factory_card(
        tmp_path_factory.mktemp("card"), "slow_pooled_channels", {"cell": 16, "seconds": 0.2}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(64, 64), mpp=0.5, scale=(0.0, 255.0),
    )  # fmt: skip


def flow_run(name: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"name": {"any_": [name]}})
        )
    return run


def task_runs(run: FlowRun) -> dict[str, TaskRun]:
    """By name, once all have ended: their states travel as events, and arrive a little later."""
    deadline = time.monotonic() + 30
    while True:
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(
                flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}),
                task_run_filter=TaskRunFilter(),
            )
        if found and all(task.state is not None and task.state.is_final() for task in found):
            return {task.name: task for task in found}
        assert time.monotonic() < deadline, [(task.name, task.state) for task in found]
        time.sleep(0.2)


def artifacts(run: FlowRun) -> dict[str, Artifact]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        )
    return {artifact.key or "": artifact for artifact in found}


def run_flow(
    name: str, images: tuple[str, ...], card: str, out: Path, pool: PoolSettings, **asked: Any
) -> RunReport:
    request = ExplainRequest(images=images, model=card, out=str(out), **asked)
    report: RunReport = explain.with_options(flow_run_name=name)(request, pool)
    return report


@pytest.fixture(scope="module")
def told() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def report(
    card: str, told: list[Event], ray_session: None, prefect_session: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunReport:  # fmt: skip
    before = LISTENER.set(told.append)
    try:
        images = (str(SLIDE), str(TRUNCATED), PROCEDURAL)
        return run_flow("a-batch", images, card, tmp_path_factory.mktemp("out"), RAY, overlap=0.3)
    finally:
        LISTENER.reset(before)


class TestABatch:
    """Two good slides and a bad one between them, through Prefect and Ray."""

    def test_the_bad_one_fails_alone(self, report: RunReport) -> None:
        assert [image.status for image in report.images] == ["complete", "failed", "complete"]
        assert report.exit_code == 1
        assert report.pool.startswith("ray")
        for position in (0, 2):
            counts = report.images[position].counts
            assert counts is not None
            assert counts.done == counts.planned > 5
            assert heatmap_of(report, position).info.complete

    def test_a_task_run_an_image(self, report: RunReport) -> None:
        run = flow_run("a-batch")
        assert run.state_name == "Completed"
        tasks = task_runs(run)
        assert {name: task.state_name for name, task in tasks.items()} == {
            "CMU-1-Small-Region.svs": "Completed",
            "CMU-1-Small-Region.truncated.svs": "Failed",
            "procedural:slide": "Completed",
        }
        state = tasks["CMU-1-Small-Region.truncated.svs"].state
        assert state is not None
        assert state.message == report.images[1].error
        assert "copy it again" in report.images[1].error

    def test_artifacts(self, report: RunReport) -> None:
        found = artifacts(flow_run("a-batch"))
        assert found.keys() == {
            "explain-cmu-1-small-region-svs",
            "explain-cmu-1-small-region-truncated-svs",
            "explain-procedural-slide",
            "explain-batch",
            "explain-dead-letter",
        }
        for key in ("explain-cmu-1-small-region-svs", "explain-procedural-slide"):
            assert found[key].type == "progress"
            assert found[key].data == 100.0
        assert found["explain-cmu-1-small-region-truncated-svs"].data == 0.0
        table = found["explain-batch"].data
        rows: list[dict[str, Any]] = json.loads(table) if isinstance(table, str) else table  # type: ignore[assignment]
        assert [(row["image"], row["status"]) for row in rows] == [
            (Path(image.image).name, image.status) for image in report.images
        ]
        dead = str(found["explain-dead-letter"].data)
        assert report.images[1].error in dead
        assert dead.count("- **") == 1

    def test_who_watches_is_told(self, report: RunReport, told: list[Event]) -> None:
        ends = {event.image: event.stage for event in told}
        assert ends == {
            "CMU-1-Small-Region.svs": "complete",
            "CMU-1-Small-Region.truncated.svs": "failed",
            "procedural:slide": "complete",
        }
        assert any(event.stage == "explain" and event.done == event.total > 5 for event in told)

    def test_the_same_bytes_as_here_in_order(self, report: RunReport, card: str, tmp_path: Path) -> None:
        here = explain_directly(PROCEDURAL, card, tmp_path, overlap=0.3)
        for store in ("tiles.zarr", "heatmap.ome.zarr"):
            ours = stored_bytes(Path(report.images[2].output) / store)
            assert ours == stored_bytes(Path(here.images[0].output) / store)
            assert len(ours) > 10


def test_strict_ends_in_a_failed_flow(card: str, tmp_path: Path) -> None:
    images = (str(tmp_path / "absent.svs"), PROCEDURAL)
    with pytest.raises(NotComplete) as failure:
        run_flow("a-strict-run", images, card, tmp_path / "out", SERIAL, strict=True)
    assert [image.status for image in failure.value.report.images] == ["failed", "not started"]
    state = flow_run("a-strict-run").state
    assert state is not None
    assert state.name == "Failed"
    assert "--strict: 2 of 2 images are not complete" in str(state.message)


def test_images_of_one_name_are_kept_apart(card: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "é.svs").write_bytes(folder.encode())
    images = tuple(str(tmp_path / folder / "é.svs") for folder in ("a", "b"))
    report = run_flow("two-of-a-name", images, card, tmp_path / "out", SERIAL)
    assert [image.status for image in report.images] == ["failed", "failed"]
    run = flow_run("two-of-a-name")
    assert task_runs(run).keys() == {"é.svs (1)", "é.svs (2)"}
    assert len([a for a in artifacts(run).values() if a.type == "progress"]) == 2


def test_volumes_come_back_on_their_own_affine(tmp_path: Path) -> None:
    card = write_convnet_card(
        tmp_path / "card", "volume", tile=(32, 32, 32), spacing_mm=(3.0, 3.0, 3.0), scale=(0.0, 1000.0)
    )
    report = run_flow("volumes", (str(CT), str(MR)), card, tmp_path / "out", SERIAL)
    assert [image.status for image in report.images] == ["complete", "complete"]
    for image in report.images:
        assert image.counts is not None
        assert image.counts.done == image.counts.planned > 3
        source: Any = nib.load(image.image)
        heat: Any = nib.load(Path(image.output) / "heatmap.nii.gz")
        assert heat.shape[:3] == source.shape[:3]
        np.testing.assert_array_equal(heat.affine, source.affine)
        assert nib.aff2axcodes(heat.affine) == nib.aff2axcodes(source.affine)
        assert heat.header["qform_code"] == source.header["qform_code"]
        assert heat.header["sform_code"] == source.header["sform_code"]
        values = np.asanyarray(heat.dataobj)
        assert np.isfinite(values).any()
        assert np.nanstd(values) > 0


class TestInbox:
    @pytest.fixture
    def inbox(self, tmp_path: Path) -> Path:
        folder = tmp_path / "inbox"
        folder.mkdir()
        return folder

    def put(self, source: Path, place: Path, age_s: float = 3600.0) -> Path:
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
        then = time.time() - age_s
        for path in [place, *place.rglob("*")]:
            os.utime(path, (then, then))
        return place

    def test_what_is_complete_leaves_and_what_is_on_its_way_stays(
        self, inbox: Path, card: str, tmp_path: Path
    ) -> None:
        small, done = DATA / "small_16x16.svs", tmp_path / "done"
        self.put(small, inbox / "whole.svs")
        self.put(TRUNCATED, inbox / "damaged.svs")
        self.put(DATA / "boxes_4levels.tiff", inbox / "arriving.tiff", age_s=5.0)
        (inbox / "notes.txt").write_text("no image")

        def scan() -> RunReport | None:
            report: RunReport | None = scan_inbox(
                str(inbox), card, str(tmp_path / "out"), str(done), settle_s=60.0, pool=SERIAL
            )
            return report

        first = scan()
        assert first is not None
        assert {Path(i.image).name: i.status for i in first.images} == {
            "damaged.svs": "failed",
            "whole.svs": "complete",
        }
        assert sorted(p.name for p in inbox.iterdir()) == ["arriving.tiff", "damaged.svs", "notes.txt"]
        assert (done / "whole.svs").read_bytes() == small.read_bytes()
        (inbox / "damaged.svs").unlink()
        assert scan() is None

    def test_nothing_in_it(self, inbox: Path, card: str, tmp_path: Path) -> None:
        assert scan_inbox(str(inbox), card, str(tmp_path / "out")) is None
        assert not (tmp_path / "out").exists()

    def test_no_inbox(self, card: str, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="not a folder"):
            scan_inbox(str(tmp_path / "absent"), card, str(tmp_path / "out"))

    def test_a_series_is_one_entry_and_arrives_whole(self, inbox: Path) -> None:
        names = sorted(p.name for p in (DATA / "dicom_ct_series").iterdir())
        for name in names:
            self.put(DATA / "dicom_ct_series" / name, inbox / name)
        self.put(DATA / "dicom_ct_series", inbox / "another")
        (whole, loose), waiting = sorted_entries(inbox)
        assert [p.name for p in whole.paths] == ["another"]
        assert whole.images == (str(inbox / "another"),)
        assert [p.name for p in loose.paths] == names
        assert loose.images == (str(inbox / names[0]),)
        assert waiting == 0
        os.utime(inbox / names[-1])
        os.utime(inbox / "another" / names[0])
        assert settled(inbox, 60.0) == ([], 2)

    def test_a_mirax_slide_takes_its_folder_along(self, inbox: Path, tmp_path: Path) -> None:
        (inbox / "a").mkdir()
        (inbox / "a" / "Slidedat.ini").write_text("")
        (inbox / "a.mrxs").write_text("")
        (entry,), _ = settled(inbox, -60.0)
        assert entry.images == (str(inbox / "a.mrxs"),)
        move(entry, tmp_path / "done")
        assert list(inbox.iterdir()) == []
        assert sorted(p.name for p in (tmp_path / "done").iterdir()) == ["a", "a.mrxs"]

    def test_nothing_is_written_over(
        self, inbox: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "done").mkdir()
        (tmp_path / "done" / "a.svs").write_text("the earlier one")
        (inbox / "a.svs").write_text("another")
        (entry,), _ = settled(inbox, -60.0)
        move(entry, tmp_path / "done")
        assert (inbox / "a.svs").read_text() == "another"
        assert (tmp_path / "done" / "a.svs").read_text() == "the earlier one"
        assert "stays" in caplog.text


def sorted_entries(inbox: Path) -> Any:
    ready, waiting = settled(inbox, 60.0)
    return sorted(ready, key=lambda entry: len(entry.paths)), waiting


@pytest.mark.parametrize("lost", ["every call", "updates"])
def test_losing_prefect_does_not_stop_the_work(
    card: str, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        msg = "All connection attempts failed"
        raise ConnectionError(msg)

    calls = ["update_progress_artifact"]
    if lost == "every call":
        calls += [name for name in vars(prefect.artifacts) if name.startswith("create_")]
    for name in calls:
        monkeypatch.setattr(flows.explain, name, unreachable, raising=False)
    report = run_flow("cut-off", (PROCEDURAL, str(TRUNCATED)), card, tmp_path, SERIAL)
    assert [image.status for image in report.images] == ["complete", "failed"]
    assert "not shown in Prefect: All connection attempts failed" in caplog.text


@contextmanager
def interrupted_once(reached: threading.Event) -> Iterator[None]:
    """A Ctrl-C as soon as `reached`."""

    def press() -> None:
        if reached.wait(120):
            os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    yield
    finger.join()


@pytest.mark.parametrize("way", ["direct", "Prefect"])
def test_an_interrupt_ends_the_run_at_once(
    slow_card: str, tmp_path: Path, ray_session: None, way: str
) -> None:
    images = tuple(f"procedural:slide?width=2003&height=2003&seed={seed}" for seed in range(3))
    asked = {"unit": 4, "tissue": "none", "batch": 4}
    computing = threading.Event()

    def tell(event: Event) -> None:
        if event.stage == "explain" and event.done:
            computing.set()

    with interrupted_once(computing):
        if way == "direct":
            request = ExplainRequest(images=images, model=slow_card, out=str(tmp_path), **asked)
            report = explain_batch(request, RAY, tell)
        else:
            before = LISTENER.set(tell)
            with pytest.raises(NotComplete, match="interrupted: 3 of 3") as end:
                run_flow("interrupted", images, slow_card, tmp_path, RAY, **asked)
            LISTENER.reset(before)
            report = end.value.report
            assert flow_run("interrupted").state_name == "Failed"
    assert [image.status for image in report.images] == ["interrupted"] * 3
    assert report.exit_code == 130
    # 256 units of 0.2 s each: nobody waited for them
    assert report.seconds < 30
    assert RunReport.model_validate_json((tmp_path / "run.json").read_text()).exit_code == 130


class TestResolvePool:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RAY_ADDRESS", "PREFECT_API_URL"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("kind", ["serial", "ray"])
    def test_what_is_asked_is_done(self, kind: Any) -> None:
        asked = PoolSettings(kind=kind, workers=3)
        assert resolve_pool(asked, 5) == (asked, f"{kind}, as asked")

    def test_one_image_needs_no_cluster(self) -> None:
        settings, why = resolve_pool(PoolSettings(threads=2), 1)
        assert settings == PoolSettings(kind="serial", threads=2)
        assert "one image" in why

    def test_several_images_share_one(self) -> None:
        settings, why = resolve_pool(PoolSettings(), 2)
        assert settings.kind == "ray"
        assert "2 images" in why

    def test_an_address_is_taken_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings, why = resolve_pool(PoolSettings(address="10.0.0.1:6379"), 1)
        assert settings == PoolSettings(kind="ray", address="10.0.0.1:6379")
        assert "--ray-address" in why
        for name in ("RAY_ADDRESS", "PREFECT_API_URL"):
            with monkeypatch.context() as patched:
                patched.setenv(name, "somewhere")
                settings, why = resolve_pool(PoolSettings(), 1)
            assert settings.kind == "ray"
            assert name in why


def test_the_command_line_shows_progress_and_keeps_its_output_clean(
    card: str, prefect_session: str, tmp_path: Path
) -> None:
    words = ["explain", PROCEDURAL, str(TRUNCATED), "--model", card, "--out", str(tmp_path), "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, "--pool", "serial"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PREFECT_API_URL": prefect_session, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    report = RunReport.model_validate_json(run.stdout)
    assert [image.status for image in report.images] == ["complete", "failed"]
    first, *lines = run.stderr.splitlines()
    assert "Prefect" in first
    events = [json.loads(line) for line in lines]
    assert {event["stage"] for event in events} >= {
        "probe",
        "plan",
        "explain",
        "publish",
        "complete",
        "failed",
    }
