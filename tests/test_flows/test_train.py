"""`gigacam train`: features and labels in, a model card with figures out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr

from flows.cli import main
from flows.embedding import embed_batch
from schemas.bag import InsideSpec
from schemas.errors import ModelError, SourceError, StoreError
from schemas.heatmap import TileStatus
from schemas.run import ExplainRequest, PoolSettings
from schemas.training import TrainReport
from tests.test_flows.networks import write_bag_card, write_encoder_card
from tests.test_flows.runs import explain, ignore, tiles_of
from workers.models.bags import load_head
from workers.models.card import load_card
from workers.readers.features import read_features
from workers.store.bags import Bag
from workers.synthetic.bags import ToyBag, toy_bags
from workers.trainer import NOTES, FeatureSource, _checkpoints, _notes
from workers.training.bags import Case

ENCODER = """schema = 1
name = "encoder"
version = "1"
licence = "CC0-1.0"
intended_use = "tests"
[network]
adapter = "factory"
name = "tests.test_flows.networks:never_loaded"
weights = "encoder.safetensors"
sha256 = "{sha}"
[input]
kind = "slide"
channels = 3
tile = [32, 32]
mpp = 0.5
[output]
kind = "embedding"
[cam]
layer = "relu"
"""
QUICK = ["--epochs", "8", "--learning-rate", "0.01", "--args", '{"hidden": 16, "size": 8}']


@pytest.fixture(scope="module")
def toys() -> tuple[ToyBag, ...]:
    return toy_bags("presence", 40, seed=3, tiles=(4, 8))


@pytest.fixture
def folder(tmp_path: Path, toys: tuple[ToyBag, ...]) -> Path:
    """A CSV of 40 slides of 20 patients, their features as `.h5` and `.npy`, an encoder's card in another folder."""
    (tmp_path / "features").mkdir()
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.toml").write_text(ENCODER.format(sha="0" * 64))
    lines = ["image,label,patient"]
    for i, toy in enumerate(toys):
        path = tmp_path / "features" / f"s{i}"
        if i % 3:
            with h5py.File(path.with_suffix(".h5"), "w") as file:
                file["features"] = toy.features
                file["coords"] = toy.position[:, ::-1] * 256
                file["coords"].attrs["patch_size"] = 256
        else:
            np.save(path.with_suffix(".npy"), toy.features)
        lines.append(f"s{i}.svs,{('clear', 'nine')[toy.label]},p{i // 4 * 2 + i % 2}")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    return tmp_path


def command(folder: Path, *more: str, out: str = "out") -> int:
    words = ["train", str(folder / "slides.csv"), "--model", str(folder / "encoder" / "model.toml"),
             "--features", str(folder / "features"), "--out", str(folder / out), *more]  # fmt: skip
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def report_of(folder: Path, out: str = "out") -> TrainReport:
    return TrainReport.model_validate_json((folder / out / "train.json").read_bytes())


@pytest.mark.parametrize("mhim", ["", "v2"])
def test_a_head_is_trained_judged_and_written_down(
    folder: Path, toys: tuple[ToyBag, ...], mhim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*QUICK, "--folds", "2", *(["--mhim", mhim] if mhim else [])]
    assert command(folder, *more) == 0
    told = capsys.readouterr()
    assert "on 40 slides of patients not seen" in told.out
    assert "auroc" in told.out
    report = report_of(folder)
    assert (report.slides, report.patients, report.features) == (40, 20, 32)
    assert sorted(report.tested) == sorted(str(folder / f"s{i}.svs") for i in range(40))
    auroc = report.figures["auroc"]
    assert auroc.value is not None
    assert auroc.low is not None
    assert auroc.high is not None
    assert auroc.low <= auroc.value <= auroc.high
    if not mhim:  # of a bag with one positive tile MHIM v2 masks that one: nothing to learn here
        assert auroc.value >= 0.9
    names = ["fold 1", "fold 2", "head"]
    assert list(report.epochs) == ([n for k in names for n in (f"{k} teacher", k)] if mhim else names)
    assert (folder / "out" / "learning.png").read_bytes()[:4] == b"\x89PNG"

    loaded = load_card(report.card)
    card = loaded.card
    assert card.bag is not None
    assert (card.bag.sha256, card.bag.features, card.bag.encoder_digest) == (report.sha256, 32, "")
    assert card.output.classes == ("clear", "nine")
    assert (loaded.folder / card.network.weights).resolve() == (
        folder / "encoder" / "encoder.safetensors"
    ).resolve()
    head = load_head(loaded)
    said = [int(head(torch.from_numpy(toy.features)).argmax()) for toy in toys]
    right = np.mean([a == toy.label for a, toy in zip(said, toys, strict=True)])
    assert mhim or right >= 0.95

    weights = (folder / "out" / "head.safetensors").stat().st_mtime_ns
    assert command(folder, *more) == 0  # already done
    assert (folder / "out" / "head.safetensors").stat().st_mtime_ns == weights
    assert command(folder, *more, "--seed", "1") == 1
    assert "another training" in capsys.readouterr().err


def test_a_training_goes_on_where_it_was_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import workers.training.mil as mil

    more = [*QUICK, "--folds", "1"]
    save, saved = mil._save, []
    last = 0

    def once(path: Path, *rest: Any) -> None:
        save(path, *rest)
        saved.append(path)
        if len(saved) == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(mil, "_save", once)
    assert command(folder, *more, out="whole") == 0
    epochs, last = len(saved), 5
    for fresh in ([], ["--fresh"]):  # the second where the first has finished
        saved.clear()
        assert command(folder, *more, *fresh, out="parts") == 130
        assert command(folder, *more, *fresh, out="parts") == 0
        assert len(saved) == epochs
        assert report_of(folder, "parts").sha256 == report_of(folder, "whole").sha256
    assert (folder / "parts" / "train.json.old-1").exists()
    assert len(report_of(folder, "whole").tested) < 12


def test_checkpoints_are_kept_for_the_same_training_alone(tmp_path: Path) -> None:
    def kept(identity: str, fresh: bool) -> bool:
        """Whether a checkpoint was there; afterwards there is one."""
        checkpoint = _checkpoints(tmp_path, identity, fresh) / "head.pt"
        there = checkpoint.exists()
        checkpoint.touch()
        return there

    assert not kept("a", fresh=False)
    assert kept("a", fresh=False)
    assert not kept("a", fresh=True)
    assert kept("a", fresh=True)
    assert kept("a", fresh=False)
    with pytest.raises(StoreError, match="cut short"):
        kept("b", fresh=False)
    assert not kept("b", fresh=True)
    (tmp_path / "train.json").touch()
    assert not kept("b", fresh=True)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "features" / name).unlink()


def replaced(features: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "features" / "s0.npy", features)


def listed(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "slides.csv"
        path.write_text(path.read_text().replace(old, new))

    return spoil


def as_wide_as(tile_l0: int, mpp: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with h5py.File(folder / "features" / "s1.h5", "a") as file:
            file["coords"].attrs.update({"tile_level0": (tile_l0, tile_l0), "mpp": mpp})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "more", "code", "words"),
    [
        (without("s0.npy"), [], 1, "s0.svs: 0 places of its features"),
        (listed("s1.svs", "a/s0.svs"), [], 1, "s0.npy: found as the features of 2 slides"),
        (listed("nine", "minus"), [], 2, "'minus' means something else as a target"),
        (as_wide_as(128, 0.25), [], 2, "its tiles are 32 um wide"),
        (replaced(np.zeros((2, 9), np.float32)), [], 1, "numbers a tile"),
        (replaced(np.full((2, 32), np.nan, np.float32)), [], 1, "2 of 2 tiles"),
        (replaced(np.zeros((0, 32), np.float32)), [], 1, "at least one tile"),
        (replaced(np.zeros((2, 32), int)), [], 1, "expected floats"),
        (lambda _: None, ["--head", "abmill"], 2, "abmill"),
        (lambda _: None, ["--head", "transmil"], 1, "positions are never invented"),
        (lambda _: None, ["--mhim", "v3"], 2, "--mhim v3"),
        (lambda _: None, ["--head", "mean", "--mhim", "v1"], 2, "MeanHead"),
        (lambda _: None, ["--args", '{"depth": 3}'], 2, "depth"),
        (lambda _: None, ["--args", "{"], 2, "--args {"),
        (lambda _: None, ["--loss", "hinge"], 2, "--loss hinge"),
        (lambda _: None, ["--folds", "11"], 2, "fewer"),
        (lambda _: None, ["--classes", "nine,ten"], 2, "labels clear, nine"),
    ],
)
def test_what_cannot_be_trained_is_said_before_any_training(
    folder: Path, spoil: Callable[[Path], None], more: list[str], code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(folder)
    assert command(folder, *more) == code
    assert words in capsys.readouterr().err
    assert not list((folder / "out").glob("*")) if (folder / "out").exists() else True


@pytest.mark.usefixtures("no_pictures")
def test_features_of_an_explained_slide_say_whose_they_are(tmp_path: Path) -> None:
    card = write_bag_card(tmp_path, "mean")
    slide = "procedural:slide?width=600&height=400&tissue=0.5&seed=7"
    report = explain(
        slide, card, tmp_path / "run", bag_methods=("contribution",), inside=InsideSpec(top=0), tissue="none"
    )
    tiles = tiles_of(report)
    bag = Bag(tiles.path, tiles.info)
    case = Case(slide, 0, "p", features=report.images[0].output)
    source = FeatureSource("", load_card(card), ordered=True)
    assert np.array_equal(source(case), bag.features(bag.rows()))  # planned row by row
    assert source.digests == {tiles.info.spec.card["state_sha256"]}
    (tmp_path / "model.toml").write_text(ENCODER.format(sha="0" * 64))
    with pytest.raises(ModelError, match="another network"):
        FeatureSource("", load_card(tmp_path / "model.toml"), ordered=False)(case)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the card of an encoder, and the `tiles.zarr` of a slide of six tiles that it embedded."""
    folder = tmp_path_factory.mktemp("embedded")
    request = ExplainRequest(
        images=("procedural:slide?width=600&height=300&tissue=0.9&seed=0",),
        model=write_encoder_card(folder),
        out=str(folder / "run"),
        tissue="none",
    )
    report = embed_batch(request, PoolSettings(kind="serial", threads=1), ignore)
    (Path(report.images[0].output) / "tiles.zarr").rename(folder / "tiles.zarr")
    return folder


@pytest.fixture
def stores(tmp_path: Path, embedded: Path) -> Path:
    """A CSV of six slides with a split, their features as `embed` leaves them, the encoder's card."""
    lines = ["image,label,patient,split"]
    for i in range(6):
        shutil.copytree(embedded / "tiles.zarr", tmp_path / "features" / f"s{i}-{i:08x}" / "tiles.zarr")
        lines.append(f"s{i}.svs,{('clear', 'nine')[i % 2]},p{i},{('train', 'val', 'test')[i // 2]}")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    (tmp_path / "encoder").mkdir()
    shutil.copy(embedded / "model.toml", tmp_path / "encoder")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("spec.card.input.mean", [0.5], 2, "input.mean (there [0.5], asked [])"),
        ("spec.grid.tile_px", [256, 256], 2, "tile (there [256, 256], asked [128, 128])"),
        ("spec.cam.precision", "fast-bf16", 1, "computed with fast-bf16, fp32"),
        ("embedding", 0, 1, "tiles were explained, not embedded"),
    ],
)
def test_stores_that_were_made_otherwise_are_refused(
    stores: Path, key: str, value: Any, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = stores / "features" / "s5-00000005" / "tiles.zarr" / "zarr.json"
    document = place = json.loads(ledger.read_text())
    *path, name = f"attributes.gigacam.{key}".split(".")
    for part in path:
        place = place[part]
    place[name] = value
    ledger.write_text(json.dumps(document))
    assert command(stores, "--head", "mean") == code
    assert words in capsys.readouterr().err
    assert not (stores / "out").exists()


def test_tiles_that_are_in_no_bag_are_noted(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store: Any = zarr.open_group(stores / "features" / "s3-00000003" / "tiles.zarr", mode="r+")
    store["status/embed"][0] = TileStatus.FAILED
    assert command(stores, "--head", "mean", "--epochs", "1") == 0
    note = f"1 of 6 tiles of {stores / 's3.svs'} have no features and are not in its bag"
    assert report_of(stores).notes == (note,)
    assert f"note: {note}" in capsys.readouterr().out
    assert _notes(["one slide"] * (NOTES + 2))[NOTES - 1 :] == (
        "one slide",
        "2 more slides have tiles without features",
    )


def test_features_are_those_of_the_slide_itself(tmp_path: Path) -> None:
    """The folder of `S21-1234-2.svs` begins like one of `S21-1234.svs`."""
    (tmp_path / "model.toml").write_text(ENCODER.format(sha="0" * 64))
    source = FeatureSource(str(tmp_path), load_card(tmp_path / "model.toml"), ordered=False)
    one, other = Case("S21-1234.svs", 0, "p"), Case("S21-1234-2.svs", 1, "q")
    store = tmp_path / "S21-1234-2-0123abcd" / "tiles.zarr"
    store.mkdir(parents=True)
    assert source.path(other) == store
    with pytest.raises(SourceError, match="0 places of its features"):
        source.path(one)
    (tmp_path / "S21-1234-0123abcd" / "tiles.zarr").mkdir(parents=True)
    source.check_apart([one, other])
    with pytest.raises(SourceError, match=r"2 slides: S21-1234-2.svs, again.svs"):
        source.check_apart([one, other, Case("again.svs", 1, "r", features=str(store.parent))])


def test_feature_files(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = features[None]
        file["coords"] = np.arange(10).reshape(1, 5, 2)
        file["coords"].attrs["patch_size_level0"] = np.int64(512)
    found = read_features(tmp_path / "a.h5")
    assert np.array_equal(found.features, features)
    assert found.features.dtype == np.float16
    assert found.corner_l0 is not None
    assert found.corner_l0[1].tolist() == [3, 2]  # (x, y) = (2, 3)
    assert json.loads(json.dumps(found.attributes)) == {"patch_size_level0": 512}
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["embedding"] = features
    (tmp_path / "c.h5").write_bytes(b"no")
    for name, words in (("b.h5", "it has embedding"), ("c.h5", "no readable"), ("d.npy", "no readable")):
        with pytest.raises(SourceError, match=words):
            read_features(tmp_path / name)
