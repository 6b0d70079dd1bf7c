"""FullGrad: nothing is lost. Completeness in float64, closed forms cell by cell, and honesty where it cannot hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, lively, monai_networks, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.fullgrad import fullgrad
from workers.cam.inputs import mean_onto, sum_onto
from workers.cam.method import Options
from workers.cam.targets import functionals
from workers.cam.tokens import TokenLayout
from workers.cam.view import Batch, View


def of(net: nn.Module, layer: str, x: Tensor, c: int, n: int = 3) -> tuple[Tensor, Tensor]:
    """Map and doubt in the network's own precision."""
    split = HookedNet(net, layer)
    with torch.no_grad():
        batch = Batch(split, x, split.forward(x), torch.arange(len(x)))
        found, doubt = fullgrad(View(batch, functionals(batch.scores, classes(n))[0][c]), Options())
    assert doubt is not None
    return found, doubt


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_maps_sum_to_the_score(ndim: int, inplace: bool) -> None:
    net, x = conv_net(ndim, inplace=inplace).double(), tiles(ndim).double()
    for layer in ("relu", "stem", "body"):
        for c in range(3):
            found, doubt = of(net, layer, x, c)
            torch.testing.assert_close(found.sum(1), net(x)[:, c].detach(), rtol=1e-11, atol=1e-12)
            assert not doubt.any()


@pytest.mark.parametrize("name", ["resnet-2d", "densenet-2d", "densenet-3d"])
def test_maps_of_real_architectures_sum_to_the_score(name: str) -> None:
    net, layer, shape = monai_networks()[name]
    net = net.double()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    found, doubt = of(net, layer, x, 1)
    torch.testing.assert_close(found.sum(1), net(x)[:, 1].detach(), rtol=1e-9, atol=1e-10)
    assert not doubt.any()


class Line(nn.Module):
    """y = 3 mean(relu(2 x + 1)) + 5, cells as fine as pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Linear(1, 1)
        for module, weight, bias in ((self.conv, 2.0, 1.0), (self.fc, 3.0, 5.0)):
            nn.init.constant_(module.weight, weight)
            assert module.bias is not None
            nn.init.constant_(module.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.relu(self.conv(x)).mean(2))
        return out


def test_closed_form() -> None:
    found, doubt = of(Line().double().eval(), "relu", torch.tensor([[[1.0, -2, 0, 4]]]).double(), 0, 1)
    # an open cell gives 3/4 of 2 x and of the bias 1; the last bias is spread, 5/4 a cell
    np.testing.assert_allclose(found[0], [0.75 * 3 + 1.25, 1.25, 0.75 + 1.25, 0.75 * 9 + 1.25])
    assert not doubt.any()


def test_batchnorm_has_an_implicit_bias() -> None:
    norm = nn.BatchNorm1d(1).double().eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(2)
    norm.running_var.fill_(4 - norm.eps)
    nn.init.constant_(norm.weight, 3)
    nn.init.constant_(norm.bias, 7)
    line = Line().double()
    line.conv = nn.Sequential(norm)  # type: ignore[assignment]
    found, _ = of(line.eval(), "relu", torch.tensor([[[1.0, -9, 0, 4]]]).double(), 0, 1)
    # norm(x) = 3/2 x + (7 - 3 * 2 / 2) = 3/2 x + 4
    np.testing.assert_allclose(found[0], [0.75 * 5.5 + 1.25, 1.25, 0.75 * 4 + 1.25, 0.75 * 10 + 1.25])


def slow(net: nn.Module, x: Tensor, c: int, grid: tuple[int, ...]) -> np.ndarray:
    """One tile: every bias as a tensor of its own added to its layer's output, its gradient by autograd, cells by loops."""
    parts: list[Tensor] = []

    def probe(module: nn.Module, _i: object, out: Tensor) -> Tensor:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            bias = (
                module.bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
            )
        else:
            bias = module.bias  # type: ignore[assignment]
        b = bias.detach().view(1, -1, *(1,) * (out.ndim - 2)).expand_as(out).clone().requires_grad_()
        parts.append(b)
        return out - b.detach() + b

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    handles = [m.register_forward_hook(probe) for m in net.modules() if isinstance(m, kinds)]
    leaf = x[None].clone().requires_grad_()
    parts.append(leaf)
    y = net(leaf)[0, c]
    for handle in handles:
        handle.remove()
    out = np.zeros(grid)
    for value, g in zip(parts, torch.autograd.grad(y, parts), strict=True):
        share = (value * g)[0].sum(0).detach().numpy()
        if share.ndim != len(grid):
            out += share.sum() / out.size
            continue
        for u in np.ndindex(share.shape):
            for v in np.ndindex(grid):
                overlap = 1.0
                for i, j, n, m in zip(u, v, share.shape, grid, strict=True):
                    overlap *= max(0.0, min((i + 1) / n, (j + 1) / m) - max(i / n, j / m)) * n
                out[v] += share[u] * overlap
    return out


@pytest.mark.parametrize("ndim", [1, 2])
def test_equals_its_slow_twin(ndim: int) -> None:
    net = conv_net(ndim).double()
    x = tiles(ndim, batch=2).double()[(..., slice(13), slice(11))[: ndim + 1]]
    done = explain(HookedNet(net, "relu"), x, classes(3), ["fullgrad"])
    for b in range(2):
        expected = slow(net, x[b], 2, tuple(done.maps["fullgrad"].shape[2:]))
        np.testing.assert_allclose(
            done.maps["fullgrad"][b, 2].numpy(), expected, rtol=1e-5, atol=1e-6 * abs(expected).max()
        )


class Bare(nn.Module):
    """The same network as modules, as functions, and as whatever else is given."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.up = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
        )
        self.layer, self.fc, self.functional = nn.ReLU(), nn.Linear(3, 3), functional
        lively(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            norm = self.norm
            x = F.conv2d(input=x, weight=self.one.weight, bias=self.one.bias)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
            x = self.layer(
                F.conv_transpose2d(F.max_pool2d(x.relu(), 2), self.up.weight, self.up.bias, stride=2)
            )
            return F.linear(x.mean((2, 3)), self.fc.weight, bias=self.fc.bias)
        x = self.layer(self.up(F.max_pool2d(self.norm(self.one(x)).relu(), 2)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def test_functions_count_as_modules_do() -> None:
    x = tiles(2).double()
    nets = [Bare(functional).double().eval() for functional in (False, True)]
    found = [of(net, "layer", x, 0) for net in nets]
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0].sum(1), nets[0](x)[:, 0].detach())
    assert not (found[0][1] | found[1][1]).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_exported_networks_count_as_well_and_scripted_ones_are_doubted() -> None:
    net, x = conv_net(2), tiles(2)
    trunk = nn.Sequential(net.stem, net.pool, net.body, net.relu)
    tail = nn.Sequential(net.tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    expected = explain(HookedNet(net, "relu"), x, classes(3), ["fullgrad"])
    exported = torch.export.export(trunk, (x,)).module()
    found = explain(PairNet(exported, tail, "cut"), x, classes(3), ["fullgrad"])
    torch.testing.assert_close(found.maps["fullgrad"], expected.maps["fullgrad"], rtol=1e-4, atol=1e-6)
    assert not (found.flags["fullgrad"] & MapFlag.DOUBTFUL).any()
    traced = torch.jit.trace(trunk, x)  # type: ignore[no-untyped-call]
    scripted = explain(PairNet(traced, tail, "cut"), x, classes(3), ["fullgrad"])
    assert (scripted.flags["fullgrad"] & MapFlag.DOUBTFUL).all()


@pytest.mark.parametrize("module", [nn.GELU(), nn.GroupNorm(1, 6), nn.InstanceNorm2d(6), nn.Softmax(1)])
def test_what_is_not_piecewise_linear_is_doubted(module: nn.Module) -> None:
    net = conv_net(2)
    net.stem.append(module)
    done = explain(HookedNet(net.eval(), "relu"), tiles(2), classes(3), ["fullgrad"])
    assert (done.flags["fullgrad"] & MapFlag.DOUBTFUL).any(1).all()


def test_axes_must_be_the_inputs() -> None:
    trunk = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.ReLU()).eval()
    tail = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    as_they_are = TokenLayout("channels_first")  # else taken for tokens, and refused as such
    for name in ("fullgrad", "guidedgradcam"):
        with pytest.raises(ModelError, match=r"cells have 1 axes|cells; those have 1 axes"):
            explain(PairNet(trunk, tail, "cut", tokens=as_they_are), tiles(2), classes(3), [name])


@pytest.mark.parametrize("grid", [(3, 4), (7, 2), (1, 1), (10, 12), (13, 5)])
def test_regridding_conserves_sums_and_constants(grid: tuple[int, int]) -> None:
    values = torch.rand(2, 5, 6, dtype=torch.float64)
    summed = sum_onto(values, grid)
    assert summed.shape == (2, *grid)
    torch.testing.assert_close(summed.sum((1, 2)), values.sum((1, 2)))
    ones = mean_onto(torch.ones_like(values), grid)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert sum_onto(torch.tensor([[1.0, 2, 3]]), (2,)).tolist() == [[2, 4]]
    assert sum_onto(torch.tensor([[6.0, 3]]), (4,)).tolist() == [[3, 3, 1.5, 1.5]]
    assert math.isclose(float(mean_onto(torch.tensor([[1.0, 2, 3, 6]]), (2,))[0, 1]), 4.5)
