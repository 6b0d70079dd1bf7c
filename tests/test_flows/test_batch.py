"""Several images of one run: duplicates, strictness, and what earlier runs left in the same folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.settings import with_threads
from schemas.heatmap import HeatmapSpec
from schemas.run import PoolSettings, RunReport
from tests.test_flows.networks import write_factory_card
from tests.test_flows.runs import explain, heatmap_of
from workers.store.heatmap import HeatmapStore

SLIDE = "procedural:slide?width=900&height=700&tissue=0.5&seed=5"
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_factory_card(
        tmp_path_factory.mktemp("card"), "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(128, 128), mpp=0.5,
    )  # fmt: skip


def rows(folder: Path, *lines: str) -> str:
    (folder / "list.csv").write_text("\n".join(["image,mpp", *lines]) + "\n")
    return str(folder / "list.csv")


def picture(path: Path) -> str:
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (300, 400, 3), np.uint8)).save(path)
    return str(path)


def test_one_content_is_explained_once_whatever_its_name_or_pixel_size(card: str, tmp_path: Path) -> None:
    one = picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(Path(one).read_bytes())
    listed = rows(tmp_path, f"{one},0.5", f"{tmp_path / 'b.png'},0.5", f"{one},0.5", f"{one},0.49")
    report = explain(listed, card, tmp_path / "out", tissue="none", fresh=True)
    assert [image.status for image in report.images] == ["complete", *["duplicate"] * 3]
    assert all(one in image.error for image in report.images[1:])
    assert report.exit_code == 0


def test_a_target_that_only_a_second_row_asks_for_is_said_not_to_be_explained(
    card: str, tmp_path: Path
) -> None:
    one = picture(tmp_path / "a.png")
    asked = [f"{one},0.5,{target}" for target in ("r", "g", "0", "purple")]
    asked += [f"{SLIDE},,", f"{SLIDE},,b"]
    (tmp_path / "list.csv").write_text("\n".join(["image,mpp,target", *asked]) + "\n")
    report = explain(str(tmp_path / "list.csv"), card, tmp_path / "out", tissue="none", fresh=True)
    first, green, same, unknown, every, blue = report.images
    assert [(image.status, [c.target for c in image.channels]) for image in (first, every)] == [
        ("complete", ["r"]),
        ("complete", ["r", "g", "b"]),
    ]
    assert (green.status, same.status, unknown.status, blue.status) == (
        "failed", "duplicate", "failed", "duplicate"
    )  # fmt: skip
    assert "nothing is explained for g; an image has one folder in OUT" in green.error
    assert "--target r,g" in green.error
    assert "--target purple: no class of this model" in unknown.error


def test_strict_stops_and_says_what_was_not_begun(card: str, tmp_path: Path) -> None:
    images = (str(tmp_path / "none.svs"), SLIDE)
    report = explain(images, card, tmp_path / "out", strict=True)
    assert [image.status for image in report.images] == ["failed", "not started"]
    assert report.exit_code == 1


def test_a_run_keeps_what_an_earlier_one_said_of_other_images(card: str, tmp_path: Path) -> None:
    other = SLIDE.replace("seed=5", "seed=6")
    explain(SLIDE, card, tmp_path / "out")
    second = explain(other, card, tmp_path / "out")
    assert [image.image for image in second.images] == [other]
    written = RunReport.model_validate_json((tmp_path / "out" / "run.json").read_text())
    assert [image.image for image in written.images] == [SLIDE, other]
    explain(SLIDE, card, tmp_path / "out")
    written = RunReport.model_validate_json((tmp_path / "out" / "run.json").read_text())
    assert sorted(image.image for image in written.images) == sorted([SLIDE, other])


def test_a_heatmap_never_outlives_its_tiles(card: str, tmp_path: Path) -> None:
    first = explain(SLIDE, card, tmp_path / "out", tissue="none", heatmap=HeatmapSpec(downsample=8))
    HeatmapStore.open(heatmap_of(first).path, "r+").image(0)[:] = (
        7.0  # what a stale block would go on showing
    )
    shutil.rmtree(Path(first.images[0].output) / "tiles.zarr")
    again = explain(SLIDE, card, tmp_path / "out", tissue="none", heatmap=HeatmapSpec(downsample=8))
    assert again.images[0].provenance["tiles_this_run"] == first.images[0].provenance["tiles_this_run"] > 0
    assert (Path(first.images[0].output) / "heatmap.ome.zarr.old-1").is_dir()
    assert not (heatmap_of(again).image(0)[:] == 7.0).any()


def test_serial_takes_all_cores_and_an_actor_one_whoever_asks() -> None:
    assert with_threads(PoolSettings(kind="serial")).threads == os.cpu_count()
    assert with_threads(PoolSettings(kind="ray")).threads == 1
    assert with_threads(PoolSettings(kind="serial", threads=3)).threads == 3
