"""The fast tier: what is folded and what must not be, names, tolerance against fp32, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from schemas.errors import ModelError
from schemas.explanation import AskedPrecision, Precision
from schemas.model import ModelFacts
from tests.test_workers.test_models_loading import card, dense, saved
from tests.test_workers.tiny_networks import conv_net, lively, monai_networks
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.targets import ResolvedTarget
from workers.models import fast
from workers.models.facts import model_facts
from workers.models.fast import accelerate, fold, pairs, tiers

RANK, L2 = 0.99, 2e-2
"""What the fast tier promises of its maps: at least, at most."""


class Block(nn.Module):
    """A convolution, a norm, and whatever else a network may do with the convolution's output."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.conv = nn.Conv2d(2, 4, 3, bias=use == "bias")
        self.norm = nn.BatchNorm2d(4, affine=use != "plain")
        self.again = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        match self.use:
            case "added":
                z = z + y
            case "viewed":
                z = z * y.detach().flatten(1).amax(1)[:, None, None, None]
            case "norm twice":
                z = self.norm(z)
            case "two norms":
                z = z + self.again(y)
            case "conv twice":
                z = z + self.conv(x * 2)
            case "written":
                y.add_(1.0)
                z = z + y
        scores: Tensor = self.fc(self.relu(z).mean((2, 3)))
        return scores


def tiles(n: int = 2) -> Tensor:
    return torch.randn(n, 2, 9, 11, generator=torch.Generator().manual_seed(0))


def block(use: str) -> Block:
    net = Block(use)
    if use == "plain":
        net.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        net.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    else:
        net = lively(net)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("use", ["alone", "bias", "plain"])
def test_a_norm_that_alone_reads_a_convolution_is_folded(use: str) -> None:
    net = block(use)
    expected = net(tiles())
    found = fold(HookedNet(net, "relu"), tiles())
    assert [(p.conv_name, p.norm_name) for p in found] == [("conv", "norm")]
    assert isinstance(net.norm, nn.Identity)
    torch.testing.assert_close(net(tiles()), expected)


@pytest.mark.parametrize("use", ["added", "viewed", "norm twice", "two norms", "conv twice", "written"])
def test_a_convolution_that_is_read_elsewhere_is_not(use: str) -> None:
    net = block(use)
    expected = net(tiles())
    assert pairs(HookedNet(net, "relu"), tiles()) == ()
    assert fold(HookedNet(net, "relu"), tiles()) == ()
    assert torch.equal(net(tiles()), expected)


@pytest.mark.parametrize("layer", ["conv", "norm"])
def test_an_explained_layer_stays_as_it_is(layer: str) -> None:
    net = block("alone")
    assert pairs(HookedNet(net, layer), tiles()) == ()


def test_shared_weights_are_not_folded() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(70, 2)
    )
    net[2].weight = net[0].weight
    net.eval().requires_grad_(False)
    assert pairs(HookedNet(net, "3"), tiles()) == ()


def test_a_pair_that_changes_the_network_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    net = lively(net).eval().requires_grad_(False)
    expected = net(tiles())

    def wrong_for_the_first(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        w, b = fuse_conv_bn_weights(weight, *rest)
        return (w * 1.01, b) if weight.shape[1] == 2 else (w, b)

    monkeypatch.setattr(fast, "fuse_conv_bn_weights", wrong_for_the_first)
    found = fold(HookedNet(net, "5"), tiles())
    assert [p.conv_name for p in found] == ["3"]
    torch.testing.assert_close(net(tiles()), expected)


def test_a_folded_convolution_cannot_be_explained() -> None:
    net = block("alone")
    names = {name for name, _ in net.named_modules()}
    fold(HookedNet(net, "relu"), tiles())
    assert {name for name, _ in net.named_modules()} == names
    with pytest.raises(ModelError, match="'norm' is folded into it"):
        HookedNet(net, "conv")


@pytest.mark.parametrize("precision", ["fast-fp32", "fast-bf16"])
@pytest.mark.parametrize("name", ["conv-1d", "conv-2d", "conv-3d", "resnet-2d", "densenet-2d", "densenet-3d"])
def test_maps_keep_to_the_tolerance(name: str, precision: Precision) -> None:
    """Bfloat16 behind pooling and a linear layer; a gradient whose parts cancel keeps fewer digits (4 % were seen)."""
    net: nn.Module
    if name.startswith("conv"):
        ndim = int(name[5])
        head = "gap" if precision == "fast-bf16" else "conv"
        net, layer, shape = conv_net(ndim, head=head), "relu", (2, *(19, 14, 16)[:ndim])
    else:
        net, layer, shape = monai_networks()[name]
    if precision == "fast-bf16" and name == "densenet-3d":
        pytest.skip("torch has no bfloat16 avg_pool3d on CPUs: refused, see below")
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    targets = [ResolvedTarget(str(c), c) for c in range(3)]
    methods = ["gradcam", "hirescam", "layercam"]
    net.eval().requires_grad_(False)
    exact = explain(HookedNet(copy.deepcopy(net), layer), x, targets, methods)
    done = explain(accelerate(HookedNet(net, layer), precision, x[:2]), x, targets, methods)
    assert done.scores.dtype == torch.float32
    for method in methods:
        a, b = done.maps[method], exact.maps[method]
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) <= (L2 if precision == "fast-bf16" else 1e-5)
        together = zip(a.flatten(2).flatten(0, 1), b.flatten(2).flatten(0, 1), strict=True)
        ranks = [spearmanr(p, q).statistic for p, q in together if q.any()]
        assert len(ranks) > 6
        assert np.mean(ranks) >= RANK


def test_what_cannot_run_is_refused() -> None:
    net, layer, shape = monai_networks()["densenet-3d"]
    net.eval().requires_grad_(False)
    with pytest.raises(
        ModelError, match=r"fast-bf16: the network does not run in it on cpu .*--precision fp32"
    ):
        accelerate(HookedNet(net, layer), "fast-bf16", torch.randn(2, *shape))
    pair = PairNet(nn.Identity(), nn.Identity(), "cut")
    with pytest.raises(ModelError, match="use --precision fp32"):
        accelerate(pair, "fast-fp32", tiles())


def test_a_network_that_loses_too_much_is_refused() -> None:
    class Cancels(nn.Module):
        """Its scores are what bfloat16 rounds off."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            scores: Tensor = self.fc(((1000 + y) - 1000).mean((2, 3)))
            return scores

    net = lively(Cancels()).eval().requires_grad_(False)
    with pytest.raises(ModelError, match="scores differ from those of fp32"):
        accelerate(HookedNet(net, "conv"), "fast-bf16", tiles())


def test_fast_is_settled_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert tiers("fast", "cpu") == ("fast-fp32",)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert tiers("fast", "cpu") == ("fast-bf16", "fast-fp32")
    assert tiers("fast-bf16", "cpu") == ("fast-bf16",)
    assert tiers("fp32", "cpu") == ("fp32",)


def test_the_tier_of_a_network_is_a_fact_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = card(tmp_path, saved(tmp_path, dense()))

    def facts(asked: AskedPrecision) -> ModelFacts:
        return model_facts(loaded, "features", (), ("gradcam",), precision=asked)

    exact = facts("fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert facts("fast") == exact.model_copy(update={"precision": "fast-bf16"})
    # What bfloat16 cannot run is run in float32.
    monkeypatch.setitem(fast.CLOSE, torch.bfloat16, 1e-9)
    assert facts("fast").precision == "fast-fp32"
    with pytest.raises(ModelError, match="--precision fast-bf16: activations differ"):
        facts("fast-bf16")
