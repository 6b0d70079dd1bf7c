"""Guided backpropagation: the rule by hand, in every way a ReLU can be written, and what it refuses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError, SpecError
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet, PairNet, SplitNet
from workers.cam.explain import explain
from workers.cam.geometry import grid_cells
from workers.cam.guided import guided_gradient
from workers.cam.methods import method
from workers.cam.targets import functionals
from workers.cam.view import Batch, View

JIT = "ignore:.*torch.jit:DeprecationWarning"  # deprecated, and still what many hospitals hold


def guided(split: SplitNet, x: Tensor, c: int = 0) -> Tensor:
    with torch.no_grad():
        batch = Batch(split, x, split.forward(x), torch.arange(len(x)))
        n = batch.scores.shape[1]
        return guided_gradient(View(batch, functionals(batch.scores, classes(n))[0][c]))


class Scalar(nn.Module):
    """One pixel in, one score out, through whatever is given."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.f = nn.Identity(), f

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.f(self.layer(x)).flatten(1)
        return out


def of_scalar(f: Callable[[Tensor], Tensor], x: float) -> float:
    return float(guided(HookedNet(Scalar(f).eval(), "layer"), torch.tensor([[[x]]])))


def test_rule_by_hand() -> None:
    w = -2.0
    # what comes back to the ReLU is w < 0, and stopped; the plain gradient is w
    assert of_scalar(lambda x: w * x.relu(), 1.0) == 0
    x = torch.ones(1, requires_grad=True)
    assert float(torch.autograd.grad(w * x.relu(), x)[0]) == w
    # outside of the ReLU a negative factor stays as it is
    assert of_scalar(lambda x: (w * x).relu(), -1.0) == w
    assert of_scalar(lambda x: (w * x).relu(), 1.0) == 0
    assert of_scalar(lambda x: 3 * x.relu(), 1.0) == 3
    assert of_scalar(lambda x: 3 * x.relu(), 0.0) == 0, "x = 0 is masked"


def test_dense_network_in_plain_loops() -> None:
    rng = np.random.default_rng(1)
    w1, w2, w3 = rng.normal(size=(4, 3)), rng.normal(size=(5, 4)), rng.normal(size=5)
    x = rng.normal(size=(6, 3))
    t1, t2, t3 = (torch.from_numpy(w) for w in (w1, w2, w3))
    net = Scalar(lambda v: ((v[..., 0] @ t1.T).relu() @ t2.T).relu() @ t3[:, None])
    found = guided(HookedNet(net.eval(), "layer"), torch.from_numpy(x)[..., None])[..., 0].numpy()
    stopped = 0
    for b in range(len(x)):
        h1 = [sum(w1[i, j] * x[b, j] for j in range(3)) for i in range(4)]
        h2 = [sum(w2[i, j] * max(h1[j], 0) for j in range(4)) for i in range(5)]
        g2 = [w3[i] if h2[i] > 0 and w3[i] > 0 else 0.0 for i in range(5)]
        back = [sum(w2[i, j] * g2[i] for i in range(5)) for j in range(4)]
        g1 = [back[j] if h1[j] > 0 and back[j] > 0 else 0.0 for j in range(4)]
        np.testing.assert_allclose(
            found[b], [sum(w1[i, j] * g1[i] for i in range(4)) for j in range(3)], atol=1e-12
        )
        stopped += sum(w3[i] < 0 < h2[i] for i in range(5))
    assert stopped, "a case in which the plain gradient would do as well proves nothing"


class Rectify(torch.autograd.Function):
    """The rule written down once more, as a function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (g,) = grads
        return torch.where((x > 0) & (g > 0), g, 0)


class RectifyLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rectify.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def with_rule(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, RectifyLayer())
    return twin


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_class_equals_a_network_of_guided_layers(ndim: int, inplace: bool) -> None:
    net, x = conv_net(ndim, inplace=inplace).double(), tiles(ndim, batch=3).double()
    twin, before = with_rule(net), net(x)
    for c in range(3):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(twin(leaf)[:, c].sum(), leaf)
        torch.testing.assert_close(guided(HookedNet(net, "relu"), x, c), expected)
    assert torch.equal(net(x), before), "the network is as it was"


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_parity_with_captum() -> None:
    net, x = conv_net(2), tiles(2)
    expected = GuidedBackprop(net).attribute(x.clone().requires_grad_(), 1)
    torch.testing.assert_close(guided(HookedNet(net, "relu"), x, 1), expected)


class Functional(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.fc, self.relu = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.two(self.relu(self.one(x))))
        out: Tensor = self.fc(x.flatten(2).mean(2))
        return out


@pytest.mark.filterwarnings(JIT)
def test_every_way_to_write_a_relu() -> None:
    x = tiles(2)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(Functional(Rectify.apply)(leaf)[:, 0].sum(), leaf)
    (plain,) = torch.autograd.grad(Functional(F.relu)(leaf)[:, 0].sum(), leaf)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    ways: list[Callable[[Tensor], Tensor]] = [
        nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, Tensor.relu, torch.jit.script(nn.ReLU()),
    ]  # fmt: skip
    for relu in ways:
        torch.testing.assert_close(guided(HookedNet(Functional(relu).eval(), "two"), x), expected)


@pytest.mark.filterwarnings(JIT)
def test_exported_and_scripted_pairs() -> None:
    x = tiles(2)
    whole = Functional(F.relu).eval()
    expected = guided(HookedNet(whole, "two"), x)
    trunk = nn.Sequential(whole.one, nn.ReLU(), whole.two).eval()
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), whole.fc).eval()
    exported = torch.export.export(trunk, (x,)).module()
    scripted = torch.jit.trace(trunk, x)  # type: ignore[no-untyped-call]
    for one in (exported, scripted):
        torch.testing.assert_close(guided(PairNet(one, tail, "cut"), x), expected)


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (F.gelu, "gelu"), (F.silu, "silu"), (F.leaky_relu, "leaky_relu"), (F.elu, "elu"), (F.relu6, "hardtanh"),
        (F.mish, "mish"), (F.softplus, "softplus"), (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: x * x.sigmoid(), "silu"), (lambda x: x.sigmoid() * x, "silu"),
        (lambda x: x * (1 + torch.erf(x)) / 2, "erf"), (nn.PReLU(), "prelu"), (lambda x: F.threshold(x, 0.1, 0), "threshold"),
    ],
)  # fmt: skip
def test_other_rectifiers_are_refused(f: Callable[[Tensor], Tensor], word: str) -> None:
    net = Functional(lambda x: f(F.relu(x))).eval()
    with pytest.raises(ModelError, match=rf"'\w*{word}\w*', which is unsupported"):
        guided(HookedNet(net, "two"), tiles(2))


def test_no_relu_is_refused_and_a_gate_is_not() -> None:
    with pytest.raises(ModelError, match="acts on ReLUs, and there is none"):
        guided(HookedNet(Functional(torch.tanh).eval(), "two"), tiles(2))
    gate = Functional(lambda x: F.relu(x) * x.mean((2, 3), keepdim=True).sigmoid()).eval()
    assert guided(HookedNet(gate, "two"), tiles(2)).isfinite().all()


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("cell", [1, 3, 4])
def test_maps_are_means_over_even_cells_that_lie_where_they_say(ndim: int, cell: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=2).double()
    split, name = HookedNet(net, "relu"), f"guidedbackprop+cell={cell}"
    names = [name, f"{name}+pool=abs"]
    done = explain(split, x, classes(3), names)
    tile = tuple(x.shape[2:])
    place = method(name).cells(split, x.shape[1:], grid_cells((1,) * ndim, tile))
    assert place.shape == tuple(done.maps[name].shape[2:])
    for n, size, px in zip(place.shape, place.cell_px, tile, strict=True):
        assert n * size == pytest.approx(px)
        assert size <= cell
    for which, pixels in zip(names, (guided(split, x).sum(1), guided(split, x).abs().sum(1)), strict=True):
        found = done.maps[which][:, 0].double()
        torch.testing.assert_close(found.flatten(1).mean(1), pixels.flatten(1).mean(1), rtol=1e-5, atol=1e-9)
        # the first cell by hand: pixels and the part of one that reach into it
        weights = [np.clip(s - np.arange(px), 0, 1) for s, px in zip(place.cell_px, tile, strict=True)]
        window = torch.from_numpy(functools.reduce(np.multiply.outer, weights))
        by_hand = (pixels * window).flatten(1).sum(1) / window.sum()
        torch.testing.assert_close(found.flatten(1)[:, 0], by_hand, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_guided_gradcam_is_the_product(ndim: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=3).double()
    split = HookedNet(net, "relu")
    done = explain(split, x, classes(3), ["gradcam", "guidedgradcam+cell=1"])
    mode = ("linear", "bilinear", "trilinear")[ndim - 1]
    for c in range(3):
        cam = done.maps["gradcam"][:, c : c + 1].double().relu()
        fine = F.interpolate(cam, size=x.shape[2:], mode=mode, align_corners=False)
        expected = (fine * guided(split, x, c)).sum(1)
        found = done.maps["guidedgradcam+cell=1"][:, c].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_options_are_checked() -> None:
    for bad in ("cell=0", "cell=1.5", "pool=max"):
        with pytest.raises(SpecError, match="option"):
            method(f"guidedbackprop+{bad}")


@pytest.mark.parametrize("name", ["guidedbackprop", "guidedgradcam"])
def test_magnitudes_are_not_signed(name: str) -> None:
    info = method(f"{name}+pool=abs").info
    assert method(f"{name}+cell=2").info.signed
    assert not info.signed
    assert "magnitudes" in info.edition
    maps = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), [info.name]).maps[info.name]
    assert (maps >= 0).all()
    assert (maps > 0).any()
