"""Integrated-gradients CAM and ShapleyCAM: sums, closed forms, second derivatives, captum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.methods import method


class Curved(nn.Module):
    """A tail that is smooth and not linear, after the layer `relu`."""

    def __init__(self, ndim: int, f: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        inner = conv_net(ndim)
        self.stem, self.pool, self.body, self.relu, self.f = inner.stem, inner.pool, inner.body, inner.relu, f
        self.mix = nn.Conv1d(5, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.relu(self.body(self.pool(self.stem(x)))))

    def after(self, a: Tensor) -> Tensor:
        out: Tensor = self.fc(self.f(3 * self.mix(a.flatten(2))).mean(2))
        return out


def curved(ndim: int, f: Callable[[Tensor], Tensor] = torch.tanh) -> Curved:
    torch.manual_seed(0)
    return Curved(ndim, f).double().eval().requires_grad_(False)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_igcam_sums_to_what_the_activations_bring(ndim: int) -> None:
    net, x = curved(ndim), tiles(ndim).double()
    split = HookedNet(net, "relu")
    done = explain(split, x, classes(3), ["igcam"])
    a = split.trunk(x)
    expected = (net.after(a) - net.after(torch.zeros_like(a))).detach()
    torch.testing.assert_close(
        done.maps["igcam"].flatten(2).sum(2).double(), expected, rtol=1e-4, atol=1e-6
    )  # maps are float32
    assert not (done.flags["igcam"] & MapFlag.DOUBTFUL).any()


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_igcam_equals_its_slow_twin(ndim: int, steps: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=2).double()
    split, name = HookedNet(net, "relu"), f"igcam+steps={steps}"
    done = explain(split, x, classes(3), [name])
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    a = split.trunk(x)
    for b in range(2):
        for c in (0, 2):
            expected = np.zeros(a.shape[2:])
            for node, weight in zip(nodes, weights, strict=True):
                leaf = (a[b : b + 1] * (node + 1) / 2).requires_grad_()
                tail = net.fc(net.tail(leaf).flatten(2).mean(2))[0, c]
                (g,) = torch.autograd.grad(tail, leaf)
                expected += (a[b] * g[0]).sum(0).numpy() * weight / 2
            np.testing.assert_allclose(
                done.maps[next(iter(done.maps))][b, c].numpy(),
                expected,
                rtol=1e-5,
                atol=1e-6 * abs(expected).max(),
            )


def test_igcam_says_when_it_has_too_few_steps() -> None:
    net = curved(2, lambda z: torch.tanh(20 * z))
    done = explain(
        HookedNet(net, "relu"), tiles(2).double(), classes(3), ["igcam+steps=1", "igcam+steps=150"]
    )
    assert (done.flags["igcam+steps=1"] & MapFlag.DOUBTFUL).all()
    assert not (done.flags["igcam+steps=150"] & MapFlag.DOUBTFUL).any()


def test_igcam_behind_a_linear_head_is_hirescam() -> None:
    net, x = conv_net(3, head="gap"), tiles(3)
    done = explain(HookedNet(net, "relu"), x, classes(3), ["igcam", "hirescam"])
    assert torch.equal(done.maps["igcam"], done.maps["hirescam"])


def test_igcam_parity_with_captum() -> None:
    """With captum the path ends in the activations of a baseline input: without biases those of a black one are 0."""
    net, x = conv_net(2), tiles(2)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d) and m.bias is not None:
            nn.init.zeros_(m.bias)
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean.zero_()
    with torch.no_grad():
        assert (HookedNet(net, "relu").trunk(0 * x) == 0).all()
    explainer = LayerIntegratedGradients(net, net.relu)
    expected = explainer.attribute(x, 0 * x, target=1, n_steps=50, method="gausslegendre").sum(1).detach()
    found = explain(HookedNet(net, "relu"), x, classes(3), ["igcam"]).maps["igcam"][:, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_igcam_steps_are_checked() -> None:
    for bad in ("steps=0", "steps=1001", "steps=2.5"):
        with pytest.raises(SpecError, match="option"):
            method(f"igcam+{bad}")


class Quadratic(nn.Module):
    """`y_c = (w_c . mean(A))^2 / 2`, whose Hessian is `w w' / Z^2`: `H A = g`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layer(x).flatten(2).mean(2)) ** 2 / 2
        return out


def test_shapleycam_of_a_square_is_half_of_gradcam() -> None:
    done = explain(HookedNet(Quadratic().eval(), "layer"), tiles(2), classes(3), ["gradcam", "shapleycam"])
    torch.testing.assert_close(done.maps["shapleycam"], done.maps["gradcam"] / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_shapleycam_equals_the_whole_hessian(ndim: int) -> None:
    net, x = curved(ndim), tiles(ndim, batch=2).double()
    for axis in range(ndim):
        x = x.narrow(2 + axis, 0, 6)  # a Hessian is large
    split = HookedNet(net, "relu")
    done = explain(split, x, classes(3), ["shapleycam", "gradcam"])
    a = split.trunk(x)
    for b in range(2):
        for c in range(3):

            def y(flat: Tensor, b: int = b, c: int = c) -> Tensor:
                return net.after(flat.reshape(1, *a.shape[1:]))[0, c]

            flat = a[b].flatten()
            g, h = torch.func.grad(y)(flat), torch.func.jacrev(torch.func.grad(y))(flat)
            weight = (g - h @ flat / 2).reshape(a.shape[1], -1).mean(1)
            expected = torch.einsum("k,k...->...", weight, a[b])
            torch.testing.assert_close(
                done.maps["shapleycam"][b, c].double(),
                expected,
                rtol=1e-5,
                atol=1e-6 * float(expected.abs().max()),
            )
    assert not torch.allclose(done.maps["shapleycam"], done.maps["gradcam"], rtol=1e-2)


def test_shapleycam_of_a_piecewise_linear_tail_is_gradcam() -> None:
    done = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), ["shapleycam", "gradcam"])
    torch.testing.assert_close(done.maps["shapleycam"], done.maps["gradcam"])


def test_shapleycam_goes_through_fused_attention() -> None:
    def attend(z: Tensor) -> Tensor:
        tokens = z.mT[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT

    net = curved(2, attend)
    done = explain(HookedNet(net, "relu"), tiles(2).double(), classes(3), ["shapleycam", "gradcam"])
    assert done.maps["shapleycam"].isfinite().all()
    assert not torch.allclose(done.maps["shapleycam"], done.maps["gradcam"], rtol=1e-2)
