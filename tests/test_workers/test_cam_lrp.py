"""Relevance propagation: conserved, equal to closed forms and to slow loops, and refused where there is no rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError, SpecError
from tests.test_workers.tiny_networks import CONV, NORM, classes, conv_net, lively, monai_networks, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import Explained, explain
from workers.cam.lrp import LrpOptions, lrp
from workers.cam.methods import method
from workers.cam.readout import Similarity
from workers.cam.targets import functionals
from workers.cam.view import Batch, View, full

Array = NDArray[np.float64]


def of(net: nn.Module, layer: str, x: Tensor, target: Tensor | int, **options: object) -> Tensor:
    """Map in the network's own precision."""
    split = HookedNet(net, layer)
    with torch.no_grad():
        batch = Batch(split, x, split.forward(x), torch.arange(len(x)))
        n = batch.scores.shape[1]
        target = functionals(batch.scores, classes(n))[0][target] if isinstance(target, int) else target
        found, _ = lrp(View(batch, target), LrpOptions.model_validate(options))
    return found


def unbiased(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                value.zero_()
    return net.double()


class Net(nn.Module):
    """Stages in a row; the first is the layer to explain."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stages(x)
        return out


class Say(nn.Module):
    """A function as a module."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def line(*weights: float, bias: float | None = None) -> nn.Linear:
    """One output."""
    linear = nn.Linear(len(weights), 1, bias=bias is not None).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([weights]))
        if bias is not None:
            linear.bias.fill_(bias)
    return linear


def row(*values: float) -> Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


@pytest.mark.parametrize("rule", ["zero", "epsilon", "gamma", "epsilon_plus", "gamma_box"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_without_biases_maps_sum_to_the_score(ndim: int, rule: str) -> None:
    net, x = unbiased(conv_net(ndim)), tiles(ndim, batch=2).double()
    for to, c in itertools.product(("layer", "input"), range(3)):
        found = of(net, "relu", x, c, rule=rule, epsilon=0, to=to)
        torch.testing.assert_close(found.flatten(1).sum(1), net(x)[:, c].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet-2d", "densenet-2d", "densenet-3d"])
def test_real_architectures(name: str) -> None:
    """Residual sums, concatenation, norms that stand alone."""
    net, layer, shape = monai_networks()[name]
    net = net.double()
    leaf = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    (g,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    x = leaf.detach()
    found = of(net, layer, x, 1, rule="zero", to="input", cell=1)
    torch.testing.assert_close(found, (x * g).sum(1), rtol=1e-6, atol=1e-9)
    y = unbiased(net)(x)[:, 1].detach()
    for to, rule in (("layer", "epsilon_plus"), ("input", "zero"), ("input", "gamma")):
        found = of(net, layer, x, 1, rule=rule, to=to, epsilon=0)
        torch.testing.assert_close(found.flatten(1).sum(1), y, rtol=1e-5, atol=0)


def test_at_a_layer_the_zero_rule_is_hirescam() -> None:
    done = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), ["hirescam", "lrp+rule=zero"])
    torch.testing.assert_close(done.maps["lrp+rule=zero"], done.maps["hirescam"], rtol=1e-4, atol=1e-7)


def test_before_pooling_and_a_linear_layer_it_is_cam() -> None:
    net = conv_net(3, head="gap")
    done = explain(HookedNet(net, "relu"), tiles(3), classes(3), ["cam", "lrp+epsilon=0.0"])
    torch.testing.assert_close(done.maps["lrp+epsilon=0.0"], done.maps["cam"], rtol=1e-4, atol=1e-7)


def test_a_linear_model() -> None:
    found = of(
        Net(nn.Identity(), nn.Flatten(), line(2, -3, 5)),
        "stages.0",
        row(1, 4, -2)[:, :, :, None],
        0,
        to="input",
        cell=1,
        rule="zero",
    )
    np.testing.assert_allclose(found.ravel(), [2, -12, -10])


def test_one_relu_layer_by_hand() -> None:
    hidden = nn.Linear(2, 3).double()
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 2], [3, -1], [-1, -1]]))
        hidden.bias.copy_(torch.tensor([1.0, 0, 0]))
    net = Net(nn.Identity(), nn.Flatten(), hidden, nn.ReLU(), line(2, -1, 7))
    x = row(3, 2)  # hidden 8, 7, -5 -> dead; y = 16 - 7
    plain = of(net, "stages.0", x, 0, to="input", cell=1, rule="zero")
    np.testing.assert_allclose(plain.ravel(), [16 * 3 / 8 - 7 * 9 / 7, 16 * 4 / 8 - 7 * -2 / 7])
    # y = 9 goes to the only positive product of the last layer, and on: 1 x 3, 2 x 2 and the bias 1
    np.testing.assert_allclose(
        of(net, "stages.0", x, 0, to="input", cell=1, rule="zplus").ravel(), [9 * 3 / 8, 9 * 4 / 8]
    )
    dropped = of(net, "stages.0", x, 0, to="input", cell=1, rule="zplus", bias="drop")
    np.testing.assert_allclose(dropped.ravel(), [9 * 3 / 7, 9 * 4 / 7])
    # 18 to the first, -9 to the second: 18 (3, 4)/8 - 9 * [2 (1, 0) - (0, 1)]
    mixed = of(net, "stages.0", x, 0, to="input", cell=1, rule="alphabeta")
    np.testing.assert_allclose(mixed.ravel(), [2 * 18 * 3 / 8 - 2 * 9, 2 * 18 * 4 / 8 + 9])


@pytest.mark.parametrize("rule", ["zero", "epsilon", "gamma", "zplus", "alphabeta"])
def test_what_is_dead_has_no_relevance(rule: str) -> None:
    net, x = conv_net(2).double(), tiles(2, batch=2).double()
    with torch.no_grad():
        net.body.weight.abs_().neg_()  # of what is behind a ReLU
        net.body.weight[0] *= -1
        assert net.body.bias is not None
        net.body.bias.fill_(-1)
    found = of(net, "relu", x, 0, rule=rule)
    dead = (HookedNet(net, "relu").trunk(x) == 0).all(1)
    assert dead.any()
    assert (found[dead] == 0).all()
    x[:, :, 5:9] = 0
    assert (of(net, "relu", x, 0, rule=rule, to="input", cell=1)[:, 5:9] == 0).all()


@pytest.mark.parametrize("rule", ["zero", "gamma", "epsilon_plus", "alphabeta"])
def test_a_scale_moved_from_one_layer_to_the_next_changes_nothing(rule: str) -> None:
    def maps(s: float) -> Tensor:
        net = conv_net(2).double()
        assert isinstance(net.tail, nn.Sequential)
        with torch.no_grad():
            net.body.weight *= s
            assert net.body.bias is not None
            net.body.bias *= s
            weight = net.tail[0].weight
            assert isinstance(weight, Tensor)
            weight /= s
        return of(net, "relu", tiles(2).double(), 1, rule=rule, epsilon=0, to="input")

    torch.testing.assert_close(maps(7.0), maps(1.0), rtol=1e-9, atol=1e-12)


Dense = tuple[Array, Array, NDArray[np.bool_]]


class Tiny(nn.Module):
    """Two convolutions, the first with a batch norm, and a linear layer: small enough for dense matrices."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.one = nn.Sequential(CONV[ndim - 1](1, 2, 3, padding=1), NORM[ndim - 1](2))
        self.two = CONV[ndim - 1](2, 2, 2, stride=2)
        self.fc = nn.LazyLinear(2)
        self.size = (5,) if ndim == 1 else (4, 5) if ndim == 2 else (2, 4, 3)
        self(torch.zeros(1, 1, *self.size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.relu(self.two(F.relu(self.one(x)))).flatten(1))
        return out


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Dense, tuple[int, ...]]:
    """Weights `(in, out)`, biases, which inputs each output is connected to, and the output's shape."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        bias = layer(zero)
        units = torch.eye(zero.numel(), dtype=torch.float64).reshape(-1, *shape)
        weights = (layer(units) - bias).flatten(1).numpy()
    return (weights, bias.flatten().numpy(), np.abs(weights) > 1e-14), tuple(bias.shape[1:])


def slow_rule(rule: str, a: Array, layer: Dense, r: Array) -> Array:
    """From the formulas, neuron by neuron."""
    w, b, on = layer
    out = np.zeros(len(a))
    low, high = a.min(), a.max()
    for j in range(len(b)):
        if rule == "alphabeta":
            for factor, sign in ((2.0, 1), (-1.0, -1)):
                terms = [max(sign * a[i] * w[i, j], 0.0) for i in range(len(a))]
                z = sum(terms) + max(sign * b[j], 0.0)
                for i in range(len(a)):
                    out[i] += factor * terms[i] / z * r[j] if z else 0.0
            continue
        terms = []
        for i in range(len(a)):
            up, down = max(w[i, j], 0.0), min(w[i, j], 0.0)
            terms.append({
                "zero": a[i] * w[i, j],
                "epsilon": a[i] * w[i, j],
                "gamma": a[i] * (w[i, j] + 0.25 * up),
                "zplus": max(a[i] * w[i, j], 0.0),
                "zbox": a[i] * w[i, j] - low * up - high * down,
                "flat": float(on[i, j]),
            }[rule])  # fmt: skip
        z = sum(terms)
        z += {"zplus": max(b[j], 0.0), "gamma": b[j] + 0.25 * max(b[j], 0.0), "zbox": 0.0, "flat": 0.0}.get(
            rule, b[j]
        )
        if rule in ("epsilon", "gamma"):
            z += 0.01 if z >= 0 else -0.01
        for i in range(len(a)):
            out[i] += terms[i] / z * r[j] if z else 0.0
    return out


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({"rule": "zero"}, ("zero", "zero", "zero")),
        ({"rule": "epsilon"}, ("epsilon", "epsilon", "epsilon")),
        ({"rule": "gamma"}, ("gamma", "gamma", "gamma")),
        ({"rule": "zplus"}, ("zplus", "zplus", "zplus")),
        ({"rule": "alphabeta"}, ("alphabeta", "alphabeta", "alphabeta")),
        ({"rule": "flat"}, ("flat", "flat", "flat")),
        ({}, ("zplus", "zplus", "epsilon")),
        ({"rule": "gamma_box"}, ("zbox", "gamma", "epsilon")),
        ({"first": "flat"}, ("flat", "zplus", "epsilon")),
    ],
)
def test_equals_its_slow_twin(ndim: int, options: dict[str, str], rules: tuple[str, ...]) -> None:
    torch.manual_seed(ndim)
    net = lively(Tiny(ndim)).double()
    x = torch.randn(2, 1, *net.size, generator=torch.Generator().manual_seed(5)).double()
    found = of(net, "two", x, 1, **options, to="input", cell=1, epsilon=0.01)
    at_layer = of(net, "two", x, 1, **{k: v for k, v in options.items() if k != "first"}, epsilon=0.01)
    for n in range(2):
        values, layers, shape = [x[n].flatten().numpy()], [], (1, *net.size)
        for layer in (net.one, net.two, net.fc):
            of_layer, out = dense(layer, shape)
            layers.append(of_layer)
            z = values[-1] @ of_layer[0] + of_layer[1]
            values.append(z if layer is net.fc else np.maximum(z, 0))
            shape = (int(np.prod(out)),) if layer is net.two else out
        r = values[-1] * np.array([0.0, 1.0])
        for k in (2, 1, 0):
            r = slow_rule(rules[k], values[k], layers[k], r)
            if k == 2:
                np.testing.assert_allclose(
                    at_layer[n].flatten(), r.reshape(2, -1).sum(0), rtol=1e-8, atol=1e-10
                )
        np.testing.assert_allclose(found[n].flatten(), r, rtol=1e-8, atol=1e-10)


def test_pools_sums_and_concatenation_by_hand() -> None:
    def relevance(f: Callable[[Tensor], Tensor], x: Tensor, *weights: float) -> list[float]:
        net = Net(nn.Identity(), Say(f), nn.Flatten(), line(*weights))
        found: list[float] = of(net, "stages.0", x, 0, epsilon=0).ravel().tolist()
        return found

    x = row(1, 3, 2, 6)
    assert relevance(lambda a: F.avg_pool1d(a, 2), x, 1, 2) == pytest.approx([0.5, 1.5, 2, 6])
    assert relevance(lambda a: F.max_pool1d(a, 2), x, 1, 2) == pytest.approx([0, 3, 0, 12])
    assert relevance(lambda a: a[..., :2] + a[..., 2:], x, 1, 2) == pytest.approx([1, 6, 2, 12])
    assert relevance(lambda a: a[..., :2] - a[..., 2:], x, 1, 2) == pytest.approx([1, 6, -2, -12])
    assert relevance(lambda a: torch.cat([a, a[..., 3:]], -1), x, 1, 1, 1, 1, 2) == pytest.approx(
        [1, 3, 2, 18]
    )
    assert relevance(lambda a: F.interpolate(a, scale_factor=2), x, *[1.0] * 8) == pytest.approx(
        [2, 6, 4, 12]
    )
    # a constant keeps its share, a factor has none; what is 0 gets 0 and gives nothing
    assert relevance(lambda a: 3 - a, x, 1, 1, 1, 2) == pytest.approx([-1, 0, -2, -12])
    assert relevance(lambda a: -2 * a / 4, x, 1, 1, 1, 2) == pytest.approx([-0.5, -1.5, -1, -6])
    assert relevance(lambda a: a.mean(-1), x, 4) == pytest.approx([1, 3, 2, 6])
    assert relevance(lambda a: a @ torch.tensor([[1.0], [2], [3], [-1]]).double(), x, 2) == pytest.approx(
        [2, 12, 12, -12]
    )


def test_what_goes_round_the_layer_keeps_its_share() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_it, self.fc = Say(lambda a: 2 * a), line(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc((x + self.double_it(x)).flatten(1))
            return out

    for bias in ("share", "drop"):
        assert of(Skip(), "double_it", row(1, 5), 0, epsilon=0, bias=bias).ravel().tolist() == pytest.approx(
            [2, 10]
        )


class Bare(nn.Module):
    """One residual network in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.start = spelling, nn.Identity()
        self.one, self.norm, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        if self.spelling == "modules":
            a = self.relu(self.norm(self.one(x)))
            out: Tensor = self.fc(self.pool(self.relu(self.two(a) + a)).flatten(1))
            return out
        if self.spelling == "in place":
            a = self.norm(self.one(x))
            a.relu_()
            b = self.two(a)
            b += a
            F.relu_(b[:, :2])  # views: the whole is changed through its parts
            b[:, 2:].clamp_(min=0)
            return self.fc(torch.flatten(b, 2).mean(-1))  # type: ignore[no-any-return]
        n = self.norm
        a = F.conv2d(input=x, weight=self.one.weight, bias=self.one.bias, padding=1)
        a = torch.batch_norm(a, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, n.eps, False)
        a = torch.clamp_min(a, 0)
        b = torch.add(a, torch.conv2d(a, self.two.weight, self.two.bias)).relu()
        return torch.nn.functional.linear(b.sum((2, 3)) / b[0, 0].numel(), self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("options", [{}, {"rule": "gamma_box"}, {"rule": "alphabeta", "bias": "drop"}])
def test_however_it_is_written(options: dict[str, str]) -> None:
    x = tiles(2).double()
    maps = []
    for spelling in ("modules", "in place", "functions"):
        net = Bare(spelling)
        torch.manual_seed(1)
        lively(net)
        maps.append(of(net.double(), "start", x, 2, **options, to="input", epsilon=0))
        weights = {k: v.clone() for k, v in net.state_dict().items()}
        assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-9, atol=1e-12)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(2, keepdim=True))


def overwritten(x: Tensor) -> Tensor:
    out = F.conv1d(x, torch.ones(1, 1, 1))
    x.relu_()
    return out


def scale_a_view(x: Tensor) -> Tensor:
    out = x.clone()
    out[..., :2].exp_()
    return out


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (gate, "gate"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: F.softmax(x, -1), "softmax"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.InstanceNorm1d(1), "instance_norm"),
        (nn.BatchNorm1d(1, track_running_stats=False), "batch_norm by the batch's own statistics"),
        (lambda x: x @ x.mT, "matmul"),
        (lambda x: 1 / (x + 5), "reciprocal|rdiv|Reciprocal"),
        (lambda x: torch.ones(4) / (x + 5), "div"),
        (lambda x: x.clamp(min=0.5), "clamp that makes something of 0"),
        (Cube.apply, "Cube"),
        (scale_a_view, "exp in place"),
        (overwritten, "overwrites the input of a layer"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(f: Callable[[Tensor], Tensor], named: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fc = nn.Identity(), nn.LazyLinear(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(f(self.layer(x)).flatten(1))
            return out

    net = Odd().eval()
    x = torch.rand(1, 1, 4, generator=torch.Generator().manual_seed(0))
    net(x)
    with pytest.raises(ModelError, match=named):
        of(net, "layer", x, 0)


def test_activations_that_are_no_relu_pass() -> None:
    x = row(-1, 2)
    for f in (nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.5, inplace=True), F.elu, F.relu6, torch.tanh):
        net = Net(nn.Identity(), Say(f), nn.Flatten(), line(3, -1))
        (value,) = f(x.clone())
        np.testing.assert_allclose(
            of(net, "stages.0", x, 0, epsilon=0).ravel(), (value * torch.tensor([3.0, -1])).ravel()
        )


def test_a_contrast_is_a_difference() -> None:
    net, x = conv_net(2).double(), tiles(2).double()
    contrast = of(net, "relu", x, torch.tensor([[1.0, -1, 0]]).double())
    torch.testing.assert_close(contrast, of(net, "relu", x, 0) - of(net, "relu", x, 1), rtol=1e-9, atol=1e-12)


def test_a_target_that_is_no_sum_of_outputs_is_doubted() -> None:
    net, x = conv_net(2), tiles(2)
    references = torch.eye(3) + 0.3

    def flags(kind: str) -> Tensor:
        split = HookedNet(net, "relu", Similarity(references, "cosine" if kind == "cosine" else "dot"))
        return explain(split, x, classes(3), ["lrp"]).flags["lrp"] & 16

    assert (flags("cosine") > 0).all()
    assert (flags("dot") == 0).all()


def test_pixels_bounds() -> None:
    net, x = conv_net(2), tiles(2)

    def run(name: str) -> Explained:
        return explain(HookedNet(net, "relu"), x, classes(3)[:1], [name])

    wide, own = run("lrp+rule=gamma_box+to=input+low=-9+high=9"), run("lrp+rule=gamma_box+to=input")
    (a,), (b,) = wide.maps.values(), own.maps.values()
    assert not torch.allclose(a, b)
    with pytest.raises(SpecError, match=r"beyond low = -0\.5"):
        run("lrp+first=zbox+to=input+low=-0.5")
    for wrong, said in (
        ("lrp+first=zbox", "to=input"),
        ("lrp+to=input+low=0", "bounds of z-box"),
        ("lrp+rule=gamma_box+to=input+low=2+high=1", "not below"),
        ("lrp+alpha=0.5", "alpha"),
        ("lrp+rule=deep", "rule"),
    ):
        with pytest.raises(SpecError, match=said):
            method(wrong)
    scaled = Net(Say(lambda a: a / 2), net)
    with pytest.raises(ModelError, match="scales or shifts its input"):
        of(scaled, "stages.1.relu", x, 0, rule="gamma_box", to="input")


def test_two_modules_and_a_half_precision_network() -> None:
    net, x = conv_net(2), tiles(2)
    trunk, tail = (
        nn.Sequential(net.stem, net.pool, net.body, net.relu),
        nn.Sequential(net.tail, nn.Flatten(2), Say(lambda a: a.mean(2)), net.fc),
    )
    expected = explain(HookedNet(net, "relu"), x, classes(3), ["lrp"]).maps["lrp"]
    found = explain(PairNet(trunk, tail, "cut"), x, classes(3), ["lrp"]).maps["lrp"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    half = explain(HookedNet(net.bfloat16(), "relu"), x.bfloat16(), classes(3), ["lrp"]).maps["lrp"]
    scale = float(expected.abs().max())
    assert float((half - expected).abs().max()) < 0.1 * scale


def test_its_grid() -> None:
    net = HookedNet(conv_net(3), "relu")
    done = explain(net, tiles(3), classes(3), ["lrp", "lrp+to=input", "lrp+to=input+cell=3"])
    assert [m.shape[2:] for m in done.maps.values()] == [(4, 6, 7), (3, 3, 4), (3, 4, 5)]
    torch.testing.assert_close(
        *(full(done.maps[n]).flatten(2).sum(2) for n in list(done.maps)[1:]), rtol=1e-4, atol=1e-6
    )
