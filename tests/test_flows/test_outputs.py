"""The whole path with networks that give no class logits: masks, embeddings, sequences, values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from schemas.errors import ModelError, SpecError
from schemas.model import CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
from schemas.run import ImageReport, RunReport
from tests.test_flows import networks
from tests.test_flows.runs import explain, heatmap_of, tiles_of
from workers.export.words import target as target_words
from workers.models.card import load_card, write_card
from workers.models.cnn import load_model

pytestmark = pytest.mark.usefixtures("no_pictures")

SLIDE = "procedural:slide?width=300&height=200&tissue=1&seed=2"
VOLUME = "procedural:volume?shape=32,32,32&seed=1"
VECTORS = {"reddish": [2.0, -1, 0], "bluish": [0.0, 0, 3], "unused": [1.0, 1, 1]}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(
    folder: Path, network: dict[str, Any], output: dict[str, Any], layer: str = "pool", **inputs: Any
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"kind": "slide", "channels": 3, "tile": (64, 64), "mpp": 0.5, **inputs}
    card = ModelCard(
        schema=1, name="tiny", version="1", licence="Apache-2.0", intended_use="tests",
        network=NetworkSpec(**network), input=InputSpec(**inputs), output=OutputSpec(**output),
        cam=CamLayer(layer=layer),
    )  # fmt: skip
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


def factory(name: str, **args: Any) -> dict[str, Any]:
    return {"adapter": "factory", "name": f"{networks.__name__}:{name}", "args": args}


def write_unet(folder: Path, ndim: int, **output: Any) -> str:
    """MONAI's BasicUNet, random weights."""
    from monai.networks.nets.basic_unet import BasicUNet

    folder.mkdir(parents=True, exist_ok=True)
    args: dict[str, Any] = {
        "spatial_dims": ndim, "in_channels": 3 if ndim == 2 else 1, "out_channels": 3,
        "features": [4, 4, 8, 8, 8, 4],
    }  # fmt: skip
    torch.manual_seed(0)
    save_file(BasicUNet(**args).state_dict(), folder / "w.safetensors")
    network = {
        "adapter": "monai", "name": "BasicUNet", "args": args, "weights": "w.safetensors",
        "sha256": digest(folder / "w.safetensors"),
    }  # fmt: skip
    inputs: dict[str, Any] = {} if ndim == 2 else {
        "kind": "volume", "channels": 1, "tile": (32, 32, 32), "mpp": None, "spacing_mm": (1, 1, 1), "scale": (0, 1),
    }  # fmt: skip
    output = {"kind": "mask", "classes": ("rest", "gland", "vessel"), **output}
    return write(folder, network, output, "upcat_1.convs.conv_1", **inputs)


def report_of(report: RunReport) -> ImageReport:
    """As it was written."""
    text = (Path(report.images[0].output) / "report.json").read_text()
    return ImageReport.model_validate(json.loads(text))


def maps_in(report: RunReport) -> NDArray[np.float32]:
    """HiResCAM of every tile and target `(tiles, T, *grid)`."""
    tiles = tiles_of(report)
    rows = np.arange(tiles.info.planned)
    return np.stack(
        [tiles.maps_of("hirescam", t, rows) for t in range(len(tiles.info.spec.cam.targets))], axis=1
    )


@pytest.mark.parametrize(("ndim", "image"), [(2, SLIDE), (3, VOLUME)])
def test_a_segmentation_network_is_explained(tmp_path: Path, ndim: int, image: str) -> None:
    card = write_unet(tmp_path / "m", ndim)
    report = explain(
        image, card, tmp_path / "out", methods=("hirescam", "gradcam"), targets=("all", "gland~vessel"), tissue="none",
        batch=2,
    )  # fmt: skip
    assert report.exit_code == 0, report.images[0].error
    tiles, found = tiles_of(report), report_of(report)
    scores = tiles.scores()
    model = load_model(load_card(card))
    assert scores.shape == (tiles.info.planned, 3)
    assert np.isfinite(scores).all()
    assert [p.target for p in found.prediction] == ["rest", "gland", "vessel"]
    assert {p.quantity for p in found.prediction} == {
        "sum of the logit over the pixels where the class is predicted"
    }
    assert [c.label for c in found.channels][:4] == [
        "hirescam:rest",
        "hirescam:gland",
        "hirescam:vessel",
        "hirescam:gland~vessel",
    ]
    assert {c.unit for c in found.channels} == {"logit", "logit/cell"}
    assert target_words(found.channels[3]) == "Target: gland rather than vessel"
    maps = maps_in(report)
    np.testing.assert_allclose(maps[:, 3], maps[:, 1] - maps[:, 2], atol=1e-4 * abs(maps[:, 3]).max())
    assert abs(maps[:, 3]).max() > 0
    # by hand: the logits of the tile where each class wins
    x = torch.rand(2, *(model.card.input.channels, *model.card.input.tile))
    output = model.net.module(x).detach()
    won = output.argmax(1)
    expected = [[float(output[b, c][won[b] == c].sum()) for c in range(3)] for b in range(2)]
    torch.testing.assert_close(model.scores(x), torch.tensor(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_an_embedding_network_is_explained(tmp_path: Path, similarity: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({n: torch.tensor(v) for n, v in VECTORS.items()}, folder / "refs.safetensors")
    output = {
        "kind": "embedding", "classes": ("reddish", "bluish"), "references": "refs.safetensors",
        "references_sha256": digest(folder / "refs.safetensors"), "similarity": similarity,
    }  # fmt: skip
    card = write(folder, factory("embedder", cell=16), output)
    report = explain(SLIDE, card, tmp_path / "out", methods=("hirescam",), tissue="none")
    assert report.exit_code == 0, report.images[0].error
    tiles, found = tiles_of(report), report_of(report)
    scores, maps = tiles.scores(), maps_in(report)
    words = {"cosine": "cosine similarity to the reference", "dot": "dot product with the reference"}
    assert {p.quantity for p in found.prediction} == {words[similarity]}
    assert {c.unit for c in found.channels} == {"score"}
    if similarity == "dot":
        np.testing.assert_allclose(maps.sum((2, 3)), scores, rtol=1e-5)
    else:
        assert (abs(scores) <= 1 + 1e-6).all()
        # a cosine does not change with the size of the embedding: along it, its gradient is 0
        np.testing.assert_allclose(maps.sum((2, 3)), 0, atol=1e-5)
        assert abs(maps).max() > 1e-4


def test_reference_vectors_are_those_of_the_card(tmp_path: Path) -> None:
    save_file({n: torch.tensor(v) for n, v in VECTORS.items()}, tmp_path / "refs.safetensors")
    output = {
        "kind": "embedding", "classes": ("reddish",), "references": "refs.safetensors",
        "references_sha256": digest(tmp_path / "refs.safetensors"),
    }  # fmt: skip
    for change, words in (
        ({"references_sha256": "0" * 64}, "not the one that the model card means"),
        ({"classes": ("greenish",)}, "has no vector greenish; it has bluish, reddish, unused"),
    ):
        card = write(tmp_path, factory("embedder", cell=16), {**output, **change})
        with pytest.raises(ModelError, match=words):
            load_model(load_card(card))


def test_a_sequence_is_explained_symbol_by_symbol(tmp_path: Path) -> None:
    output = {"kind": "sequence", "prefix": "fixed", "vocabulary": ("red", "green", "blue")}
    card = write(tmp_path / "m", factory("two_words", cell=16), output)
    report = explain(
        SLIDE, card, tmp_path / "out", methods=("hirescam", "gradcam"), targets=("all", "sum"), tissue="none"
    )
    assert report.exit_code == 0, report.images[0].error
    tiles, found = tiles_of(report), report_of(report)
    maps, index = maps_in(report), tiles.target_index()
    assert (maps[:, 0, :, 2:] == 0).all()
    assert (maps[:, 1, :, :2] == 0).all()
    np.testing.assert_allclose(maps[:, 0] + maps[:, 1], maps[:, 2], rtol=1e-6)
    np.testing.assert_allclose(maps[:, :2].sum((2, 3)), tiles.scores(), rtol=1e-5)
    assert (index[:, 2] == -1).all()
    assert [p.target for p in found.prediction] == ["symbol 0", "symbol 1"]
    for position, row in enumerate(found.prediction):
        assert row.quantity == "logit of the symbol emitted at the position"
        assert sum(row.symbols.values()) == tiles.info.planned
        emitted = [("red", "green", "blue")[i] for i in index[:, position]]
        assert row.symbols == {name: emitted.count(name) for name in row.symbols}


def test_what_lowers_a_value_has_a_channel_of_its_own(tmp_path: Path) -> None:
    output = {"kind": "regression", "classes": ("age", "grade", "dose"), "default_target": "minus~age"}
    card = write(tmp_path / "m", factory("pooled_channels", cell=16), output)
    report = explain(
        SLIDE, card, tmp_path / "out", methods=("hirescam",), targets=("age", "minus~age"), tissue="none"
    )
    assert report.exit_code == 0, report.images[0].error
    maps = maps_in(report)
    np.testing.assert_array_equal(maps[:, 1], -maps[:, 0])
    channels = heatmap_of(report).info.channels
    assert [c.label for c in channels] == ["hirescam:age", "hirescam:minus~age"]
    assert channels[0].unit == "score"
    assert target_words(channels[1]) == "Target: what speaks against age, or lowers it"
    assert report_of(report).prediction[0].quantity == "value"


def test_a_target_that_there_is_not_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    card = write_unet(tmp_path / "m", 2)
    for name in ("predicted", "gland~bone", "sum"):
        with pytest.raises(SpecError, match=r"rest|one of the classes"):
            explain(SLIDE, card, tmp_path / "out", targets=(name,))
    assert not (tmp_path / "out").exists()
