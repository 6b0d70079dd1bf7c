"""Ablation-CAM against its definition, and the tail run on many activations of few tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, monai_networks, tiles
from workers.cam import ablation
from workers.cam.capture import HookedNet, PairNet, SplitNet
from workers.cam.explain import explain
from workers.cam.fan import fans_out, tail_of_many
from workers.cam.head import linear_head
from workers.cam.methods import method

Array = NDArray[np.float64]
ALL = ("ablationcam+divisor=magnitude", "ablationcam+divisor=score", "ablationcam")


def slow_ablation(net: SplitNet, x: Tensor, c: int) -> dict[str, Array]:
    """One tile `(1, C_in, *S)`: the whole network again for each channel."""
    a = net.trunk(x)
    y = float(net.tail(a, x)[0, c])
    out = {name: np.zeros(tuple(a.shape[2:])) for name in ALL}
    for k in range(a.shape[1]):
        ablated = a.clone()
        ablated[0, k] = 0
        drop = y - float(net.tail(ablated, x)[0, c])
        for name, divisor in zip(ALL, (abs(y), y, 1.0), strict=True):
            out[name] += drop / divisor * a[0, k].numpy()
    return out


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("head", ["conv", "gap"])
def test_equals_its_slow_twin(ndim: int, head: str) -> None:
    module, x = conv_net(ndim, head=head).double(), tiles(ndim, batch=3).double()
    with torch.no_grad():
        module.fc.bias.copy_(torch.tensor([1.0, -1.0, 0.1]) - module(x).mean(0))
    net = HookedNet(module, "relu")
    assert (linear_head(net, x) is not None) == (head == "gap")
    done = explain(net, x, classes(3), ALL)
    signs = set()
    for b in range(3):
        for c in range(3):
            signs.add(bool(done.scores[b, c] > 0))
            for name, expected in slow_ablation(net, x[b : b + 1], c).items():
                np.testing.assert_allclose(
                    done.maps[name][b, c].numpy(), expected, rtol=1e-5, atol=1e-6 * abs(expected).max()
                )
    assert signs == {True, False}, "scores of one sign would not tell the divisors apart"


def test_toy_closed_form() -> None:
    # A_1 = [[1, 0], [0, 3]], A_2 = [[0, 2], [1, 1]], y = 2 mean(A_1) - mean(A_2) = 1: drops 2 and -1
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.fc = nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                self.fc.weight.copy_(torch.tensor([[2.0, -1.0]]))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.relu(x).mean((2, 3)))
            return out

    x = torch.tensor([[[[1.0, 0], [0, 3]], [[0, 2], [1, 1]]]])
    net = HookedNet(Toy().eval(), "relu")
    for name, raw in explain(net, x, classes(1), ALL).maps.items():
        np.testing.assert_allclose(raw[0, 0], [[2, -2], [-1, 5]], rtol=1e-6, err_msg=name)


def test_closed_form_equals_the_tail_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = HookedNet(conv_net(2, head="gap"), "relu"), tiles(2)
    closed = explain(net, x, classes(3), ALL)
    monkeypatch.setattr(ablation, "linear_head", lambda *_: None)
    tail = explain(net, x, classes(3), ALL)
    for name in ALL:
        scale = float(closed.maps[name].abs().max())
        torch.testing.assert_close(tail.maps[name], closed.maps[name], rtol=1e-4, atol=1e-5 * scale)


def test_the_closed_form_runs_the_network_once() -> None:
    net, x = conv_net(2, head="gap"), tiles(2)
    split = HookedNet(net, "relu")
    explain(split, x, classes(3), ["ablationcam"])  # proves the head
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    explain(split, x, classes(3), ["ablationcam"])
    assert len(runs) == 1


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_chunk_changes_rounding_only(chunk: int) -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    whole = explain(net, x, classes(3), ["ablationcam"]).maps["ablationcam"]
    found = next(iter(explain(net, x, classes(3), [f"ablationcam+chunk={chunk}"]).maps.values()))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_the_trunk_runs_a_tile_and_the_tail_a_channel() -> None:
    net, x = conv_net(2), tiles(2, batch=3)
    split = HookedNet(net, "relu")
    explain(split, x, classes(3), ["ablationcam"])  # proves what can be proven
    trunk, tail = [], []
    net.stem.register_forward_pre_hook(lambda _, given: trunk.append(len(given[0])))
    net.fc.register_forward_pre_hook(lambda _, given: tail.append(len(given[0])))
    explain(split, x, classes(3), ["ablationcam"])
    live = int((split.trunk(x).flatten(2) != 0).any(-1).sum())
    assert sum(tail) == 3 + live
    assert sum(trunk) == 3 + 3 + 3, "forward, the one chunk, and the trunk asked for here"


def test_a_score_near_nothing_is_doubted() -> None:
    net, x = conv_net(2), tiles(2)
    split = HookedNet(net, "relu")
    with torch.no_grad():
        net.fc.bias[0] -= net(x)[2, 0] * (1 - 1e-6)
    done = explain(split, x, classes(3), ALL)
    for name in ALL[:2]:
        assert done.flags[name][2, 0] & MapFlag.DOUBTFUL
        assert not done.flags[name][[0, 1, 3], 0].any()
        assert not done.flags[name][:, 1:].any()
    assert not done.flags["ablationcam"].any()


def test_a_score_of_nothing_is_no_map() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.relu(x).mean((2, 3))
            return y[:, :1] - y[:, 1:2]

    x = torch.rand(1, 1, 4, 5).expand(2, 2, -1, -1).clone()
    done = explain(HookedNet(Zero(), "relu"), x, classes(1), ALL)
    assert (done.scores == 0).all()
    for name in ALL[:2]:
        assert done.maps[name].isnan().all()
        assert (done.flags[name] & MapFlag.NOT_FINITE).all()
    assert done.maps["ablationcam"].isfinite().all()


def test_edges() -> None:
    single = explain(HookedNet(conv_net(2, head="gap"), "relu"), torch.randn(2, 2, 2, 2), classes(3), ALL)
    net = conv_net(2)
    with torch.no_grad():
        net.body.weight.zero_()
        assert net.body.bias is not None
        net.body.bias.fill_(-1)
    dead = explain(HookedNet(net, "relu"), tiles(2), classes(3), ALL)
    x = tiles(2)
    x[1, 0, 2, 2] = torch.nan
    split = HookedNet(conv_net(2), "relu")
    bad, clean = explain(split, x, classes(3), ALL), explain(split, tiles(2), classes(3), ALL)
    for name in ALL:
        assert (single.flags[name] & MapFlag.SINGLE_CELL).all()
        assert (dead.maps[name] == 0).all()
        assert (dead.flags[name] == MapFlag.EMPTY | MapFlag.CONSTANT).all()
        assert bad.maps[name][1].isnan().all()
        others = [0, 2, 3]
        torch.testing.assert_close(bad.maps[name][others], clean.maps[name][others], rtol=1e-4, atol=1e-6)


def test_options() -> None:
    assert "signed" in method("ablationcam+divisor=score").info.edition
    with pytest.raises(SpecError, match="divisor"):
        method("ablationcam+divisor=sum")


# The tail on many activations of few tiles


class Bypass(nn.Module):
    """A skip connection round the explained layer, by sum or by concatenation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(8 if how == "cat" else 4, 5, 3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        a = self.relu(h)
        match self.how:
            case "cat":
                a = torch.cat([a, h], 1)
            case "first":  # every row meets the first tile: fitting shapes, wrong rows
                a = a + h[:1]
            case "sum":
                a = a + h
        out: Tensor = self.fc(self.last(a).mean((2, 3)))
        return out


@pytest.mark.parametrize(("how", "fans"), [("none", True), ("sum", False), ("cat", False)])
@pytest.mark.parametrize("batch", [1, 3])
def test_many_activations_of_few_tiles(how: str, fans: bool, batch: int) -> None:
    torch.manual_seed(0)
    net, x = HookedNet(Bypass(how).eval(), "relu"), tiles(2, batch=batch)
    rows = torch.tensor([0, 0, batch - 1, batch - 1, 0])
    activations = torch.randn(5, 4, *x.shape[2:])
    expected = net.tail(activations, x[rows])
    torch.testing.assert_close(tail_of_many(net, activations, x, rows), expected, rtol=1e-5, atol=1e-6)
    assert fans_out(net, x) == fans


def test_a_by_pass_that_fits_in_shape_is_found_out() -> None:
    torch.manual_seed(0)
    net = HookedNet(Bypass("first").eval(), "relu")
    x = tiles(2, batch=2)
    with torch.no_grad():
        net.tail(
            torch.randn(5, 4, *x.shape[2:]), x, torch.tensor([0, 0, 1, 1, 0])
        )  # no error: only the numbers tell
    assert not fans_out(net, x)


@pytest.mark.parametrize("how", ["none", "sum"])
def test_ablation_with_and_without_a_by_pass(how: str) -> None:
    torch.manual_seed(0)
    net, x = HookedNet(Bypass(how).eval().double(), "relu"), tiles(2, batch=2).double()
    done = explain(net, x, classes(3), ["ablationcam"])
    for b in range(2):
        expected = slow_ablation(net, x[b : b + 1], 1)["ablationcam"]
        np.testing.assert_allclose(
            done.maps["ablationcam"][b, 1], expected, rtol=1e-5, atol=1e-6 * abs(expected).max()
        )


@pytest.mark.parametrize("name", ["resnet-2d", "densenet-2d", "densenet-3d"])
def test_networks_of_monai_fan_out_after_a_stage(name: str) -> None:
    module, layer, shape = monai_networks()[name]
    layer = {"resnet-2d": "layer3"}.get(name, layer)
    net = HookedNet(module, layer)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    assert fans_out(net, x)
    assert not fans_out(HookedNet(module, "layer4.0.conv1"), x) if name == "resnet-2d" else True


def test_a_tail_with_carried_tensors_gets_a_row_of_them_each() -> None:
    class Trunk(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), x.mean((2, 3))

    class Tail(nn.Module):
        def forward(self, a: Tensor, mean: Tensor) -> Tensor:
            pooled: Tensor = a.mean((2, 3))
            return pooled + mean

    x, rows = tiles(2, batch=3), torch.tensor([2, 0, 0, 1, 2])
    activations = torch.randn(5, 2, *x.shape[2:])
    found = tail_of_many(PairNet(Trunk(), Tail(), "cut"), activations, x, rows)
    torch.testing.assert_close(found, activations.mean((2, 3)) + x.mean((2, 3))[rows])
