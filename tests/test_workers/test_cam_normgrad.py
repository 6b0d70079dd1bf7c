"""NormGrad against its definition: outer products formed in loops, and the weight gradient of a layer put in for real."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import ModelError, SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import CONV, classes, conv_net, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.methods import method
from workers.cam.normgrad import At, By, NormGradOptions, Site, cube, extract, normgrad, window_of

Array = NDArray[np.float64]

A = torch.tensor([[[[1.0, 0], [0, 3]], [[0, 2], [1, 1]]]], dtype=torch.float64)
G = torch.tensor([0.5, -0.25], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 2, 2)

VIRTUAL: tuple[At, ...] = ("bias", "scaling", "conv1x1", "conv3x3", "depthwise3x3")
ALL_BY: tuple[By, ...] = ("norm", "selective", "sum", "max")


def at(a: Tensor, g: Tensor, inputs: Tensor | None = None, module: nn.Module | None = None) -> Site:
    return Site("layer", module, a, g, inputs)


@pytest.mark.parametrize(
    ("where", "by", "expected"),
    [
        ("conv1x1", "norm", [0.5590, 1.1180, 0.5590, 1.7678]),
        ("scaling", "selective", [0.5, 0, 0, 1.5]),
        ("scaling", "sum", [0.5, -0.5, -0.25, 1.25]),
        ("bias", "max", [0.5] * 4),
        ("bias", "norm", [0.5590] * 4),
        ("conv1x1", "sum", [0.25, 0.5, 0.25, 1.0]),
        ("conv1x1", "max", [0.5, 1.0, 0.5, 1.5]),
    ],
)
def test_toy(where: At, by: By, expected: list[float]) -> None:
    raw, doubtful = extract(at(A, G), NormGradOptions(at=where, by=by))
    np.testing.assert_allclose(raw.ravel(), expected, atol=5e-5)
    # the gradient is the same in all cells, so the bias says nothing of where
    assert (doubtful is not None and bool(doubtful.all())) == (where == "bias")


def patches(a: Array, size: int) -> Array:
    """`(K, *S)` -> `(*S, K, size ** n)`, a cell at a time, zeros outside."""
    space = a.shape[1:]
    r = size // 2
    out = np.zeros((*space, len(a), size ** len(space)))
    for u in np.ndindex(space):
        for j, offset in enumerate(itertools.product(range(-r, r + 1), repeat=len(space))):
            v = tuple(i + o for i, o in zip(u, offset, strict=True))
            if all(0 <= i < n for i, n in zip(v, space, strict=True)):
                out[(*u, slice(None), j)] = a[(slice(None), *v)]
    return out


def slow_terms(a: Array, g: Array, where: At) -> Array:
    """`(*S, everything)`: the term of every position, its outer product formed."""
    space = a.shape[1:]
    terms = []
    for u in np.ndindex(space):
        gu, au = g[(slice(None), *u)], a[(slice(None), *u)]
        window = patches(a, 3)[u] if "3x3" in where else None
        match where:
            case "bias":
                term = gu
            case "scaling":
                term = au * gu
            case "conv1x1":
                term = np.multiply.outer(au, gu)
            case "conv3x3":
                assert window is not None
                term = np.multiply.outer(window, gu)
            case _:
                assert window is not None
                term = window * gu[:, None]
        terms.append(term.ravel())
    return np.array(terms).reshape(*space, -1)


def aggregate(terms: Array, by: By) -> Array:
    match by:
        case "norm":
            found = np.sqrt((terms**2).sum(-1))
        case "selective":
            found = np.sqrt((np.maximum(terms, 0) ** 2).sum(-1))
        case "sum":
            found = terms.sum(-1)
        case _:
            found = np.abs(terms).max(-1)
    return np.asarray(found)


@pytest.mark.parametrize("space", [(5,), (3, 4), (2, 3, 3)])
@pytest.mark.parametrize("where", VIRTUAL)
def test_every_choice_equals_its_slow_twin(space: tuple[int, ...], where: At) -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(2, 3, *space, generator=generator, dtype=torch.float64) for _ in range(2))
    for by in ALL_BY:
        raw, _ = extract(at(a, g), NormGradOptions(at=where, by=by))
        assert raw.shape == (2, *space)
        for b in range(2):
            expected = aggregate(slow_terms(a[b].numpy(), g[b].numpy(), where), by)
            np.testing.assert_allclose(raw[b].numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=by)


REAL: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", REAL)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_real_layer_equals_its_own_weight_gradient(ndim: int, settings: dict[str, Any]) -> None:
    """The gradient of one output position alone is the term of that position: autograd forms the outer product."""
    torch.manual_seed(0)
    conv = CONV[ndim - 1](4, 6, **settings).double()
    x = torch.randn(1, 4, *(5, 4, 3)[:ndim], dtype=torch.float64)
    out = conv(x)
    g = torch.randn(out.shape, dtype=torch.float64)
    terms = []
    for u in np.ndindex(out.shape[2:]):
        here = (slice(None), slice(None), *u)
        terms.append(
            torch.autograd.grad((out[here] * g[here]).sum(), conv.weight, retain_graph=True)[0].ravel()
        )
    slow = torch.stack(terms).reshape(*out.shape[2:], -1).numpy()
    for by in ALL_BY:
        found = normgrad(x, g, window_of(conv), conv.groups, by)[0]
        np.testing.assert_allclose(found.numpy(), aggregate(slow, by), rtol=1e-10, atol=1e-12, err_msg=by)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_terms_sum_to_the_gradient_of_an_identity_layer(ndim: int, size: int) -> None:
    """dy/dW of a convolution that does nothing: the sum of all terms, so the sum of their `sum` is that of its entries."""
    a = torch.rand(1, 3, *(5, 4, 3)[:ndim], dtype=torch.float64)
    weight = torch.zeros(3, 3, *(size,) * ndim, dtype=torch.float64)
    for k in range(3):
        weight[(k, k, *(size // 2,) * ndim)] = 1
    weight.requires_grad_()
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[ndim - 1]
    out = convolve(a, weight, padding=size // 2)
    torch.testing.assert_close(out, a, rtol=0, atol=0)
    y = (out**3).sin().sum()
    (g,) = torch.autograd.grad(y, out, retain_graph=True)
    (dw,) = torch.autograd.grad(y, weight)
    where: At = "conv1x1" if size == 1 else "conv3x3"
    terms = (
        slow_terms(a[0].numpy(), g[0].numpy(), where).reshape(-1, 3, size**ndim, 3).sum(0)
    )  # in, offset, out
    np.testing.assert_allclose(terms.transpose(2, 0, 1).ravel(), dw.ravel(), rtol=1e-10)
    total = normgrad(a, g, cube(size, ndim), by="sum").sum()
    torch.testing.assert_close(total, dw.sum(), rtol=1e-10, atol=1e-12)


def test_rows_through_the_engine() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    same = {
        "normgrad": "normgrad+at=conv1x1+by=norm",
        "normgrad_selective": "normgrad+at=scaling+by=selective",
        "gradient": "normgrad+at=bias+by=max",
        "linear_approximation": "normgrad+at=scaling+by=sum",
        "hirescam": "linear_approximation",
    }
    done = explain(net, x, classes(3), [*same, *same.values()])
    for name, twin in same.items():
        torch.testing.assert_close(done.maps[name], done.maps[twin], rtol=1e-6, atol=1e-9, msg=name)
    assert (done.maps["normgrad"] > 0).any()
    assert method("normgrad+by=sum").info.signed
    assert method("normgrad+at=scaling+by=sum").info.unit == "logit"
    assert not method("normgrad+at=conv3x3").info.signed


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_bias_behind_pooling_is_flagged(ndim: int) -> None:
    net, x = HookedNet(conv_net(ndim, head="gap"), "relu"), tiles(ndim)
    done = explain(
        net, x, classes(3), ["gradient", "normgrad+at=bias", "normgrad", "linear_approximation", "cam"]
    )
    for name in ("gradient", "normgrad+at=bias"):
        assert (done.flags[name] & MapFlag.DOUBTFUL).all(), name
    assert not (done.flags["normgrad"] & MapFlag.DOUBTFUL).any()
    assert torch.equal(done.maps["linear_approximation"], done.maps["cam"])


def test_proper_needs_a_convolution() -> None:
    net, x = conv_net(2), tiles(2)
    with pytest.raises(ModelError, match=r"layer 'relu' is a ReLU.*normgrad_layers\+at=real\+layers="):
        explain(HookedNet(net, "relu"), x, classes(3), ["normgrad_proper"])
    trunk = nn.Sequential(net.stem, net.pool, net.body)
    pair = PairNet(trunk, nn.Sequential(nn.ReLU(), nn.Flatten(2), Mean(), nn.Linear(5, 3)), "cut")
    with pytest.raises(ModelError, match="cut of a network in two"):
        explain(pair, x, classes(3), ["normgrad_proper"])
    done = explain(HookedNet(net, "body"), x, classes(3), ["normgrad_proper"])
    # from the whole network's own weight gradients: of one tile they are the sum of the terms, whose norm is bounded by
    # the sum of the norms and reached where there is one position
    weight = net.body.weight.requires_grad_()
    for c in range(3):
        (dw,) = torch.autograd.grad(net(x[:1])[0, c], weight)
        assert 0 < dw.norm() <= done.maps["normgrad_proper"][0, c].sum() * (1 + 1e-5)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def test_a_convolution_called_twice_is_explained_at_the_call_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.conv(x).relu()
            x = self.conv(first)
            first.zero_()  # what the layer was given is kept, not what became of it
            out: Tensor = self.fc(x.square().mean((2, 3)))
            return out

    net, x = Twice(), tiles(2, batch=2)
    found = explain(HookedNet(net, "conv#1"), x, classes(3), ["normgrad_proper"]).maps["normgrad_proper"]
    with torch.no_grad():
        inner: Tensor = net.conv(x).relu()
        out: Tensor = net.conv(inner)
    g = 2 * out * net.fc.weight.detach()[0].view(1, 2, 1, 1) / out[0, 0].numel()
    expected = normgrad(inner, g, window_of(net.conv))
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-8)


def test_gradients_whose_squares_leave_float32() -> None:
    a, g = A.float(), G.float() * 1e-30
    raw, _ = extract(at(a, g), NormGradOptions())
    np.testing.assert_allclose(raw.ravel() * 1e30, [0.5590, 1.1180, 0.5590, 1.7678], atol=5e-5)
    none, _ = extract(at(a, torch.zeros_like(g)), NormGradOptions(by="selective"))
    assert torch.equal(none, torch.zeros(1, 2, 2))


def test_edge_cases() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    clean = explain(net, x, classes(3), ["normgrad", "normgrad+at=conv3x3+by=selective"])
    x[1, 0, 3, 3] = torch.nan
    done = explain(net, x, classes(3), list(clean.maps))
    for name, maps in done.maps.items():
        assert (done.flags[name][1] == MapFlag.NOT_FINITE).all()
        torch.testing.assert_close(maps[[0, 2, 3]], clean.maps[name][[0, 2, 3]], rtol=1e-5, atol=1e-8)
    single, _ = extract(at(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1)), NormGradOptions(at="conv3x3"))
    torch.testing.assert_close(single, torch.full((1, 1, 1), 2.0))
    with pytest.raises(SpecError, match="option at = 'conv5x5'"):
        method("normgrad+at=conv5x5")
