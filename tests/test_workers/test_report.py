"""Reports: what they say is what was recorded, they need nothing but themselves, and nothing in them can run."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import workers.export.overview
from flows.cli import app
from schemas.geometry import Box
from schemas.heatmap import ChannelInfo, Coverage, TileStatus
from schemas.image import stem_of
from schemas.run import Counts, ImageReport, Prediction, RunReport
from tests.test_flows.networks import write_bag_card, write_factory_card
from tests.test_flows.runs import explain, values_of
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from tests.test_workers.store_samples import fill_unit, map_grid, shifted_boxes, tiles_info
from tests.test_workers.test_export_overview import ArrayReader
from workers.cam.bag_methods import BAG_METHODS
from workers.cam.methods import METHODS
from workers.export.words import INTENDED_USE
from workers.publisher import drop_derived
from workers.report import facts, limits
from workers.report.batch import write_batch_page
from workers.report.image import write_image_page
from workers.report.pictures import SlidePictures, heat_at
from workers.report.private import names_of, without_folders
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.store.tops import TopTile, top_tiles
from workers.store.values import spreads

BAD = Path(__file__).parents[1] / "data" / "slides_bad" / "CMU-1-Small-Region.one-bad-tile.svs"
SCRIPT = "<script>alert(1)</script>"
TILE_METHODS = {name: row.info for name, row in METHODS.items()}
OF_BAGS = {name: row.info for name, row in BAG_METHODS.items()}


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.data: dict[str, list[float]] = {}
        """Values of `<data>`, by the nearest id above."""
        self._ids: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == [], "every element is closed"

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag not in self.VOID:
            self._open.append(tag)
            self._ids.append((tag, values.get("id", "")))
        if tag == "data":
            near = next((i for _, i in reversed(self._ids) if i), "")
            self.data.setdefault(near, []).append(float(values["value"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._ids.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def pictures(self) -> list[Image.Image]:
        found: list[Image.Image] = []
        for tag, values in self.tags:
            uri = values.get("href" if tag == "image" else "src", "") if tag in ("image", "img") else ""
            if uri:
                kind, _, data = uri.partition(";base64,")
                assert kind in ("data:image/png", "data:image/jpeg")
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


def assert_sound(page: Page) -> None:
    """Self-contained, nothing that runs, readable by who cannot see, meant for research only."""
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            target = values.get(name, "")
            assert target.startswith(("data:image/", "#")) or target.endswith("report.html") or not target
            assert "//" not in target.partition(";base64,")[0]
            assert not target.startswith("/")
        if tag == "svg":
            assert values["role"] == "img"
            assert values["aria-label"]
        if tag == "th":
            assert values["scope"] in ("col", "row")
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert page.source.count(INTENDED_USE) == 1
    assert page.text.index(INTENDED_USE) < 120
    assert next(v for t, v in page.tags if t == "html")["lang"] == "en"
    levels = [int(t[1]) for t, _ in page.tags if t in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    policy = next(v["content"] for t, v in page.tags if v.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiles/`: a slide and a volume explained tile by tile, and one that is not there; `bag/`: a slide with a bad
    tile as a bag."""
    folder = tmp_path_factory.mktemp("patient-Jane-Doe")
    slide_card = write_factory_card(
        folder / "m2", "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(64, 64), mpp=0.5, scale=(0.0, 255.0), mean=(0.9,), std=(1.0,),
    )  # fmt: skip
    volume_card = write_factory_card(
        folder / "m3", "pooled_channels", {"cell": 4, "ndim": 3}, "pool", ("one",),
        kind="volume", channels=1, tile=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0), scale=(0.0, 100.0),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers.export.overview, "write_overview", lambda *_: None)
        slide = "procedural:slide?width=700&height=500&tissue=0.5&seed=2"
        asked: dict[str, Any] = {"methods": ("hirescam", "eigencam"), "targets": ("r",), "overlap": 0.5}
        explain((slide, str(folder / "absent.svs")), slide_card, folder / "tiles", **asked)
        volume = "procedural:volume?shape=40,48,56&spacing=1,1,1&seed=1"
        explain(volume, volume_card, folder / "tiles", methods=("hirescam",), targets=("one",), tissue="none")
        source = folder / "case.svs"
        shutil.copy(BAD, source)
        explain(
            str(source), write_bag_card(folder / "m1", "abmil_gated", args={"hidden": 4, "size": 4}),
            folder / "bag", methods=("hirescam",), bag_methods=("attention", "contribution"), targets=("tumour",),
            tissue="none", inside={"top": 0.3},
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pages(runs: Path) -> dict[str, Page]:
    """As the command line writes them."""
    done = CliRunner().invoke(app, ["report", str(runs / "tiles"), str(runs / "bag"), "--top", "3"])
    assert done.exit_code == 0, done.output
    written = [Path(line) for line in done.stdout.splitlines()]
    assert len(written) == 5
    assert all(path.name == "report.html" for path in written)
    names = {"slide": "procedural-slide-*", "volume": "procedural-volume-*", "bag": "case-*"}
    found = {name: next(runs.glob(f"*/{glob}/report.html")) for name, glob in names.items()}
    found |= {"tiles": runs / "tiles" / "report.html", "bags": runs / "bag" / "report.html"}
    assert sorted(found.values()) == sorted(written)
    return {name: Page(path) for name, path in found.items()}


def report_of(runs: Path, glob: str) -> tuple[Path, ImageReport]:
    path = next(runs.glob(f"*/{glob}/report.json"))
    return path.parent, ImageReport.model_validate_json(path.read_text())


@pytest.mark.parametrize("name", ["slide", "volume", "bag", "tiles", "bags"])
def test_a_page_needs_nothing_but_itself_and_names_no_folder(
    pages: dict[str, Page], runs: Path, name: str
) -> None:
    assert_sound(pages[name])
    for picture in pages[name].pictures:
        picture.load()
    assert "Jane" not in pages[name].source
    assert str(runs.parent) not in pages[name].source


def test_scores_counts_and_versions_are_those_recorded(pages: dict[str, Page], runs: Path) -> None:
    _, report = report_of(runs, "procedural-slide-*")
    page = pages["slide"]
    assert page.data["scores"] == [v for p in report.prediction for v in (p.mean, p.highest)]
    counts = report.counts
    assert counts is not None
    assert page.data["counts"] == [counts.planned, counts.done, counts.failed, counts.left_out]
    for name, version in report.provenance["versions"].items():
        assert f"{name} {version}" in page.text
    for word in ("tiles_id", "run_id"):
        assert report.provenance[word] in page.text
    assert report.provenance["spec"]["card"]["state_sha256"] in page.text
    _, bagged = report_of(runs, "case-*")
    assert bagged.bag is not None
    assert pages["bag"].data["scores"] == list(bagged.bag.logits)
    assert f"predicted as {bagged.bag.predicted}" in pages["bag"].text


def test_what_failed_is_listed_and_nothing_is_left_unsaid(pages: dict[str, Page], runs: Path) -> None:
    _, report = report_of(runs, "case-*")
    page = pages["bag"]
    assert report.status == "gaps"
    assert len(report.failures) == 4
    assert page.text.count("that part of the file is damaged") >= len(report.failures)
    for note in report.notes:
        assert note in page.text
    for channel in report.channels:
        assert channel.label in page.text
        assert limits.limit(channel.method, bool(channel.bag_method)) in page.text
    assert limits.OF_A_BAG in page.text
    assert "Of maps inside some of the tiles" in page.text


@pytest.mark.parametrize("name", ["slide", "volume"])
def test_the_histogram_is_of_all_raw_values(pages: dict[str, Page], runs: Path, name: str) -> None:
    folder, _ = report_of(runs, f"procedural-{name}-*")
    heatmap = HeatmapStore.open(folder / "heatmap.ome.zarr")
    for c in range(len(heatmap.info.channels)):
        values = values_of(heatmap)[c]
        values = values[np.isfinite(values)].astype(float)
        low, high, mean = pages[name].data[f"map-{c + 1}"][:3]
        assert (low, high) == heatmap.info.value_range[c] == (values.min(), values.max())
        assert mean == pytest.approx(values.mean(), rel=1e-9)


def test_top_tiles_are_shown_with_their_values(pages: dict[str, Page], runs: Path) -> None:
    folder, report = report_of(runs, "procedural-slide-*")
    tiles = TilesStore.open(folder / "tiles.zarr")
    for c, channel in enumerate(report.channels):
        tops = top_tiles(tiles, channel, 3) + (top_tiles(tiles, channel, 2, -1) if channel.signed else ())
        assert pages["slide"].data[f"map-{c + 1}"][3:] == [top.value for top in tops]
    assert any(top.value < 0 for top in top_tiles(tiles, report.channels[0], 2, -1))
    # slide, heat, colour bar of each channel; two pictures a tile
    shown = sum(len(pages["slide"].data[f"map-{c + 1}"]) - 3 for c in range(len(report.channels)))
    assert len(pages["slide"].pictures) == 1 + 2 * len(report.channels) + 2 * shown


def test_a_volume_is_shown_in_three_planes(pages: dict[str, Page]) -> None:
    page = pages["volume"]
    tops = len(page.data["map-1"]) - 3
    assert tops >= 1
    assert len(page.pictures) == 3 + 3 + 1 + 6 * tops
    labels = [values["aria-label"] for tag, values in page.tags if tag == "svg"]
    for view in ("Axial", "Coronal", "Sagittal"):
        assert any(view in label for label in labels)


def test_a_run_lists_what_needs_attention_first(pages: dict[str, Page], runs: Path) -> None:
    page = pages["tiles"]
    assert page.text.index("absent.svs") < page.text.index("procedural:slide")
    run = RunReport.model_validate_json((runs / "tiles" / "run.json").read_text())
    counts = [image.counts for image in run.images if image.counts is not None]
    totals = page.data["totals"]
    assert totals == [
        sum(i.status == "complete" for i in run.images), 1, sum(c.planned for c in counts),
        sum(c.done for c in counts), 0, 0,
    ]  # fmt: skip
    links = [values["href"] for tag, values in page.tags if tag == "a"]
    assert sorted(links) == sorted(f"{i.image_id}/report.html" for i in run.images if i.image_id)
    assert all((runs / "tiles" / link).is_file() for link in links)
    assert pages["bags"].text.count("has gaps") + pages["bags"].text.count("Has gaps") >= 1


def write(folder: Path, name: str, report: ImageReport) -> Page:
    return Page(write_image_page(folder, name, report, TILE_METHODS, OF_BAGS, top=1))


def test_nothing_in_a_name_or_a_message_is_markup(runs: Path, tmp_path: Path) -> None:
    _, report = report_of(runs, "procedural-slide-*")
    evil = f"{SCRIPT}.svs"
    channel = report.channels[0].model_copy(update={"edition": SCRIPT})
    prediction = report.prediction[0].model_copy(update={"target": SCRIPT, "quantity": SCRIPT})
    changed = report.model_copy(
        update={
            "image": f"/data/{evil}", "status": "failed", "error": f"/data/{evil}: gone", "notes": (SCRIPT,),
            "prediction": (prediction,), "channels": (channel,), "failed_tasks": (SCRIPT,), "flags": {SCRIPT: 1},
            "provenance": {**report.provenance, "intended_use": SCRIPT, "versions": {SCRIPT: SCRIPT}},
        }
    )  # fmt: skip
    (tmp_path / "methods.json").write_text(json.dumps({SCRIPT: {"reason": "", "auroc": {SCRIPT: 0.5}}}))
    page = write(tmp_path, evil, changed)
    assert_sound(page)
    assert page.text.count(SCRIPT) >= 9
    run = RunReport(images=(changed,), pool=SCRIPT, seconds=1.0, versions={SCRIPT: SCRIPT})
    batch = Page(write_batch_page(tmp_path, run, [evil]))
    assert_sound(batch)
    assert batch.text.count(SCRIPT) >= 4


def test_without_its_source_a_report_has_no_crops_and_says_so(runs: Path, tmp_path: Path) -> None:
    folder, report = report_of(runs, "case-*")
    source = runs / "case.svs"
    away = source.with_name("away.svs")
    source.rename(away)
    try:
        page = write(folder, "case.svs", report)
        assert "could not be opened, so that only heat is shown" in page.text
        shutil.copy(BAD.with_name("CMU-1-Small-Region.truncated.svs"), source)
        other = write(folder, "case.svs", report)
    finally:
        away.rename(source)
    assert "only heat is shown" in other.text
    for found in (page, other):
        assert_sound(found)
        assert "Jane" not in found.source
        assert "No picture:" in found.text
        assert "The image under the heat of" in str(found.tags)
        assert len(found.pictures) == 1 + 2 * len(report.channels)


def test_a_report_of_one_image_and_of_what_is_none(runs: Path, tmp_path: Path) -> None:
    folder, _ = report_of(runs, "procedural-volume-*")
    done = CliRunner().invoke(app, ["report", str(folder), "--top", "0"])
    assert (done.exit_code, done.stdout) == (0, f"{folder / 'report.html'}\n")
    assert len(Page(folder / "report.html").pictures) == 7
    wrong = CliRunner().invoke(app, ["report", str(runs)])
    assert wrong.exit_code == 1
    assert f"did you mean {runs / 'bag'}?" in str(wrong.exception)


def test_what_tells_of_an_earlier_heatmap_is_left_out(tmp_path: Path) -> None:
    own = tmp_path / "a"
    ledger, page, measured = own / "heatmap.ome.zarr" / "zarr.json", own / "report.html", own / "methods.json"
    ledger.parent.mkdir(parents=True)
    for path in (ledger, page):
        path.touch()
    measured.write_text(json.dumps({"gradcam": {"auroc": {"lesion": 0.9}}}))
    report = ImageReport(image="/x/a.svs", image_id="a", status="complete")
    run = RunReport(images=(report,), pool="serial", seconds=1.0, versions={})
    written = ledger.stat().st_mtime_ns
    for later, current in ((1, True), (0, True), (-1, False)):
        at = written + later * 10**9
        for path in (page, measured):
            os.utime(path, ns=(at, at))
        batch = Page(write_batch_page(tmp_path, run, ["a.svs"]))
        assert [v["href"] for tag, v in batch.tags if tag == "a"] == (["a/report.html"] if current else [])
        assert (facts.metrics(own, str) is not None) == current
    drop_derived(own)
    assert not page.exists()


def test_an_image_that_cannot_be_told_of_ends_no_other(runs: Path, tmp_path: Path) -> None:
    """A folder of features, whose provenance has no heatmap; reports of other versions, outside and within."""
    _, report = report_of(runs, "case-*")
    of_maps = ("heatmap", "tissue", "run_id", "cells")
    features = {k: v for k, v in report.provenance.items() if k not in of_maps} | {"stage": "embed"}
    changed = {"image": {**features["image"], "levels": "many"}}
    images = tuple(
        report.model_copy(
            update={"image": f"/x/{name}.svs", "image_id": f"{name}-01234567", "channels": (), "prediction": (), "bag": None,
                    "provenance": provenance},
        )
        for name, provenance in (("old", features), ("changed", {**features, **changed}), ("embedded", features))
    )  # fmt: skip
    for image in images:
        (tmp_path / image.image_id).mkdir()
        (tmp_path / image.image_id / "report.json").write_text(image.model_dump_json())
    (tmp_path / "old-01234567" / "report.json").write_text('{"picture": 1}')
    run = RunReport(images=images, pool="serial", seconds=1.0, versions={})
    (tmp_path / "run.json").write_text(run.model_dump_json())
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    pages = [tmp_path / "embedded-01234567" / "report.html", tmp_path / "report.html"]
    assert (done.exit_code, done.stdout.splitlines()) == (1, list(map(str, pages)))
    for name in ("old", "changed"):
        path = tmp_path / f"{name}-01234567" / "report.json"
        assert f"error: {path}: was not written by this version" in done.stderr
    page = Page(pages[0])
    assert_sound(page)
    assert "nothing is explained yet: there is no map" in page.text
    assert "with features" in page.text
    assert features["tiles_id"] in page.text


def test_names_are_hidden_where_ids_are_hashes() -> None:
    shown = ImageReport(
        image="/ward 7/Jane Doe.svs", image_id="0123abcd", status="gaps", output="/ward 7/out/0123abcd",
        error="/ward 7/Jane Doe.svs: 3 of 4 tiles; see /tmp/x/scratch.log and file:///srv/y.txt", notes=("stem Jane Doe",),
    )  # fmt: skip
    failed = ImageReport(image="/ward 7/John Roe.svs", status="failed", error="/ward 7/John Roe.svs: gone")
    names = names_of([shown, failed])
    assert names == ["0123abcd", "image 2 of run.json"]
    text = " ".join(
        without_folders(report, name).model_dump_json()
        for report, name in zip((shown, failed), names, strict=True)
    )
    for secret in ("Jane", "John", "ward", "tmp", "srv"):
        assert secret not in text
    assert "see scratch.log and y.txt" in text
    assert "0123abcd: 3 of 4 tiles" in text
    assert names_of([failed]) == ["John Roe.svs"]
    kept = without_folders(failed, "John Roe.svs")
    assert kept.error == "John Roe.svs: gone"
    for file in ("JaneDoe.nii.gz", "Jane_Doe.ome.tiff", "Jane Doe.svs"):
        stem = stem_of(file)
        meta = {"uri": f"/ward 7/{file}", "stem": stem}
        report = shown.model_copy(
            update={"image": meta["uri"], "error": "", "notes": (stem,), "provenance": {"image": meta}}
        )
        kept = without_folders(report, "0123abcd")
        assert kept.provenance["image"]["stem"] == kept.notes[0] == "0123abcd"
        assert "Doe" not in kept.model_dump_json()
        bare = report.model_copy(update={"provenance": {}})
        assert "Doe" not in without_folders(bare, "0123abcd").model_dump_json()
    for stem in ("slide", "2", "gaps"):  # what has such a word in it and is no name of a file stays
        facts = {
            "image": {"uri": f"/ward/{stem}.svs", "stem": stem, "kind": "slide"},
            "versions": {"torch": "2.13.0"}, "spec": {"cam": {"layer": "layer4.2"}},
        }  # fmt: skip
        report = shown.model_copy(
            update={
                "image": f"/ward/{stem}.svs",
                "error": "",
                "notes": (f"{stem}.svs is dark",),
                "provenance": facts,
            }
        )
        kept = without_folders(report, "0123abcd")
        assert (kept.status, kept.notes) == ("gaps", ("0123abcd is dark",))
        assert kept.provenance["image"] == {"uri": "0123abcd", "stem": "0123abcd", "kind": "slide"}
        assert kept.provenance["versions"] == facts["versions"]
        assert kept.provenance["spec"] == facts["spec"]
    relative = ImageReport(
        image="ward/a.svs", status="failed", error="ward/a.svs: 1/2 tiles, a.svs, forward/back"
    )
    assert without_folders(relative, "a.svs").error == "a.svs: 1/2 tiles, a.svs, forward/back"


def test_a_thousand_images_are_a_small_page(tmp_path: Path) -> None:
    box = Box(frame="l0", start=(0, 0), stop=(1, 1))
    images = tuple(
        ImageReport(
            image=f"/a/b/slide {n}.svs", image_id=f"slide_{n}-01234567", status="failed" if n == 700 else "complete",
            counts=Counts(planned=5000, done=5000, failed=0, left_out=0), seconds={"all": 12.5},
            prediction=tuple(Prediction(target=t, mean=n / 3, highest=n, highest_box=box) for t in "ab"),
        )
        for n in range(1000)
    )  # fmt: skip
    run = RunReport(images=images, pool="ray", seconds=1.0, versions={})
    page = Page(write_batch_page(tmp_path, run, names_of(images)))
    assert_sound(page)
    assert len(page.source) < 700_000
    assert page.text.index("slide 700.svs") < page.text.index("slide 0.svs")
    assert sum(tag == "tr" for tag, _ in page.tags) > 1000


def test_every_method_has_its_limits_in_words() -> None:
    assert limits.TILE_LIMITS.keys() == METHODS.keys()
    assert limits.BAG_LIMITS.keys() == BAG_METHODS.keys()
    assert limits.limit("sscam+samples=3", False) == limits.TILE_LIMITS["sscam"]
    for name, row in METHODS.items():
        if not row.info.class_specific:
            assert "Knows no class" in limits.TILE_LIMITS[name]
    assert limits.limit("a new one", True) == limits.UNKNOWN


# --- numbers beneath ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 33), (12, 14, 16)])
def test_top_tiles_are_those_found_one_by_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ndim = len(shape)
    tile, cells = (8,) * ndim, map_grid((8,) * ndim, (4,) * ndim)
    boxes = shifted_boxes(shape, tile, (5,) * ndim)
    info = tiles_info(boxes, shape, cells, planned=len(boxes) - 2)
    tiles = TilesStore.create(tmp_path / "tiles.zarr", info, boxes)
    for unit in range(info.units):
        fill_unit(tiles, unit, failed=(3, 4))
    channel = ChannelInfo(
        method="layercam", target="rest", target_index=1, unit="1", signed=True, grid=cells.shape
    )
    done = np.flatnonzero(tiles.statuses() == TileStatus.DONE)
    maps = tiles.maps_of("layercam", 1, done)
    for sign in (1, -1):
        peaks = [float((sign * m).max()) for m in maps]
        expected: list[int] = []
        for peak in sorted(peaks, reverse=True):
            row = int(done[peaks.index(peak)])
            (a, b) = boxes[row]
            apart = all(((b <= boxes[o, 0]) | (a >= boxes[o, 1])).any() for o in expected)
            if peak > 0 and apart and len(expected) < 4:
                expected.append(row)
        found = top_tiles(tiles, channel, 4, cast("Any", sign))
        assert [top.tile for top in found] == expected
        for top in found:
            raw = sign * maps[done.tolist().index(top.tile)]
            assert sign * top.value == raw.max()
            at = np.argwhere(raw == raw.max())[0]
            assert top.centre_l0 == tuple((boxes[top.tile, 0] + (at + 0.5) * 2).tolist())
            assert top.box == Box(frame="l0", start=tuple(boxes[top.tile, 0].tolist()),
                                  stop=tuple(boxes[top.tile, 1].tolist()))  # fmt: skip


def test_spreads_count_every_value_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reader = ArrayReader(np.full((3, 900, 1300), 200, np.uint8))
    values = rng.normal(size=(2, 450, 650)).astype(np.float32)
    codes = np.where(rng.random((450, 650)) < 0.5, Coverage.EVALUATED, Coverage.BACKGROUND).astype(np.uint8)
    values[:, codes != Coverage.EVALUATED] = np.nan
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 2, values, codes, (SIGNED, UNSIGNED))
    edges = np.linspace(-1, 2, 31)
    found, coverage = spreads(store, [edges, edges])
    assert coverage == {
        "coverage": {c: int((codes == c).sum()) for c in (Coverage.EVALUATED, Coverage.BACKGROUND)}
    }
    for spread, channel in zip(found, values, strict=True):
        finite = channel[np.isfinite(channel)].astype(float)
        assert spread.number == spread.counts.sum() == finite.size
        assert spread.counts[0] == (finite < edges[1]).sum()
        assert spread.counts[-1] == (finite >= edges[-2]).sum()
        assert spread.counts[10] == ((finite >= edges[10]) & (finite < edges[11])).sum()
        assert (spread.low, spread.high) == (finite.min(), finite.max())
        assert (spread.above, spread.below) == ((finite > 0).sum(), (finite < 0).sum())
        assert spread.mean == pytest.approx(finite.mean())


def picture_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


def test_heat_lies_on_the_pixels_it_belongs_to(tmp_path: Path) -> None:
    """A black square in the slide, heat on the same level-0 pixels; found again in the crop and in the whole."""
    pixels = np.full((3, 601, 1003), 235, np.uint8)
    pixels[:, 352:400, 816:864] = 0
    reader = ArrayReader(pixels)
    heat = np.zeros((76, 126), np.float32)
    heat[44:50, 102:108] = 5
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 8, heat[None])
    pictures = SlidePictures(reader.meta, store, cast("Any", reader))
    box = Box(frame="l0", start=(301, 700), stop=(493, 892))
    top = TopTile(0, 5.0, box, (376.0, 840.0))
    ((plain, heated),) = pictures.tile(0, top)
    (whole,), (under,) = pictures.whole(), pictures.under_heat(0, [top])
    assert plain.size == (96.0, 96.0)
    for panel, hot, corner, scale in ((plain, False, box.start, 1.0), (heated, True, box.start, 1.0),
                                      (whole, False, (0, 0), 2.0), (under, True, (0, 0), 2.0)):  # fmt: skip
        found = picture_of(panel.uri)
        mark = found[..., 0] - found[..., 2] > 60 if hot else found.max(axis=-1) < 80
        centre = (np.argwhere(mark).mean(axis=0) + 0.5) * scale + corner
        np.testing.assert_allclose(centre, (376, 840), atol=2.0)
        assert mark.sum() * scale**2 == pytest.approx(48 * 48, rel=0.15)
    ((_, x, y, width, height),) = under.marks
    np.testing.assert_allclose((y, x, height, width), np.array([301, 700, 192, 192]) / 2)
    values, codes = heat_at(store, 0, [np.array([399.5, 400.5, -1.0]), np.array([816.0, 1002.9, 1004.0])])
    assert values[0, 0] == 5
    assert values[1, 0] == 0
    assert np.isnan(values[2]).all()
    assert (codes[2] == Coverage.OUTSIDE).all()
    assert (codes[:, 2] == Coverage.OUTSIDE).all()
    assert codes[0, 1] == Coverage.EVALUATED
