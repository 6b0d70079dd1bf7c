"""Damaged and odd slides among good ones: each ends as one clear line, the others are done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from flows.cli import app
from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.heatmap import Coverage, TileStatus
from schemas.run import ImageReport, RunReport
from tests.test_flows.networks import write_densenet_card
from tests.test_flows.runs import explain, heatmap_of, stored_bytes, tiles_of, values_of
from workers.readers.slide import SlideReader
from workers.stitching.blend import px_range

DATA = Path(__file__).parents[1] / "data"
GOOD = DATA / "CMU-1-Small-Region.svs"
ONE_BAD = DATA / "slides_bad" / "CMU-1-Small-Region.one-bad-tile.svs"
ZEROED = ((1440, 1680), (960, 1200))
"""Rows and columns of level 0 that lie in the zeroed tile of the file (column 4, row 6, 240 px each)."""
MPP = 0.499

BAD = {
    "CMU-1-Small-Region.truncated.svs": (r"truncated or not a slide", r"copy it again"),
    "CMU-1-Small-Region.webp.tiff": (r"0\.00499 .* is implausible", r"--mpp"),
    "broken_not_a_tiff.svs": (r"truncated or not a slide", r"copy it again"),
    "unopenable.tiff": (r"cannot be decoded .* 52479", r"convert it"),
    "unreadable.svs": (r"no pixel can be read", r"copy the file again"),
    "CMU-1-Small-Region.wrong-mpp.tiff": (r"0\.00499 .* is implausible", r"--mpp"),
    "no-such-slide.svs": (r"no such file", r"check the path"),
}
"""What the one line of a file that fails says: cause and remedy."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_densenet_card(tmp_path_factory.mktemp("card"), "slide", tile=(224, 224), mpp=1.0)


def white_slide(path: Path) -> str:
    """Glass only."""
    pixels = np.full((1024, 1280, 3), 255, np.uint8)
    dots_cm = 10_000 / MPP
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="deflate",
        resolution=(dots_cm, dots_cm),
        resolutionunit="CENTIMETER",
    )
    return str(path)


def command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def lines_about(text: str, name: str) -> list[str]:
    """Lines of the summary that begin with a status and the file's name, notes left out."""
    return [line for line in text.splitlines() if re.match(rf"\w+ +{re.escape(name)}\s", line)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def run(out: Path, card: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    images = [
        *sorted(str(p) for p in (DATA / "slides_bad").iterdir()),
        str(DATA / "CMU-1-Small-Region.wrong-mpp.tiff"),
        str(DATA / "small_16x16.svs"),
        white_slide(tmp_path_factory.mktemp("white") / "white.tiff"),
        str(GOOD),
        str(DATA / "CMU-1-Small-Region.pyramid3.tiff"),
    ]
    flags = ["--pool", "serial", "--direct", "--threads", "1", "--overlap", "0"]
    return command("explain", *images, "--model", card, "--out", str(out), *flags)


@pytest.fixture(scope="module")
def report(run: Result, out: Path) -> dict[str, ImageReport]:
    report = RunReport.model_validate_json((out / "run.json").read_text())
    return {Path(image.image).name: image for image in report.images}


class TestOneRun:
    """Every bad file and the good ones, in one run through the command line."""

    def test_the_exit_code_says_that_not_all_is_complete(self, run: Result) -> None:
        assert run.exit_code == 1

    @pytest.mark.parametrize("name", [n for n in BAD if n != "no-such-slide.svs"])
    def test_a_bad_file_ends_as_one_line(
        self, run: Result, report: dict[str, ImageReport], name: str
    ) -> None:
        cause, remedy = BAD[name]
        image = report[name]
        assert image.status == "failed"
        assert "\n" not in image.error
        assert name in image.error
        assert re.search(cause, image.error)
        assert re.search(remedy, image.error)
        (line,) = lines_about(run.stdout, name)
        assert line.startswith("failed")
        assert image.error in line
        assert image.error in run.stderr

    @pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region.pyramid3.tiff"])
    def test_good_slides_are_done(self, run: Result, report: dict[str, ImageReport], name: str) -> None:
        image = report[name]
        assert image.status == "complete"
        assert image.error == ""
        assert image.counts is not None
        assert image.counts.done == image.counts.planned > 10
        assert json.loads((Path(image.output) / "report.json").read_text())["status"] == "complete"
        assert (Path(image.output) / "overview.png").stat().st_size > 10_000
        (line,) = lines_about(run.stdout, name)
        assert line.startswith("complete")

    @pytest.mark.parametrize("name", ["small_16x16.svs", "white.tiff"])
    def test_a_slide_without_tissue_is_complete_and_says_so(
        self, run: Result, out: Path, report: dict[str, ImageReport], name: str
    ) -> None:
        image = report[name]
        assert image.status == "complete"
        assert image.counts is not None
        assert image.counts.planned == 0
        assert any("no tile holds enough tissue" in note for note in image.notes)
        position = list(report).index(name)
        heatmap = heatmap_of(RunReport.model_validate_json((out / "run.json").read_text()), position)
        assert heatmap.info.complete
        assert np.isnan(values_of(heatmap)).all()
        assert set(np.unique(heatmap.coverage(0)[:])) == {Coverage.BACKGROUND}

    def test_a_slide_with_one_bad_tile_has_a_gap(self, run: Result, report: dict[str, ImageReport]) -> None:
        image = report[ONE_BAD.name]
        assert image.status == "gaps"
        assert image.counts is not None
        assert 0 < image.counts.failed < image.counts.planned
        assert image.counts.done == image.counts.planned - image.counts.failed
        (line,) = lines_about(run.stdout, ONE_BAD.name)
        assert line.startswith("gaps")
        assert image.error in line
        assert "damaged" in image.error
        assert "copy the file again" in image.error


def test_an_absent_file_ends_as_one_line(tmp_path: Path, card: str) -> None:
    absent = str(tmp_path / "no-such-slide.svs")
    run = command("explain", absent, "--model", card, "--out", str(tmp_path / "out"), "--pool", "serial")
    cause, remedy = BAD["no-such-slide.svs"]
    assert run.exit_code == 1
    (line,) = lines_about(run.stdout, "no-such-slide.svs")
    assert re.search(cause, line)
    assert re.search(remedy, line)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.wrong-mpp.tiff", "slides_bad/CMU-1-Small-Region.webp.tiff"]
)
def test_a_wrong_pixel_size_is_overridden(tmp_path: Path, card: str, name: str) -> None:
    run = command(
        "explain", str(DATA / name), "--model", card, "--out", str(tmp_path), "--mpp", "0.499", "--pool", "serial",
        "--direct", "--threads", "1",
    )  # fmt: skip
    assert run.exit_code == 0, run.stdout
    (image,) = RunReport.model_validate_json((tmp_path / "run.json").read_text()).images
    assert image.status == "complete"
    source = json.loads((Path(image.output) / "report.json").read_text())["provenance"]["image"]
    assert source["spacing"] == [MPP, MPP]
    assert source["spacing_source"] == "--mpp"
    assert image.counts is not None
    assert image.counts.done > 5


@pytest.mark.usefixtures("no_pictures")
def test_an_image_smaller_than_a_tile_is_explained_when_asked(tmp_path: Path, card: str) -> None:
    report = explain(str(DATA / "small_16x16.svs"), card, tmp_path, tissue="none")
    assert report.images[0].status == "complete"
    assert report.images[0].counts is not None
    assert report.images[0].counts.done == 1
    values = values_of(heatmap_of(report))
    assert np.isfinite(values).all()
    assert values.size > 0


def read_rows(start: int, stop: int, n: int) -> NDArray[np.int64]:
    """Level-0 px of one axis that have weight when `[start, stop)` is read as `n` px: a triangle as wide as 2 px
    of the coarser side, around each output px's centre."""
    scale = (stop - start) / n
    centre = start + (np.arange(n) + 0.5) * scale
    source = np.arange(start - 10, stop + 10)
    weighted = (np.abs(source[None] + 0.5 - centre[:, None]) < max(1.0, scale) - 1e-9).any(axis=0)
    rows: NDArray[np.int64] = source[weighted]
    return rows


def meets_the_zeroed_tile(box: NDArray[np.int64], tile_px: tuple[int, ...]) -> bool:
    for axis, (low, high) in enumerate(ZEROED):
        rows = read_rows(int(box[0, axis]), int(box[1, axis]), tile_px[axis])
        if not ((rows >= low) & (rows < high)).any():
            return False
    return True


# The first two tilings lie on the file's own tiles: at scale 1 nothing else is touched, at scale 2 the filter
# reaches one px into the neighbours.
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("mpp", "tile", "overlap", "expected"),
    [(MPP, 240, 0.0, 1), (1.0, 120, 0.0, 9), (1.0, 112, 0.4, None), (MPP, 224, 0.3, None)],
)
def test_exactly_the_tiles_that_need_the_damaged_part_fail(
    tmp_path: Path, mpp: float, tile: int, overlap: float, expected: int | None
) -> None:
    card = write_densenet_card(tmp_path / "card", "slide", tile=(tile, tile), mpp=mpp)
    asked: dict[str, Any] = {"tissue": "none", "overlap": overlap, "unit": 40, "batch": 16}
    bad = explain(str(ONE_BAD), card, tmp_path / "bad", **asked)
    good = explain(str(GOOD), card, tmp_path / "good", **asked)
    there, here = tiles_of(good), tiles_of(bad)
    boxes = here.boxes()
    np.testing.assert_array_equal(boxes, there.boxes())
    fails = np.array([meets_the_zeroed_tile(box, (tile, tile)) for box in boxes])
    assert expected in (None, fails.sum())
    assert 0 < fails.sum() < len(boxes) / 2

    assert good.images[0].status == "complete"
    assert bad.images[0].status == "gaps"
    np.testing.assert_array_equal(here.statuses() == TileStatus.FAILED, fails)
    np.testing.assert_array_equal(here.statuses() == TileStatus.DONE, ~fails)

    listed = json.loads((Path(bad.images[0].output) / "report.json").read_text())["failures"]
    assert [item["tile"] for item in listed] == np.flatnonzero(fails).tolist()
    for item in listed:
        assert item["box"] == {
            "frame": "l0",
            "start": boxes[item["tile"], 0].tolist(),
            "stop": boxes[item["tile"], 1].tolist(),
        }
        assert "cannot be read" in item["reason"]

    assert np.isnan(here.scores()[fails]).all()
    assert (here.target_index()[fails] == -1).all()
    assert here.scores()[~fails].tobytes() == there.scores()[~fails].tobytes()
    rows = np.arange(len(boxes))
    for target in range(2):
        maps = here.maps_of("gradcam", target, rows)
        assert np.isnan(maps[fails]).all()
        assert maps[~fails].tobytes() == there.maps_of("gradcam", target, rows)[~fails].tobytes()

    damaged, whole = heatmap_of(bad), heatmap_of(good)
    shape = damaged.info.grid.levels[0]
    outside = np.ones(shape, bool)
    for low, high in px_range(boxes[fails], damaged.info.grid.downsample).tolist():
        outside[low[0] : high[0], low[1] : high[1]] = False
    codes = damaged.coverage(0)[:]
    np.testing.assert_array_equal(codes == Coverage.FAILED, ~outside)
    np.testing.assert_array_equal(codes[outside], whole.coverage(0)[:][outside])
    values = values_of(damaged)
    assert np.isnan(values[:, ~outside]).all()
    assert values[:, outside].tobytes() == values_of(whole)[:, outside].tobytes()


@pytest.mark.usefixtures("no_pictures")
def test_failed_tiles_are_computed_again_when_asked(
    tmp_path: Path, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hiccups: the gaps stay through a plain resume, and --retry-failed fills them."""
    asked: dict[str, Any] = {"tissue": "none", "unit": 6, "batch": 3, "overlap": 0.2}
    undisturbed = explain(str(GOOD), card, tmp_path / "whole", **asked)
    boxes = tiles_of(undisturbed).boxes()
    unreadable = {8: "", 9: "", 20: ""}
    starts = {tuple(boxes[i, 0].tolist()): i for i in unreadable}
    read = SlideReader.read

    def hiccup(self: SlideReader, box_l0: Box, shape_px: tuple[int, ...], level: int) -> Any:
        if box_l0.start in starts and shape_px == (224, 224):
            msg = f"{self.meta.uri}: level {level} cannot be read"
            raise SourceError(msg)
        return read(self, box_l0, shape_px, level)

    out = tmp_path / "gaps"
    with monkeypatch.context() as patched:
        patched.setattr(SlideReader, "read", hiccup)
        first = explain(str(GOOD), card, out, **asked)
    folder = Path(first.images[0].output)
    assert [f.tile for f in first.images[0].failures] == sorted(unreadable)

    before = stored_bytes(folder / "tiles.zarr")
    again = explain(str(GOOD), card, out, **asked)
    assert again.images[0].status == "gaps"
    assert again.images[0].provenance["tiles_this_run"] == 0
    assert any("--retry-failed" in note for note in again.images[0].notes)
    assert stored_bytes(folder / "tiles.zarr") == before

    written = {p: p.stat().st_mtime_ns for p in (folder / "tiles.zarr").rglob("maps/gradcam/c/*/*/*/*")}
    retried = explain(str(GOOD), card, out, retry_failed=True, **asked)
    assert retried.images[0].status == "complete"
    # a unit is computed whole: its chunk is written whole
    units = {tile // asked["unit"] for tile in unreadable}
    assert retried.images[0].provenance["tiles_this_run"] == len(units) * asked["unit"]
    touched = {int(p.relative_to(folder / "tiles.zarr" / "maps" / "gradcam" / "c").parts[0])
               for p, when in written.items() if p.stat().st_mtime_ns != when}  # fmt: skip
    assert touched == units
    whole = Path(undisturbed.images[0].output)
    for store in ("tiles.zarr", "heatmap.ome.zarr"):
        assert stored_bytes(folder / store) == stored_bytes(whole / store)
