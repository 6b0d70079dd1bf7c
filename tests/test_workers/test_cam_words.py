"""Ranked channels and their names: the ranking is Grad-CAM's, the claim is checked by taking channels away."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.model import CamLayer, ChannelName
from tests.test_workers.tiny_networks import conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.view import Batch, View
from workers.cam.words import evidence, importance, names_of, without
from workers.models.card import load_card, resolved, write_card

NUCLEI = ChannelName(name="lymphocyte nuclei", score=0.11, provenance="IoU, network dissection, PanNuke")


def view_of(net: HookedNet, x: Tensor, target: Tensor) -> View:
    with torch.no_grad():
        return View(Batch(net, x, net.forward(x), torch.arange(len(x))), target)


def one(c: int) -> Tensor:
    return torch.eye(3)[c : c + 1]


def test_importance_is_grad_cams_weight() -> None:
    net, x = conv_net(2, head="gap"), tiles(2)
    found = importance(view_of(HookedNet(net, "relu"), x, one(1)))
    torch.testing.assert_close(
        found, net.fc.weight[1].detach().expand(4, -1) / (9 * 13), rtol=1e-5, atol=1e-9
    )


def test_ranking_and_text() -> None:
    weights = torch.tensor([[3.0, -1, 0, 5, -4, 1], [1.0, -1, 0, 1, -2, 1]])
    found = evidence("tumour", weights, {3: NUCLEI}, n=2)
    assert [(n.channel, n.importance) for n in found.supports] == [(3, 3.0), (0, 2.0)]
    assert [(n.channel, n.importance) for n in found.opposes] == [(4, -3.0), (1, -1.0)]
    assert found.lines == (
        "evidence for tumour: lymphocyte nuclei (unit 3, score 0.11, IoU, network dissection, PanNuke) +3; unit 0 +2",
        "evidence against tumour (their absence would help): unit 4 -3; unit 1 -1",
    )
    every = evidence("it", weights)
    assert [n.channel for n in every.supports] == [3, 0, 5]
    assert [n.channel for n in every.opposes] == [4, 1], "a channel of importance 0 is neither"
    assert str(evidence("it", torch.eye(500)[417:418]).supports[0]) == "unit 417"
    assert evidence("it", -torch.ones(1, 2)).lines[0] == "evidence for it: none"
    assert len(evidence("it", torch.arange(1.0, 9).view(1, 8)).supports) == 5


def test_tiles_that_are_not_finite_are_left_out() -> None:
    weights = torch.tensor([[1.0, 2], [torch.nan, 9], [3, 2]])
    assert [(n.channel, n.importance) for n in evidence("it", weights).supports] == [(0, 2.0), (1, 2.0)]
    with pytest.raises(SpecError, match="none of 1 tiles"):
        evidence("it", weights[1:2])
    with pytest.raises(SpecError, match=r"channel 7, but the layer has 2"):
        evidence("it", weights, {7: NUCLEI})


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_behind_a_linear_head_a_channel_is_worth_what_its_map_says(ndim: int) -> None:
    net, x = HookedNet(conv_net(ndim, head="gap"), "relu"), tiles(ndim)
    for target in (one(0), torch.tensor([[1.0, -1, 0]])):
        view = view_of(net, x, target)
        ranked = evidence("it", importance(view))
        for neurons, sign in ((ranked.supports, -1), (ranked.opposes, 1)):
            channels = [n.channel for n in neurons]
            assert channels
            change = without(view, channels)
            claimed = (view.a * view.g)[:, channels].sum((1, 2))
            torch.testing.assert_close(change, -claimed, rtol=1e-4, atol=1e-6)
            assert (sign * change >= 0).all()
        assert without(view, []).abs().max() < 1e-6


def test_taking_supporting_channels_away_lowers_the_target_behind_any_head() -> None:
    """No closed form here; but on average over tiles the ranking's first channel must not be worth less than none."""
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=8)
    view = view_of(net, x, one(2))
    first = evidence("it", importance(view), n=1)
    assert (
        without(view, [first.supports[0].channel]).mean()
        < 0
        < without(view, [first.opposes[0].channel]).mean()
    )


def test_names_are_of_one_layer() -> None:
    cam = CamLayer(layer="layer4", channels={417: NUCLEI})
    assert names_of(cam, "layer4") == {417: NUCLEI}
    assert names_of(cam, "layer3") == {}


CARD = """
schema = 1
name = "n"
version = "1"
licence = "Apache-2.0"
intended_use = "tests"
[network]
adapter = "monai"
name = "DenseNet121"
[input]
kind = "slide"
channels = 3
tile = [64, 64]
mpp = 0.5
[output]
classes = ["a", "b"]
[cam]
layer = "features"
"""

NAMES = """
[cam.channels]
417 = { name = "lymphocyte nuclei", score = 0.11, provenance = "IoU, network dissection, PanNuke" }
"""


def test_a_card_names_channels(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(CARD + NAMES)
    card = load_card(path).card
    assert card.cam.channels == {417: NUCLEI}
    write_card(path, card)
    assert load_card(path).card == card
    assert tomllib.loads(path.read_text())["cam"]["channels"]["417"]["score"] == 0.11
    path.write_text(CARD)
    assert resolved(load_card(path).card) == resolved(card), "names are no part of what identifies a model"


@pytest.mark.parametrize(
    "wrong",
    [
        '417 = "lymphocyte nuclei"',
        '417 = { name = "lymphocyte nuclei" }',
        '417 = { name = "", score = 0.1, provenance = "x" }',
        '417 = { name = "a", score = 0.1, provenance = "" }',
        '-1 = { name = "a", score = 0.1, provenance = "x" }',
        'many = { name = "a", score = 0.1, provenance = "x" }',
    ],
)
def test_a_name_needs_a_channel_a_score_and_its_provenance(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "model.toml"
    path.write_text(f"{CARD}\n[cam.channels]\n{wrong}\n")
    with pytest.raises(ModelError, match="channels"):
        load_card(path)
