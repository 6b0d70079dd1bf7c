"""`gigacam export`, and `explain --export`: exit codes, what is said, where files lie."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from flows.tables import report_lines
from schemas.export import ExportReport
from schemas.run import ImageReport, RunReport
from tests.test_flows.networks import write_bag_card, write_factory_card
from workers.store.bags import Bag
from workers.store.tiles import TilesStore

SLIDE = "procedural:slide?width=512&height=256&seed=1"
Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def gigacam(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    at_sigterm = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    yield run
    signal.signal(signal.SIGTERM, at_sigterm)


@pytest.fixture
def explain(gigacam: Run, tmp_path: Path) -> Run:
    card = write_factory_card(
        tmp_path / "card", "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(64, 64), mpp=1.0,
    )  # fmt: skip

    def run(*words: str) -> tuple[int, str, str]:
        return gigacam(
            "explain", SLIDE, "--model", card, "--out", str(tmp_path / "out"), "--tissue", "none",
            "--direct", "--pool", "serial", "--threads", "1", *words,
        )  # fmt: skip

    return run


def test_exports_are_made_with_the_image_and_asked_for_again(
    explain: Run, gigacam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = explain("--export", "csv,qupath", "--json")
    assert code == 0
    (image,) = RunReport.model_validate_json(out).images
    assert [(e.name, e.error, len(e.files)) for e in image.exports] == [
        ("csv", "", 1), ("ome-tiff", "", 1), ("qupath", "", 1),
    ]  # fmt: skip
    folder = Path(image.output) / "export"
    assert sorted(p.name for p in folder.iterdir()) == [
        "heatmap.ome.tif", "qupath_overlay.groovy", "tiles.csv",
    ]  # fmt: skip
    stamp = (folder / "tiles.csv").stat().st_mtime_ns
    (
        folder.parent / "overview.png"
    ).touch()  # no pictures are drawn here, and without one a run is not finished

    # What is there is not made again; a format more is.
    code, out, _ = explain("--export", "csv,geojson", "--json")
    (image,) = RunReport.model_validate_json(out).images
    assert [e.name for e in image.exports] == ["csv", "ome-tiff", "qupath", "geojson"]
    assert (folder / "tiles.csv").stat().st_mtime_ns == stamp

    # Stitched otherwise: what was exported no longer holds and is set aside.
    code, _, _ = explain("--importance", "flat")
    assert code == 0
    assert not folder.exists()
    assert (folder.parent / "export.old-1" / "tiles.csv").exists()

    # The command: for people, for machines, of the whole folder or of one image.
    out_folder = str(tmp_path / "out")
    code, out, err = gigacam("export", out_folder, "--to", "csv,geojson", "--threshold", "0.001")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["csv", "geojson"]
    code, out, _ = gigacam("export", str(folder.parent), "--to", "rgba", "--channel", "1", "--json")
    (report,) = json.loads(out)
    assert code == 0
    assert (report["image_id"], report["name"], len(report["files"])) == (folder.parent.name, "rgba", 1)

    # One format fails, the others are written.
    code, out, err = gigacam("export", out_folder, "--to", "csv,rgba", "--channel", "nobody")
    assert code == 1
    assert "--channel nobody" in err
    code, out, err = gigacam("export", out_folder, "--to", "nifti")
    assert code == 2
    assert "a slide has no nifti export; it is for volumes" in err

    # What refers to a file that could not be written is not written either; an earlier such file may lie there.
    (folder / "heatmap.ome.tif").touch()
    monkeypatch.setattr("workers.export.ome_tiff.write", lambda *_: 1 / 0)
    code, out, err = gigacam("export", out_folder, "--to", "qupath,csv")
    assert code == 1
    assert "qupath refers to ome-tiff, which could not be written" in err
    assert not (folder / "qupath_overlay.groovy").exists()
    assert [line.split()[0] for line in out.splitlines()] == ["csv"]


def test_a_failing_export_ends_with_1_and_leaves_the_image_complete(
    explain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.export.tile_table.tile_rows", lambda *_: 1 / 0)
    code, out, _ = explain("--export", "csv,ome-tiff", "--json")
    (image,) = RunReport.model_validate_json(out).images
    assert (code, image.status) == (1, "complete")
    assert [(e.name, e.error) for e in image.exports] == [
        ("csv", "ZeroDivisionError: division by zero"), ("ome-tiff", ""),
    ]  # fmt: skip
    monkeypatch.undo()
    code, out, _ = explain("--export", "csv,ome-tiff", "--json")
    (image,) = RunReport.model_validate_json(out).images
    assert code == 0
    assert {e.name: e.error for e in image.exports} == {"ome-tiff": "", "csv": ""}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "ome-tif"), "export 'ome-tif': unknown; the formats are"),
        ((), "--to: names no format; the formats are\n  csv "),
        (("--to", "csv"), "holds no explained image; give the --out folder"),
        (("--to", "csv", "--max-regions", "0"), "--max-regions 0"),
    ],
)
def test_a_wrong_request_ends_with_2(gigacam: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, _, err = gigacam("export", str(tmp_path), *words)
    assert code == 2
    assert said in err


def test_an_address_is_that_of_one_output_folder(gigacam: Run, tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a/one", "a/two", "b/one")]
    for image in images:
        (image / "heatmap.ome.zarr").mkdir(parents=True)
    asked = ("--to", "neuroglancer", "--url", "http://127.0.0.1:8000/raw/0")
    code, _, err = gigacam("export", str(tmp_path / "a"), str(tmp_path / "b"), *asked)
    assert code == 2
    assert "is the address of one output folder, and 2 are named" in err
    code, _, err = gigacam("export", *map(str, images[:2]), *asked)  # images of one folder
    assert code == 1
    assert err.count("no heatmap") == 2


def test_an_unknown_format_is_refused_before_anything_is_computed(explain: Run, tmp_path: Path) -> None:
    code, _, err = explain("--export", "tiff")
    assert code == 2
    assert "export 'tiff': unknown; the formats are" in err
    assert not (tmp_path / "out").exists()


def test_relevance_of_a_bag_and_maps_inside_some_of_its_tiles_are_in_the_table(
    gigacam: Run, tmp_path: Path
) -> None:
    card = write_bag_card(tmp_path / "card", "abmil_gated", args={"hidden": 4, "size": 4})
    code, out, _ = gigacam(
        "explain", SLIDE, "--model", card, "--out", str(tmp_path / "out"), "--tissue", "none", "--inside", "0.5",
        "--bag-method", "contribution", "--method", "hirescam", "--export", "csv,geojson", "--json",
        "--direct", "--pool", "serial", "--threads", "1",
    )  # fmt: skip
    assert code == 0
    (image,) = RunReport.model_validate_json(out).images
    folder = Path(image.output)
    with (folder / "export" / "tiles.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    tiles = TilesStore.open(folder / "tiles.zarr")
    bag = Bag(tiles.path, tiles.info)
    every = np.arange(tiles.info.tiles)
    target = image.channels[0].target
    relevance = [float(row[f"contribution:{target} [logit]"]) for row in rows]
    np.testing.assert_array_equal(np.array(relevance, np.float32), bag.relevance("contribution", 0, every))
    inside = [row[f"hirescam:{target} max [logit]"] != "" for row in rows]
    assert inside == bag.inside(every).tolist()
    assert 0 < sum(inside) < len(inside)
    features = json.loads((folder / "export" / "regions.geojson").read_text())["features"]
    detections = [f["properties"] for f in features if f["properties"]["objectType"] == "detection"]
    assert len(detections) == len(rows)
    assert detections[0]["measurements"][f"contribution:{target} [logit]"] == relevance[0]


def test_a_failed_export_is_in_the_summary() -> None:
    failed = ExportReport(image_id="a", name="csv", error="why")
    image = ImageReport(image="a.svs", status="complete", exports=(failed,))
    report = RunReport(images=(image,), pool="serial", seconds=1, versions={})
    assert report.exit_code == 1
    assert "export csv failed: why" in "\n".join(report_lines(report, "out"))


def test_an_interrupt_ends_with_130(gigacam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slide-0" / "heatmap.ome.zarr").mkdir(parents=True)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.export.export_image", interrupted)
    assert gigacam("export", str(tmp_path), "--to", "csv")[0] == 130
