"""`gigacam embed`: features on their own, taken up again by explain and by train, with their slide and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from flows.batch import list_images
from flows.cli import main
from flows.embedding import embed_batch
from schemas.heatmap import Coverage, HeatmapSpec
from schemas.run import ExplainRequest, ImageReport, PoolSettings, RunReport
from schemas.training import TrainReport
from tests.test_flows.networks import write_bag_card, write_encoder_card, write_factory_card
from tests.test_flows.runs import explain, heatmap_of, ignore, stored_bytes, tiles_of, values_of
from tests.test_flows.test_mil import assert_same_stores, bag_of, folder_of
from workers.embedder import Embedder
from workers.export.overview import overview_figure
from workers.models.card import load_card
from workers.planner import open_model, plan_image
from workers.pool import Task
from workers.readers import open_image
from workers.readers.features import ENCODER, read_features
from workers.store.bags import Bag

DAMAGED = Path(__file__).parents[1] / "data" / "slides_bad" / "CMU-1-Small-Region.one-bad-tile.svs"
SLIDE = "procedural:slide?width=1020&height=765&tissue=0.5&seed=7"
ASKED: dict[str, Any] = {
    "bag_methods": ("attention", "contribution"), "methods": ("hirescam",), "unit": 5, "batch": 2, "tissue": "none",
    "heatmap": HeatmapSpec(downsample=16),
}  # fmt: skip
FLAGS = [
    "--bag-method", "attention,contribution", "--method", "hirescam", "--unit", "5", "--batch", "2", "--tissue", "none",
    "--downsample", "16", "--pool", "serial", "--threads", "1",
]  # fmt: skip
ABMIL: dict[str, Any] = {"args": {"hidden": 4, "size": 4}}

pytestmark = pytest.mark.usefixtures("no_pictures")


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bag_card(tmp_path_factory.mktemp("card"), "abmil", **ABMIL)


@pytest.fixture(scope="module")
def whole(card: str, tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """The slide explained in one go."""
    return explain(SLIDE, card, tmp_path_factory.mktemp("whole"), **ASKED)


@pytest.fixture(scope="module")
def alone(whole: RunReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its features in a file."""
    from workers.export.features import write_features

    return write_features(tmp_path_factory.mktemp("alone"), tiles_of(whole))


def refuse(self: Embedder, task: Task) -> Any:
    raise AssertionError("embedded again")


def test_explain_goes_on_from_what_was_embedded(
    tmp_path: Path,
    card: str,
    whole: RunReport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted, resumed, explained: the features are computed once, the stores are those of one run."""
    run = Embedder.run
    units: list[Task] = []

    def counted(self: Embedder, task: Task) -> Any:
        units.append(task)
        return run(self, task)

    def twice(self: Embedder, task: Task) -> Any:
        if len(units) == 1:
            raise KeyboardInterrupt
        return counted(self, task)

    words = ["embed", SLIDE, "--model", card, "--out", str(tmp_path / "out"), *FLAGS]
    monkeypatch.setattr(Embedder, "run", twice)
    assert command(*words) == 130
    assert "run the same command again" in capsys.readouterr().err
    done = list(units)
    monkeypatch.setattr(Embedder, "run", counted)
    assert command(*words, "--json") == 0
    image = RunReport.model_validate_json(capsys.readouterr().out).images[0]
    planned = tiles_of(whole).info.planned
    assert image.counts is not None
    assert (image.counts.planned, image.counts.done) == (planned, planned)
    assert len(set(units)) == len(units) == -(-planned // 5) > len(done)
    assert not (Path(image.output) / "heatmap.ome.zarr").exists()

    monkeypatch.setattr(Embedder, "run", refuse)
    assert command(*words) == 0
    report = explain(SLIDE, card, tmp_path / "out", **ASKED)
    assert report.images[0].status == "complete"
    assert_same_stores(folder_of(report), folder_of(whole))
    assert report.images[0].bag == whole.images[0].bag
    # asked once more, it says what is known of the image
    again = embed_batch(
        ExplainRequest(images=(SLIDE,), model=card, out=str(tmp_path / "out"), **ASKED),
        PoolSettings(kind="serial", threads=1),
        ignore,
    )
    assert again.images[0].status == "complete"
    assert_same_stores(folder_of(report), folder_of(whole))


def test_what_failed_embedded_after_all_ends_the_decision_without_it(
    tmp_path: Path, card: str, whole: RunReport, unreadable: list[list[int]]
) -> None:
    unreadable.append(tiles_of(whole).boxes()[7, 0].tolist())
    folder = folder_of(explain(SLIDE, card, tmp_path, **ASKED))
    (folder / "overview.png").touch()  # no pictures are drawn here, and a run without one is not finished
    unreadable.clear()
    again = embed_batch(
        ExplainRequest(images=(SLIDE,), model=card, out=str(tmp_path), retry_failed=True, **ASKED),
        PoolSettings(kind="serial", threads=1),
        ignore,
    ).images[0]
    assert (again.status, again.failures, again.bag) == ("complete", (), None)
    assert ImageReport.model_validate_json((folder / "report.json").read_text()) == again
    assert not (folder / "overview.png").exists()
    assert explain(SLIDE, card, tmp_path, **ASKED).images[0].bag == whole.images[0].bag
    assert_same_stores(folder, folder_of(whole))


def test_a_damaged_real_slide_and_its_features_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random encoder and head: the tiles that touch the damage are in no bag, NaN in the maps, listed; the file decides the same."""
    encoder = load_card(write_encoder_card(tmp_path / "encoder")).card
    card = write_bag_card(
        tmp_path / "card", "abmil_gated", features=6, network=encoder.network, layer="relu", **ABMIL
    )
    slide, files = str(DAMAGED), tmp_path / "files"
    asked = {**ASKED, "unit": 64, "batch": 32}
    flags = [*FLAGS, "--unit", "64", "--batch", "32"]
    out = tmp_path / "out"
    assert command("embed", slide, "--model", card, "--out", str(out), "--h5", str(files), *flags) == 1
    assert "4 of 108 tiles have no features, the first since: read" in capsys.readouterr().out
    (written,) = out.glob("*/report.json")
    embedded = ImageReport.model_validate_json(written.read_text())
    assert [f.tile for f in embedded.failures] == [48, 49, 57, 58]
    assert all("Not a JPEG file" in f.reason for f in embedded.failures)
    request = ExplainRequest(
        images=(slide,), model=card, out=str(tmp_path / "planned"), features=str(out), **asked
    )
    job = plan_image(list_images(request)[0], request, open_model(request))
    assert any("4 of 108 tiles of tiles.zarr have no features and are not in the bag" in n for n in job.notes)

    report = explain(slide, card, out, **asked)
    image, tiles, heatmap = report.images[0], tiles_of(report), heatmap_of(report)
    assert image.status == "gaps"
    assert [f.tile for f in image.failures] == [48, 49, 57, 58]
    assert image.bag is not None
    assert image.bag.tiles == tiles.info.planned - 4
    values, coverage = values_of(heatmap), heatmap.coverage(0)[:]
    for failure in image.failures:
        place = tuple(
            slice(a // 16 + 1, b // 16) for a, b in zip(failure.box.start, failure.box.stop, strict=True)
        )
        assert np.isnan(values[(slice(None), *place)]).all()
        assert (coverage[place] == Coverage.FAILED).all()
    assert np.isfinite(values[:, coverage == Coverage.EVALUATED]).all()

    found = read_features(files / f"{DAMAGED.stem}.h5")
    rows = bag_of(report).rows()
    assert found.corner_l0 is not None
    np.testing.assert_array_equal(found.features, bag_of(report).features(rows))
    np.testing.assert_array_equal(found.corner_l0, tiles.boxes(rows)[:, 0])
    assert found.attributes["patch_size_level0"] == tiles.info.lattice.tile_l0[0]
    assert found.attributes[ENCODER] == tiles.info.spec.card["state_sha256"]
    again = explain(slide, card, tmp_path / "again", features=str(files), **asked)
    assert again.images[0].status == "complete"
    assert again.images[0].bag is not None
    assert again.images[0].bag.encoder.startswith("imported; 8 tiles embedded again")
    assert again.images[0].bag.logits == image.bag.logits
    for method in ASKED["bag_methods"]:
        one, other = bag_of(report), bag_of(again)
        np.testing.assert_array_equal(
            one.relevance(method, 1, rows), other.relevance(method, 1, np.arange(len(rows)))
        )


def test_an_encoder_alone_is_embedded_trained_on_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From slides to a head and back: the head knows whose features it was trained on, and they are not made again."""
    card = write_encoder_card(tmp_path / "encoder")
    slides = [f"procedural:slide?width=600&height=300&tissue=0.9&seed={i}" for i in range(6)]
    flags = ["--tissue", "none", "--pool", "serial", "--threads", "1"]
    embed = ["embed", *slides, "--model", card, "--out", str(tmp_path / "out"), *flags]
    assert command(*embed, "--h5", str(tmp_path / "files")) == 1  # one name for six slides
    assert "exists and holds the features of another image" in capsys.readouterr().out
    assert command(*embed) == 0
    stores = sorted((tmp_path / "out").glob("*/tiles.zarr"))
    assert len(stores) == 6
    lines = ["image,label,patient,split,features"]
    for i, store in enumerate(stores):
        split = ("train", "val", "test")[i // 2]
        lines.append(f"s{i}.svs,{('clear', 'ill')[i % 2]},p{i},{split},{store.parent}")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    train = [
        "train",
        str(tmp_path / "slides.csv"),
        "--model",
        card,
        "--out",
        str(tmp_path / "head"),
        "--epochs",
        "2",
    ]
    assert command(*train, "--args", json.dumps(ABMIL["args"])) == 0
    trained = load_card(TrainReport.model_validate_json((tmp_path / "head" / "train.json").read_bytes()).card)
    info: Any = zarr.open_group(stores[0], mode="r").attrs["gigacam"]
    assert trained.card.bag is not None
    assert trained.card.bag.encoder_digest == info["spec"]["card"]["state_sha256"]

    monkeypatch.setattr(Embedder, "run", refuse)
    uri = info["image"]["uri"]
    report = explain(uri, str(trained.path), tmp_path / "maps", features=str(stores[0].parent), tissue="none")
    image = report.images[0]
    assert image.status == "complete"
    assert image.bag is not None
    assert image.bag.encoder.startswith("imported; ")
    rows = np.arange(tiles_of(report).info.planned)
    stored = tiles_of(
        RunReport(
            images=(image.model_copy(update={"output": str(stores[0].parent)}),),
            pool="",
            seconds=0,
            versions={},
        )
    )
    np.testing.assert_array_equal(bag_of(report).features(rows), Bag(stored.path, stored.info).features(rows))


def test_features_without_their_slide_give_bag_methods_and_say_so(
    tmp_path: Path, card: str, whole: RunReport, alone: Path
) -> None:
    report = explain(str(alone), card, tmp_path / "out", **{**ASKED, "methods": ("gradcam",)})
    image, heatmap, reference = report.images[0], heatmap_of(report), whole.images[0]
    assert image.status == "complete"
    assert image.bag is not None
    assert reference.bag is not None
    assert image.bag.encoder == (
        "encoder unverified: features alone, without their slide; the file says they are this encoder's"
    )
    assert image.bag.logits == reference.bag.logits
    assert any(
        "features alone, without their slide: encoder unverified, and only bag methods" in note
        for note in image.notes
    )
    marks = [
        f"{m}:{t} (encoder unverified)" for m in ("attention", "contribution") for t in ("benign", "tumour")
    ]
    assert [c.label for c in image.channels] == marks
    attributes: Any = zarr.open_group(heatmap.path, mode="r").attrs
    assert [c["label"] for c in attributes["ome"]["omero"]["channels"]] == marks
    assert all(c["encoder_unverified"] for c in attributes["gigacam"]["channels"])
    assert not any(name.startswith(("gradient", "maps")) for name in stored_bytes(tiles_of(report).path))
    # where the slide was, so are the tiles, and with the same values
    np.testing.assert_array_equal(tiles_of(report).boxes(), tiles_of(whole).boxes())
    np.testing.assert_array_equal(values_of(heatmap), values_of(heatmap_of(whole))[:4])
    assert not any(c.encoder_unverified for c in reference.channels)
    figure = overview_figure(open_image(str(alone)), heatmap, tiles_of(report).info)
    texts: Any = figure.findobj(lambda a: hasattr(a, "get_text"))
    text = " ".join(t.get_text() for t in texts)
    assert "Encoder unverified" in text
    assert "there is no picture of the slide" in text


def rewritten(source: Path, path: Path, **changes: Any) -> Path:
    """A file of features with other datasets or attributes of `coords`; None: without."""
    with h5py.File(source, "r") as old, h5py.File(path, "w") as new:
        for name in ("features", "coords"):
            if changes.get(name, True) is not None:
                new[name] = changes.get(name, old[name][()])
                attributes = {**old[name].attrs, **(changes.get("attributes", {}))}
                new[name].attrs.update({k: v for k, v in attributes.items() if v is not None})
    return path


SIZES = dict.fromkeys(("tile_level0", "patch_size", "patch_level", "patch_size_level0"))
EXTENT = dict.fromkeys(("level0_width", "level0_height"))
ALONE_BAD: list[tuple[dict[str, Any], str]] = [
    ({"coords": None}, "positions are never invented"),
    ({"features": np.zeros((0, 3), np.float32), "coords": np.zeros((0, 2), np.int64)}, "the bag is empty"),
    ({"features": np.full((12, 3), np.nan, np.float32)}, "12 of 12 tiles have features that are not finite"),
    ({"features": np.zeros((12, 5), np.float32)}, "5 numbers a tile, the bag head reads 3"),
    (
        {"attributes": {ENCODER: "0" * 64}},
        "the features of another encoder: its weights had the digest 000000000000",
    ),
    ({"attributes": {"mpp": None}}, "give --mpp"),
    ({"attributes": {**SIZES, **EXTENT}}, "is never invented"),
    ({"attributes": {"patch_size_level0": 512, "tile_level0": None}}, "its tiles are 512 level-0 px wide"),
]


@pytest.mark.parametrize(("changes", "complaint"), ALONE_BAD, ids=[c for _, c in ALONE_BAD])
def test_bad_features_alone_are_refused(
    tmp_path: Path, card: str, alone: Path, changes: dict[str, Any], complaint: str
) -> None:
    path = rewritten(alone, tmp_path / "bad.h5", **changes)
    image = explain(str(path), card, tmp_path / "out", **ASKED).images[0]
    assert image.status == "failed"
    assert complaint in image.error
    assert not list((tmp_path / "out").glob("*/tiles.zarr"))


def test_features_that_say_less_are_laid_where_they_say(tmp_path: Path, card: str, alone: Path) -> None:
    """Without the slide's extent the heatmap ends with the tiles; the pixel size may be given; one tile is a bag."""
    coords = read_features(alone).corner_l0
    assert coords is not None
    path = rewritten(
        alone, tmp_path / "one.h5", features=read_features(alone).features[5:6], coords=coords[5:6, ::-1],
        attributes={**EXTENT, "mpp": None, ENCODER: None},
    )  # fmt: skip
    with_mpp = {"read": {"mpp_um": 0.5}, **ASKED, "bag_methods": ("attention",)}
    report = explain(str(path), card, tmp_path / "out", **with_mpp)
    image = report.images[0]
    assert image.status == "complete"
    assert image.bag is not None
    assert image.bag.encoder == "encoder unverified: features alone, without their slide"
    assert "the slide's extent is not known: the heatmap ends where the last tile does" in image.notes
    assert tiles_of(report).info.image.shape_l0 == tuple((coords[5] + 256).tolist())
    assert tiles_of(report).boxes()[0, 0].tolist() == coords[5].tolist()


def test_requests_that_cannot_be_embedded(
    tmp_path: Path, card: str, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = write_factory_card(
        tmp_path / "c", "pooled_channels", {"cell": 32}, "pool", ("r", "g", "b"), kind="slide", channels=3, tile=(128, 128), mpp=1.0
    )  # fmt: skip
    encoder = write_encoder_card(tmp_path / "e")
    out = str(tmp_path / "out")
    for words, code, complaint in (
        ([SLIDE, "--model", classifier], 2, "takes a model with a [bag] head, or an encoder"),
        ([SLIDE, "--model", encoder, "--bag-method", "attention"], 2, "has no [bag] head to explain"),
        ([str(alone), "--model", card], 1, "holds features already"),
        ([str(alone), "--model", encoder], 1, "has no [bag] head to explain them by"),
        (
            ["procedural:slide?width=500&height=500&tissue=0&seed=1", "--model", encoder],
            1,
            "the bag is empty",
        ),
    ):
        assert command("embed", *words, "--out", out, "--pool", "serial", "--threads", "1") == code
        told = capsys.readouterr()
        assert complaint in told.out + told.err
