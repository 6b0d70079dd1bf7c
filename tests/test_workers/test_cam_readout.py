"""Targets beyond one class, and networks whose output is no row of class logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError, SpecError
from schemas.explanation import MapFlag
from schemas.model import OutputSpec
from tests.test_workers.tiny_networks import CONV, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.readout import Readout, Region, Similarity, Symbols
from workers.cam.targets import resolve
from workers.cam.view import Batch, View

ABC = OutputSpec(classes=("a", "b", "c"))
AGE = OutputSpec(kind="regression", classes=("age", "grade"))
MASK = OutputSpec(kind="mask", classes=("stroma", "gland"))
SAID = OutputSpec(kind="sequence", prefix="fixed")
LINEAR = ["gradcam", "hirescam"]
"""Methods that are linear in the gradient: maps of targets add as targets do."""


def maps_of(
    net: nn.Module, x: Tensor, output: OutputSpec, n: int, *names: str, readout: Readout | None = None
) -> dict[str, Tensor]:
    return explain(HookedNet(net, "relu", readout), x, resolve(names, output, n), LINEAR).maps


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
    assert float(expected.abs().max()) > 0


@pytest.mark.parametrize("head", ["conv", "gap"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_map_of_a_contrast_is_the_difference_of_the_maps(ndim: int, head: str) -> None:
    for maps in maps_of(conv_net(ndim, head=head), tiles(ndim), ABC, 3, "a", "b", "a~b", "minus~b").values():
        same(maps[:, 2], maps[:, 0] - maps[:, 1])
        same(maps[:, 3], -maps[:, 1])


def test_what_lowers_a_value_is_a_map_of_its_own() -> None:
    net = conv_net(2, classes=2)
    up, down = resolve(["age", "minus~age"], AGE, 2)
    done = explain(HookedNet(net, "relu"), tiles(2), (up, down), ["layercam"])
    raised, lowered = done.maps["layercam"][:, 0], done.maps["layercam"][:, 1]
    assert (raised >= 0).all()
    assert (lowered >= 0).all()
    assert raised.max() > 0
    assert lowered.max() > 0
    hires = maps_of(net, tiles(2), AGE, 2, "age")["hirescam"][:, 0]
    same(raised - lowered, hires)  # relu(g) - relu(-g) = g
    assert done.target_index.tolist() == [[0, 0]] * 4


def test_names_of_targets_are_found_again() -> None:
    for output, n, asked, name in (
        (ABC, 3, "2~0", "c~a"),
        (AGE, 2, "minus~0", "minus~age"),
        (SAID, 4, "2", "symbol 2"),
        (SAID, 4, "0~3", "symbol 0~symbol 3"),
        (SAID, 4, "sum", "sum"),
        (MASK, 2, "gland", "gland"),
        (OutputSpec(kind="logit", classes=("no", "yes")), 1, "minus~yes", "minus~yes"),
        (OutputSpec(kind="embedding"), 5, "4", "4"),
    ):
        (target,) = resolve([asked], output, n)
        assert target.name == name
        assert resolve([name], output, n) == (target,)


@pytest.mark.parametrize(
    ("output", "n", "name", "words"),
    [
        (ABC, 3, "a~a", "two different classes"),
        (ABC, 3, "a~d", "no class of this model; expected a name .* a contrast A~B"),
        (ABC, 3, "minus~", "no class"),
        (ABC, 3, "a~b~c", "no class"),
        (ABC, 3, "sum", "no class"),
        (
            OutputSpec(kind="logit", classes=("no", "yes")),
            1,
            "yes~no",
            "the contrast of its two classes already",
        ),
        (MASK, 2, "predicted", "output kind is 'mask'; name one of the classes"),
        (SAID, 4, "predicted", "name one of the positions"),
        (SAID, 4, "4", "index below 4, 'sum'"),
    ],
)
def test_what_is_no_target_says_what_is(output: OutputSpec, n: int, name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        resolve([name], output, n)


def test_one_logit_against_a_class_is_for_the_other() -> None:
    output = OutputSpec(kind="logit", classes=("no", "yes"))
    for maps in maps_of(
        conv_net(2, classes=1), tiles(2), output, 1, "no", "minus~yes", "minus~no", "yes"
    ).values():
        assert torch.equal(maps[:, 0], maps[:, 1])
        assert torch.equal(maps[:, 2], maps[:, 3])


class Segmenter(nn.Module):
    """`relu` at half the resolution, then logits a voxel; linear from `relu` on unless `deep`."""

    def __init__(self, ndim: int, classes: int = 3, *, deep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = CONV[ndim - 1]
        self.body = conv(2, 5, 3, padding=1, stride=2)
        self.relu = nn.ReLU()
        self.deep = conv(5, 5, 3, padding=1) if deep else None
        self.head = conv(5, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.body(x))
        if self.deep is not None:
            a = self.deep(a).tanh()
        out: Tensor = F.interpolate(self.head(a), x.shape[2:], mode="nearest")
        return out


@pytest.mark.parametrize("region", ["predicted", "positive", "tile"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_masks_map_is_that_of_the_sum_over_its_region(ndim: int, region: Any) -> None:
    """Against the whole network differentiated, region by region, voxel by voxel."""
    net, x = Segmenter(ndim, deep=True).double(), tiles(ndim, batch=2).double()
    found = maps_of(net, x, OutputSpec(kind="mask"), 3, "all", readout=Region(region))["hirescam"]
    kept: list[Tensor] = []
    handle = net.relu.register_forward_hook(lambda _m, _i, out: kept.append(out))
    output = net(x)
    handle.remove()
    values = output.detach().numpy()
    for c in range(3):
        y = output.new_zeros(())
        for b in range(len(x)):
            for u in np.ndindex(*x.shape[2:]):
                logits = values[(b, slice(None), *u)]
                inside = {"predicted": logits.argmax() == c, "positive": logits[c] > 0, "tile": True}[region]
                if inside:
                    y = y + output[(b, c, *u)]
        if not y.requires_grad:
            assert (found[:, c] == 0).all()
            continue
        (g,) = torch.autograd.grad(y, kept[0], retain_graph=True)
        same(found[:, c], (g * kept[0]).sum(1).detach().float())
    assert (found.flatten(2) != 0).any(2).sum() >= 3


def test_a_given_region_and_completeness() -> None:
    """Behind a linear tail HiResCAM adds up to the score, but for a bias a voxel of the region."""
    net, x = Segmenter(2), tiles(2)
    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[3:7, 10:20] = True
    split = HookedNet(net, "relu", Region(inside))
    done = explain(split, x, resolve(["all"], OutputSpec(kind="mask"), 3), ["hirescam"])
    torch.testing.assert_close(done.scores, net(x).detach()[:, :, 3:7, 10:20].sum((2, 3)))
    assert net.head.bias is not None
    same(done.maps["hirescam"].sum((2, 3)), done.scores - 40 * net.head.bias.detach())
    # voxels 3..6 read the cells 1..3, voxels 10..19 the cells 5..9
    outside = done.maps["hirescam"].clone()
    outside[:, :, 1:4, 5:10] = 0
    assert (outside == 0).all()


def test_a_region_that_is_empty_gives_an_empty_map_that_says_so() -> None:
    net = Segmenter(2)
    with torch.no_grad():
        assert net.head.bias is not None
        net.head.bias[1] = -100
    targets = resolve(["1", "0"], OutputSpec(kind="mask"), 3)
    done = explain(HookedNet(net, "relu", Region()), tiles(2), targets, ["gradcam"])
    assert (done.scores[:, 1] == 0).all()
    assert (done.flags["gradcam"][:, 0] == MapFlag.EMPTY | MapFlag.CONSTANT).all()
    assert not (done.flags["gradcam"][:, 1] & MapFlag.CONSTANT).any()


@pytest.mark.parametrize("readout", [Region(), Symbols("log_prob")])
def test_what_is_explained_stays_what_it_was_when_the_network_is_run_again(readout: Readout) -> None:
    """Another input has another region, or other symbols; the target's are those of its own tile."""
    net: nn.Module = Segmenter(2) if isinstance(readout, Region) else Speaker()
    x = tiles(2)
    split = HookedNet(net, "relu", readout)
    batch = Batch(split, x, split.forward(x), torch.arange(4))
    rows = torch.tensor([2, 0, 2])
    view = View(batch, torch.tensor([[1.0, 0, 0]]))
    again = split.tail(torch.zeros_like(batch.activations)[rows], x[rows])
    moved = net(torch.flip(x, [0]))[rows]
    assert view.y(again, rows).shape == (3,)
    if isinstance(readout, Region):
        won = net(x).argmax(1) == 0
        expected = torch.where(won[rows], moved[:, 0], 0).sum((1, 2))
        assert not torch.equal(won[rows], moved.argmax(1) == 0)
    else:
        said = net(x)[:, 0].argmax(1)
        expected = moved[:, 0].log_softmax(1)[torch.arange(3), said[rows]]
    torch.testing.assert_close(view.y(moved, rows), expected)


class Encoder(nn.Module):
    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.net = conv_net(ndim, classes=7)
        self.relu = self.net.relu

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_an_embedding_is_compared_with_references(ndim: int, kind: Any) -> None:
    net, x = Encoder(ndim).double(), tiles(ndim, batch=3).double()
    references = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    output = OutputSpec(kind="embedding", classes=("p", "q"), references_sha256="0" * 64, similarity=kind)
    readout = Similarity(references, kind)
    done = explain(HookedNet(net, "relu", readout), x, resolve(["all", "p~q"], output, 2), ["hirescam"])
    kept: list[Tensor] = []
    handle = net.relu.register_forward_hook(lambda _m, _i, out: kept.append(out))
    embedding = net(x)
    handle.remove()
    maps = []
    for i, r in enumerate(references):
        y = torch.stack([e @ r / (e.norm() * r.norm() if kind == "cosine" else 1) for e in embedding])
        torch.testing.assert_close(done.scores[:, i], y.detach().float())
        (g,) = torch.autograd.grad(y.sum(), kept[0], retain_graph=True)
        maps.append((g * kept[0]).sum(1).detach().float())
        same(done.maps["hirescam"][:, i], maps[i])
    same(done.maps["hirescam"][:, 2], maps[0] - maps[1])


def test_an_embedding_without_length_has_no_angle() -> None:
    net = Encoder(2)
    with torch.no_grad():
        net.net.fc.weight.zero_()
        net.net.fc.bias.zero_()
    output = OutputSpec(kind="embedding", classes=("p",), references_sha256="0" * 64)
    split = HookedNet(net, "relu", Similarity(torch.ones(1, 7)))
    done = explain(split, tiles(2), resolve([], output, 1), LINEAR)
    for name in LINEAR:
        assert done.maps[name].isnan().all()
        assert (done.flags[name] == MapFlag.NOT_FINITE).all()


class Speaker(nn.Module):
    """Three symbols of a vocabulary of four: from the left half, from the right half, from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.relu = nn.ReLU()
        self.words = nn.ModuleList([nn.Linear(2, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(x)
        half = a.shape[-1] // 2
        seen = (a[..., :half], a[..., half:], a)
        return torch.stack([w(s.mean((2, 3))) for w, s in zip(self.words, seen, strict=True)], dim=1)


@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_each_symbol_has_its_map_and_they_sum_to_that_of_the_sum(score: Any) -> None:
    net, x = Speaker(), tiles(2)
    output = OutputSpec(kind="sequence", prefix="fixed", symbol_score=score)
    split = HookedNet(net, "relu", Symbols(score))
    done = explain(split, x, resolve(["all", "sum"], output, 3), LINEAR)
    half = x.shape[-1] // 2
    emitted = net(x).argmax(2)
    assert len(set(emitted.flatten().tolist())) > 1
    assert done.target_index.tolist() == [[*row, -1] for row in emitted.tolist()]
    for maps in done.maps.values():
        same(maps[:, :3].sum(1), maps[:, 3])
    hires = done.maps["hirescam"]
    assert (hires[:, 0, :, half:] == 0).all()
    assert (hires[:, 1, :, :half] == 0).all()
    if score == "logit":
        # closed form: the weight of the emitted symbol, times the activation, over the half's cells
        for t, cells in ((0, (slice(None), slice(0, half))), (1, (slice(None), slice(half, None)))):
            weight = net.words[t].weight.detach()[emitted[:, t]]  # type: ignore[operator]
            part = x.relu()[(slice(None), slice(None), *cells)]
            expected = torch.einsum("bk,bkyx->byx", weight, part) / part[0, 0].numel()
            same(hires[(slice(None), t, *cells)], expected)
    torch.testing.assert_close(done.scores.sum(1), _said(net(x).detach(), emitted, score).sum(1))


def _said(out: Tensor, emitted: Tensor, score: str) -> Tensor:
    values = out.log_softmax(2) if score == "log_prob" else out
    return torch.stack(
        [torch.stack([values[b, t, emitted[b, t]] for t in range(out.shape[1])]) for b in range(len(out))]
    )


def test_padding_says_nothing() -> None:
    net, x = Speaker(), tiles(2)
    padding = int(net(x)[0, 0].argmax())
    split = HookedNet(net, "relu", Symbols(padding=padding))
    done = explain(split, x, resolve(["all"], SAID, 3), ["gradcam"])
    silent = net(x).argmax(2) == padding
    assert (done.scores[silent] == 0).all()
    assert (done.maps["gradcam"].flatten(2)[silent] == 0).all()
    assert (done.scores[~silent] != 0).all()


@pytest.mark.parametrize(
    ("net", "readout", "words"),
    [
        (conv_net(2), Region(), r"gives \(4, 3\) for 4 tiles; expected a mask"),
        (Segmenter(2), None, r"gives \(4, 3, 18, 26\) for 4 tiles; expected scores"),
        (Segmenter(2), Symbols(), r"expected logits \(4, positions, symbols\)"),
        (Segmenter(2, classes=1), Region(), 'one channel.*region = "positive"'),
        (Segmenter(2), Region(torch.ones(3, 3)), r"region has shape \(3, 3\), the network's mask \(18, 26\)"),
        (conv_net(2), Similarity(torch.ones(2, 5)), "embeddings of 3 numbers, the reference vectors have 5"),
    ],
)
def test_an_output_of_another_kind_is_refused(net: nn.Module, readout: Readout | None, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        HookedNet(net, "relu", readout).forward(tiles(2))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"classes": ["a~b", "c"]}, "means something else"),
        ({"classes": ["all", "c"]}, "means something else"),
        ({"classes": ["minus", "c"]}, "means something else"),
        ({"classes": ["a", "c"], "region": "tile"}, "region says nothing of kind 'logits', only of 'mask'"),
        ({"classes": ["a", "c"], "default_target": "a~d"}, "is none of"),
        ({"kind": "embedding", "references": "r.safetensors", "classes": ["a"]}, "without references_sha256"),
        ({"kind": "embedding", "references": "r", "references_sha256": "0" * 64}, "needs classes"),
        ({"kind": "sequence"}, "needs prefix = 'fixed'"),
        ({"kind": "sequence", "prefix": "free", "vocabulary": ["a"], "padding": 1}, "no symbol of the 1"),
        ({"kind": "sequence", "prefix": "free", "classes": ["sum"]}, "means something else"),
    ],
)
def test_a_card_that_cannot_mean_anything_is_refused(output: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OutputSpec.model_validate(output)


def test_units_and_words_follow_the_kind() -> None:
    assert AGE.unit("logit/cell") == "score/cell"
    assert MASK.unit("logit") == "logit"
    assert ABC.unit("1") == "1"
    assert SAID.model_copy(update={"symbol_score": "log_prob"}).unit("logit") == "score"
    assert MASK.quantity == "sum of the logit over the pixels where the class is predicted"
    assert SAID.quantity == "logit of the symbol emitted at the position"
    assert OutputSpec(classes=("a", "b"), default_target="a~b").default_target == "a~b"
