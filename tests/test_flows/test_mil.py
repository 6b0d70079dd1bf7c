"""A slide's decision along the whole path: embedded, decided, attributed to its tiles, explained inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from zarr.storage import LocalStore

from schemas.bag import InsideSpec
from schemas.errors import ModelError, SpecError
from schemas.geometry import Box
from schemas.heatmap import Coverage, HeatmapSpec
from schemas.run import PoolSettings, RunReport
from tests.test_flows.networks import write_bag_card
from tests.test_flows.runs import explain, heatmap_of, stored_bytes, tiles_of, values_of
from tests.test_flows.test_resume import DyingDisk, Killed
from workers.models.bags import load_head
from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.readers import open_image
from workers.store.bags import Bag

SLIDE = "procedural:slide?width=1530&height=1021&tissue=0.5&seed=7"
ASKED: dict[str, Any] = {
    "bag_methods": ("attention", "contribution"),
    "methods": ("hirescam", "gradcam"),
    "unit": 5,
    "batch": 2,
    "tissue": "none",
    "heatmap": HeatmapSpec(downsample=16),
}
STORES = ("tiles.zarr", "heatmap.ome.zarr")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bag_card(tmp_path_factory.mktemp("card"), "abmil_gated", args={"hidden": 4, "size": 4})


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
    return report


def folder_of(report: RunReport) -> Path:
    return Path(report.images[0].output)


def bag_of(report: RunReport) -> Bag:
    tiles = tiles_of(report)
    return Bag(tiles.path, tiles.info)


def assert_same_stores(one: Path, other: Path) -> None:
    for store in STORES:
        a, b = stored_bytes(one / store), stored_bytes(other / store)
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name]] == []


def assert_end_to_end(report: RunReport, card: str, rows: NDArray[np.int64]) -> None:
    """Features, decision and maps of the bag of `rows` are those of one graph of all tiles, in float64."""
    info, image = tiles_of(report).info, report.images[0]
    loaded = load_card(card)
    model, head = load_model(loaded), load_head(loaded).double()
    reader = open_image(info.image.uri, info.spec.read)
    pixels = []
    for start, stop in tiles_of(report).boxes(rows).tolist():
        box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
        pixels.append(reader.read(box, info.lattice.tile_px, info.lattice.level)[0])
    reader.close()
    a = model.net.trunk(model.prepare(np.stack(pixels))).double().requires_grad_()
    h = a.flatten(2).sum(2)
    logits = head(h)
    assert image.bag is not None
    np.testing.assert_allclose(bag_of(report).features(rows), h.detach(), rtol=1e-5)
    np.testing.assert_allclose(image.bag.logits, logits.detach(), rtol=1e-4)
    assert image.bag.predicted == info.classes[int(logits.argmax())]
    for target, name in enumerate(info.spec.cam.targets):
        index = int(logits.argmax()) if name == "predicted" else info.classes.index(name)
        (g,) = torch.autograd.grad(logits[index], a, retain_graph=True)
        for method, expected in (
            ("hirescam", (a * g).sum(1)),
            ("gradcam", (a * g.mean((2, 3), True)).sum(1)),
        ):
            found = tiles_of(report).maps_of(method, target, rows)
            size = float(expected.detach().abs().max())
            np.testing.assert_allclose(found, expected.detach(), rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize(
    ("head", "bag"),
    [("dsmil", {}), ("transmil", {"args": {"hidden": 16}, "order": "row_col"})],
    ids=["dsmil", "transmil"],
)
def test_any_head_is_explained_by_the_chain_rule(tmp_path: Path, head: str, bag: dict[str, Any]) -> None:
    """Whatever its classes are called."""
    card = write_bag_card(tmp_path / "card", head, classes=("1", "0"), **bag)
    asked = {**ASKED, "bag_methods": (), "targets": ("predicted", "1")}
    report = explain(SLIDE, card, tmp_path / "out", **asked)
    assert report.images[0].status == "complete"
    assert_end_to_end(report, card, np.arange(tiles_of(report).info.planned))


def test_a_bag_is_decided_and_explained(serial: RunReport, card: str) -> None:
    rows = np.arange(tiles_of(serial).info.planned)
    assert_end_to_end(serial, card, rows)
    image, bag = serial.images[0], bag_of(serial)
    assert image.bag is not None
    assert (image.bag.tiles, image.bag.inside) == (len(rows), len(rows))
    assert image.bag.line in image.notes
    assert [c.label for c in image.channels][:4] == [
        "attention:benign", "attention:tumour", "contribution:benign", "contribution:tumour"
    ]  # fmt: skip
    for target in (0, 1):
        assert bag.relevance("attention", target, rows).sum() == pytest.approx(1)
        bias = image.bag.facts["contribution"]["bias"][target]
        total = bag.relevance("contribution", target, rows).sum(dtype=np.float64)
        assert total == pytest.approx(image.bag.logits[target] - bias, rel=1e-5)
        # an encoder that sums its cells: a tile's map adds up to what the slide's score owes its embedding
        inside = tiles_of(serial).maps_of("hirescam", target, rows).sum(axis=(1, 2))
        owed = (bag.gradient(rows)[:, target] * bag.features(rows)).sum(axis=1)
        np.testing.assert_allclose(inside, owed, rtol=1e-4)


def test_a_bag_method_is_painted_over_its_tiles(serial: RunReport) -> None:
    tiles, values = tiles_of(serial), values_of(heatmap_of(serial))
    value = bag_of(serial).relevance("contribution", 1, np.arange(3))
    (y0, x0), (y1, x1) = tiles.boxes()[1].tolist()
    found = values[3, y0 // 16 : y1 // 16, x0 // 16 : x1 // 16]
    np.testing.assert_allclose(found, value[1], rtol=1e-5)
    assert np.unique(value).size == 3


@pytest.mark.ray
def test_ray_actors_give_the_same_bytes(
    tmp_path: Path, card: str, serial: RunReport, three_actors: PoolSettings
) -> None:
    report = explain(SLIDE, card, tmp_path, pool=three_actors, **ASKED)
    assert report.images[0].status == "complete"
    assert_same_stores(folder_of(report), folder_of(serial))
    assert report.images[0].bag == serial.images[0].bag


@pytest.mark.parametrize(
    ("place", "nth"),
    [("features/c/", 2), ("status/embed/c/", 3), ("gradient/c/", 1), ("bag/zarr.json", -1), ("status/explain/c/", 1)],
)  # fmt: skip
def test_killed_anywhere_it_resumes(
    tmp_path: Path,
    card: str,
    serial: RunReport,
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    nth: int,
) -> None:
    keys = [i for i, key in enumerate(written) if f"/tiles.zarr/{place}" in key]
    with monkeypatch.context() as patched:
        DyingDisk(patched, keys[nth])
        with pytest.raises(Killed):
            explain(SLIDE, card, tmp_path / "out", **ASKED)
    resumed = explain(SLIDE, card, tmp_path / "out", **ASKED)
    assert resumed.images[0].status == "complete"
    assert_same_stores(folder_of(resumed), folder_of(serial))
    assert resumed.images[0].bag == serial.images[0].bag


def test_a_tile_that_cannot_be_read_is_not_in_the_bag(
    tmp_path: Path, card: str, serial: RunReport, unreadable: list[list[int]]
) -> None:
    """Nor in the maps; read in a retry, it changes the decision, and with it every map."""
    row, planned = 7, tiles_of(serial).info.planned
    box = tiles_of(serial).boxes()[row]
    unreadable.append(box[0].tolist())
    report = explain(SLIDE, card, tmp_path, **ASKED)
    image = report.images[0]
    assert image.status == "gaps"
    assert [(f.tile, f.reason.startswith("not in the bag: read: damaged")) for f in image.failures] == [
        (row, True)
    ]
    assert image.bag is not None
    assert image.bag.tiles == planned - 1
    assert_end_to_end(report, card, np.delete(np.arange(planned), row))
    y, x = (box.mean(axis=0) / 16).astype(int).tolist()
    heatmap = heatmap_of(report)
    assert np.isnan(values_of(heatmap)[:, y, x]).all()
    assert heatmap.coverage(0)[y, x] == Coverage.FAILED

    unreadable.clear()
    again = explain(SLIDE, card, tmp_path, retry_failed=True, **ASKED)
    assert again.images[0].status == "complete"
    assert_same_stores(folder_of(again), folder_of(serial))
    assert again.images[0].bag == serial.images[0].bag


def test_no_tile_that_can_be_read(
    tmp_path: Path, card: str, serial: RunReport, unreadable: list[list[int]]
) -> None:
    unreadable += tiles_of(serial).boxes()[:, 0].tolist()
    image = explain(SLIDE, card, tmp_path, **ASKED).images[0]
    assert image.status == "failed"
    assert "the bag is empty" in image.error
    assert "damaged" in image.error


def test_a_tile_whose_embedding_differs_has_no_map(
    tmp_path: Path, card: str, serial: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Bag.features

    def other(self: Bag, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        found = features(self, rows)
        if len(rows) < self.info.planned:  # where tiles are explained, not where the bag is decided
            found[rows == 3] *= [-1, 1, 1]
        return found

    monkeypatch.setattr(Bag, "features", other)
    image = explain(SLIDE, card, tmp_path, **ASKED).images[0]
    assert image.status == "gaps"
    ((tile, reason),) = [(f.tile, f.reason) for f in image.failures]
    assert tile == 3
    assert reason.startswith("embedding differs: computed again it has cosine")
    assert image.bag == serial.images[0].bag


def test_bag_methods_alone_read_each_tile_once(
    tmp_path: Path, card: str, serial: RunReport, unreadable: list[list[int]]
) -> None:
    report = explain(SLIDE, card, tmp_path, **{**ASKED, "inside": InsideSpec.parse("none")})
    image = report.images[0]
    assert image.status == "complete"
    assert {c.method for c in image.channels} == {"attention", "contribution"}
    assert image.bag is not None
    assert serial.images[0].bag is not None
    assert image.bag.logits == serial.images[0].bag.logits
    assert not any(name.startswith(("gradient", "maps")) for name in stored_bytes(tiles_of(report).path))
    np.testing.assert_array_equal(values_of(heatmap_of(report)), values_of(heatmap_of(serial))[:4])


@pytest.mark.parametrize("inside", ["0.2+0.3", "0+0.3"])
def test_tiles_left_out_inside_are_no_zeros(
    tmp_path: Path, card: str, serial: RunReport, inside: str
) -> None:
    """The most relevant ones and a sample: NaN elsewhere, and a label of its own says why; bag methods have all."""
    spec = InsideSpec.parse(inside)
    report = explain(SLIDE, card, tmp_path, **{**ASKED, "inside": spec})
    image, tiles, heatmap = report.images[0], tiles_of(report), heatmap_of(report)
    assert image.status == "complete"
    assert image.bag is not None
    rows = np.arange(tiles.info.planned)
    shares = (image.bag.inside, image.bag.sampled)
    assert shares == (np.ceil(spec.top * len(rows)), np.ceil(spec.sample * len(rows)))
    chosen = bag_of(report).inside(rows)
    assert chosen.sum() == sum(shares)
    relevance = np.abs(bag_of(report).relevance("attention", 0, rows))
    assert chosen[np.argsort(-relevance)[: shares[0]]].all()
    for method in ("hirescam", "gradcam"):
        maps, whole = (tiles_of(r).maps_of(method, 1, rows) for r in (report, serial))
        assert (np.isfinite(maps).all(axis=(1, 2)) == chosen).all()
        np.testing.assert_allclose(maps[chosen], whole[chosen], rtol=0, atol=1e-5 * np.abs(whole).max())
    values, codes = values_of(heatmap), heatmap.coverage(0, len(image.channels) - 1)[:]
    assert (heatmap.coverage(0)[:] == Coverage.EVALUATED).all()
    assert (np.isfinite(values[:4])).all()
    for channel in range(4, len(image.channels)):
        assert (np.isfinite(values[channel]) == (codes == Coverage.EVALUATED)).all()
    assert set(np.unique(codes).tolist()) == {Coverage.EVALUATED, Coverage.LEFT_OUT}
    for level in range(1, len(heatmap.info.grid.levels)):
        finite = np.isfinite(values_of(heatmap, level)[-1])
        assert (finite == (heatmap.coverage(level, len(image.channels) - 1)[:] == Coverage.EVALUATED)).all()


def write_features(path: Path, report: RunReport, **changes: Any) -> Path:
    """The features of a run as CLAM writes them, in another order; `changes`: datasets and attributes to replace."""
    tiles, bag = tiles_of(report), bag_of(report)
    rows = np.arange(tiles.info.planned)
    order = np.random.default_rng(0).permutation(len(rows))
    data = {
        "features": bag.features(rows)[order].astype(np.float16).astype(np.float32),
        "coords": tiles.boxes(rows)[order, 0, ::-1],
    }
    attributes = {"patch_size": 256, "patch_level": 0, **changes.pop("attributes", {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in (data | changes).items():
            if values is not None:
                file[name] = values(data[name]) if callable(values) else values
        if "coords" in file:
            file["coords"].attrs.update(attributes)
    return path


def test_features_made_elsewhere_are_explained(tmp_path: Path, card: str, serial: RunReport) -> None:
    """In another order and half precision: the same bag; 8 tiles embedded again say that it is this encoder's."""
    path = write_features(tmp_path / "f" / "procedural_slide.h5", serial)
    report = explain(SLIDE, card, tmp_path / "out", features=str(path), **ASKED)
    image, reference = report.images[0], serial.images[0]
    assert image.status == "complete"
    assert image.bag is not None
    assert reference.bag is not None
    assert image.bag.encoder.startswith("imported; 8 tiles embedded again have a cosine of at least ")
    np.testing.assert_array_equal(tiles_of(report).boxes(), tiles_of(serial).boxes())
    np.testing.assert_allclose(image.bag.logits, reference.bag.logits, rtol=1e-2)
    rows = np.arange(tiles_of(report).info.planned)
    np.testing.assert_allclose(bag_of(report).features(rows), bag_of(serial).features(rows), rtol=1e-3)
    maps, whole = (tiles_of(r).maps_of("hirescam", 1, rows) for r in (report, serial))
    np.testing.assert_allclose(maps, whole, atol=1e-2 * np.abs(whole).max())


def test_features_that_are_accepted_are_explained(tmp_path: Path, card: str, serial: RunReport) -> None:
    """Another decoder's, say: near enough to be this encoder's, further off than a second computation."""

    def turned(features: NDArray[np.float32]) -> NDArray[np.float32]:
        across = np.cross(features, [1, -2, 1])
        across *= np.linalg.norm(features, axis=1, keepdims=True) / np.linalg.norm(
            across, axis=1, keepdims=True
        )
        return (features + 0.03 * across).astype(np.float32)  # the cosine is 0.99955

    path = write_features(tmp_path / "turned.h5", serial, features=turned)
    asked = {**ASKED, "bag_methods": ("attention",), "methods": ("hirescam",)}
    report = explain(SLIDE, card, tmp_path / "out", features=str(path), **asked)
    image = report.images[0]
    assert image.failures == ()
    assert image.bag is not None
    assert "a cosine of at least 0.9995" in image.bag.encoder
    assert (heatmap_of(report).coverage(0)[:] == Coverage.EVALUATED).all()


BAD_FEATURES = [
    ({"features": lambda f: f[:0], "coords": lambda c: c[:0]}, "the bag is empty"),
    ({"features": lambda f: f[:, :2]}, "2 numbers a tile, the bag head reads 3"),
    (
        {"features": lambda f: np.where(np.arange(len(f))[:, None] == 4, np.nan, f)},
        "1 of 24 tiles have features",
    ),
    ({"features": lambda f: f * np.array([1, -1, 1], np.float32)}, "another encoder's, or of other pixels"),
    ({"coords": None}, "positions are never invented"),
    ({"coords": lambda c: c + 700}, "lie off the slide"),
    (
        {"attributes": {"patch_size_level0": 512}},
        "its tiles are 512 level-0 px wide, those of the card are 256 x 256",
    ),
]


@pytest.mark.parametrize(("changes", "complaint"), BAD_FEATURES, ids=[c for _, c in BAD_FEATURES])
def test_bad_features_are_refused(
    tmp_path: Path, card: str, serial: RunReport, changes: dict[str, Any], complaint: str
) -> None:
    path = write_features(tmp_path / "bad.h5", serial, **changes)
    image = explain(SLIDE, card, tmp_path / "out", features=str(path), **ASKED).images[0]
    assert image.status == "failed"
    assert complaint in image.error
    assert not image.channels


BAD_REQUESTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"encoder_digest": "0" * 64}, {}, "trained on the features of another encoder"),
    ({"features": 4}, {}, "the encoder gives 3 numbers a tile"),
    ({}, {"methods": ("eigencam_slide",)}, "--method eigencam_slide: sums over the image first"),
    ({}, {"bag_methods": ("atention",)}, "--bag-method atention: unknown; did you mean attention"),
    ({"head": "dsmil"}, {"bag_methods": ("contribution",)}, "--bag-method contribution: bag method"),
    ({}, {"features": "f.h5", "mask": "m.png"}, "--features: the bag is the file's tiles"),
]


@pytest.mark.parametrize(("bag", "asked", "complaint"), BAD_REQUESTS, ids=[c for *_, c in BAD_REQUESTS])
def test_a_wrong_request_is_refused_before_any_work(
    tmp_path: Path, bag: dict[str, Any], asked: dict[str, Any], complaint: str
) -> None:
    card = write_bag_card(tmp_path / "card", **{"head": "mean", **bag})
    with pytest.raises((SpecError, ModelError), match=complaint):
        explain(SLIDE, card, tmp_path / "out", **{**ASKED, **asked})
    assert not (tmp_path / "out").exists()


def test_an_empty_bag_and_a_bag_of_one(tmp_path: Path, card: str) -> None:
    blank = explain("procedural:slide?width=500&height=500&tissue=0&seed=1", card, tmp_path / "blank").images[
        0
    ]
    assert blank.status == "failed"
    assert "the bag is empty: no tile holds enough tissue" in blank.error
    one = {"tissue": "none", "bag_methods": ("attention",)}
    alone = explain("procedural:slide?width=256&height=256&tissue=1&seed=1", card, tmp_path / "one", **one)
    assert alone.images[0].status == "complete"
    assert bag_of(alone).relevance("attention", 0, np.arange(1)).tolist() == [1]
    dropped = {**one, "bag_methods": ("drop_one",)}
    image = explain(
        "procedural:slide?width=256&height=256&tissue=1&seed=1", card, tmp_path / "drop", **dropped
    )
    assert image.images[0].status == "failed"
    assert (
        "drop_one has no value for 1 of 1 tiles; a bag of one tile has none left without it"
        in image.images[0].error
    )


@pytest.mark.parametrize("text", ["all", "none", "0.25", "0.1+0.02", "0+0.3"])
def test_shares_inside_are_read_as_they_are_written(text: str) -> None:
    assert str(InsideSpec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "1.5", "-0.1", "0.1+", "some", "0.1+0.2+0.3"])
def test_other_shares_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--inside .*: expected all, none, a share"):
        InsideSpec.parse(text)
