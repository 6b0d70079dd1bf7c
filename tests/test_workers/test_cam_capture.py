"""The split: gradients of the tail only, and a model that is left exactly as it was found."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from tests.test_workers.tiny_networks import EVERYWHERE, ConvNet, classes, conv_net, monai_networks, tiles
from workers.cam.capture import HookedNet, PairNet, SplitNet
from workers.cam.explain import explain

PURE = EVERYWHERE


def state(net: nn.Module) -> dict[str, Any]:
    """Everything a call could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "flags": [m.training for m in net.modules()],
        "hooks": [[len(getattr(m, h)) for h in hooks] for m in net.modules()],
        "inplace": [getattr(m, "inplace", None) for m in net.modules()],
        "trainable": [p.requires_grad for p in net.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "values": [v.tolist() for v in net.state_dict().values()],
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def half_trained() -> nn.Module:
    """In train mode but for one frozen norm layer, with gradients lying about."""
    net = conv_net(2)
    net.train()
    net.stem[1].eval()
    net.body.weight.requires_grad_(False)
    net.fc.weight.grad = torch.full_like(net.fc.weight, 7.0)
    return net


def test_the_model_is_left_as_found() -> None:
    net = half_trained()
    before = state(net)
    explain(HookedNet(net, "relu"), tiles(2), classes(3), PURE[:2])
    assert state(net) == before


def test_the_model_is_left_as_found_after_an_error() -> None:
    net = half_trained()
    before = state(net)
    with pytest.raises(RuntimeError):
        HookedNet(net, "relu").forward(torch.zeros(2, 5, 8, 8))  # 5 channels instead of 2
    with pytest.raises(ModelError):
        explain(HookedNet(net, "relu"), tiles(2), classes(3), ["cam"])
    HookedNet(net, "relu").trunk(tiles(2))
    assert state(net) == before


def test_train_mode_does_not_change_the_map() -> None:
    x = tiles(2)
    expected = explain(HookedNet(conv_net(2), "relu"), x, classes(3), ["gradcam"]).maps["gradcam"]
    found = explain(HookedNet(half_trained(), "relu"), x, classes(3), ["gradcam"]).maps["gradcam"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "outer", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad]
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_works_frozen_and_under_any_grad_mode(
    outer: Callable[[], contextlib.AbstractContextManager[Any]], frozen: bool, needs_grad: bool
) -> None:
    net = conv_net(2).requires_grad_(not frozen)
    expected = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), PURE)
    with outer():
        # under inference_mode the batch itself is an inference tensor
        x = tiles(2) * 1
        if needs_grad and not x.is_inference():
            x.requires_grad_()
        found = explain(HookedNet(net, "relu"), x, classes(3), PURE)
    for name in PURE:
        assert torch.equal(found.maps[name], expected.maps[name])


def test_the_trunk_records_no_graph_and_weights_get_no_gradient() -> None:
    net = conv_net(2)
    seen: dict[str, bool] = {}
    for name in ("stem", "body", "tail"):
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.requires_grad})
        )
    split = HookedNet(net, "relu").forward(tiles(2))
    assert seen == {"stem": False, "body": False, "tail": True}
    assert split.activations.is_leaf
    HookedNet(net, "relu").grad(split.scores[:, 0], split.activations)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["resnet-2d", "densenet-2d", "densenet-3d"])
def test_gradients_equal_those_of_the_whole_network(name: str) -> None:
    net, layer, shape = monai_networks()[name]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    kept: list[Tensor] = []

    def keep(_m: nn.Module, _i: object, out: Tensor) -> Tensor:
        kept.append(out)
        return out.clone()  # an in-place ReLU may follow

    handle = net.get_submodule(layer).register_forward_hook(keep)
    scores = net(x)
    handle.remove()
    (g,) = torch.autograd.grad(scores[:, 1].sum(), kept[0])
    hooked = HookedNet(net, layer)
    split = hooked.forward(x)
    torch.testing.assert_close(split.activations, kept[0], rtol=0, atol=0)
    torch.testing.assert_close(split.scores, scores, rtol=0, atol=0)
    torch.testing.assert_close(hooked.grad(split.scores[:, 1], split.activations), g, rtol=1e-6, atol=1e-9)


class InPlace(nn.Module):
    """The layer's output is changed in place right after it, and the layer is the identity on its own input."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.layer = nn.Identity()
        self.inplace = inplace
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        b = self.layer(a)
        b = F.relu_(b) if self.inplace else F.relu(b)
        out: Tensor = self.fc((b * b).mean((2, 3)))
        return out


def test_an_in_place_operation_after_the_layer_changes_nothing() -> None:
    found = explain(HookedNet(InPlace(True), "layer"), tiles(2), classes(3), PURE)
    expected = explain(HookedNet(InPlace(False), "layer"), tiles(2), classes(3), PURE)
    assert (HookedNet(InPlace(True), "layer").trunk(tiles(2)) < 0).any(), "activations before the ReLU"
    for name in PURE:
        assert torch.equal(found.maps[name], expected.maps[name])


class Boxed(NamedTuple):
    first: Tensor
    note: str


class Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = x.relu()
        return {"tuple": (y, "note"), "list": [y, "note"], "named": Boxed(y, "note"), "dict": {"y": y}}[
            self.kind
        ]


class Wrapped(nn.Module):
    """A layer that gives its output in company, and a network that does so with its scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner(kind)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        y = out["y"] if isinstance(out, dict) else out[0]
        return self.fc(y.sin().mean((2, 3))), "extra"


@pytest.mark.parametrize("kind", ["tuple", "list", "named"])
def test_outputs_in_company(kind: str) -> None:
    x = tiles(2)
    done = explain(HookedNet(Wrapped(kind), "inner"), x, classes(3), ["hirescam"])
    a = x.relu()
    weight = Wrapped(kind).fc.weight.detach()
    expected = torch.einsum("ck,bkyx->bcyx", weight, a * a.cos()) / a[0, 0].numel()
    torch.testing.assert_close(done.maps["hirescam"], expected, rtol=1e-5, atol=1e-7)


def test_an_output_without_a_tensor_in_reach_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"'inner' gives dict; expected a tensor"):
        HookedNet(Wrapped("dict"), "inner").forward(tiles(2))


class Twice(nn.Module):
    """One ReLU used for two things."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3)
        self.relu = nn.ReLU()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.spare = nn.Conv2d(2, 2, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.relu(self.conv1(x)))
        self.unused = self.spare(x[:, :2])
        x = self.second(self.relu(self.conv2(x)))
        out: Tensor = self.fc(x.flatten(2).mean(2))
        return out


def test_a_layer_that_runs_twice_needs_a_number() -> None:
    net, x = Twice().eval(), tiles(2)
    with pytest.raises(ModelError, match=r"more than once.*'relu#0'"):
        HookedNet(net, "relu").forward(x)
    for call, twin in (("relu#0", "first"), ("relu#1", "second")):
        found = explain(HookedNet(net, call), x, classes(3), PURE)
        expected = explain(HookedNet(net, twin), x, classes(3), PURE)
        for name in PURE:
            assert torch.equal(found.maps[name], expected.maps[name])
    with pytest.raises(ModelError, match="ran 2 times"):
        HookedNet(net, "relu#2").forward(x)
    with pytest.raises(ModelError, match="call number"):
        HookedNet(net, "relu#last")


def test_layers_that_cannot_be_explained() -> None:
    net, x = Twice().eval(), tiles(2)
    with pytest.raises(
        ModelError, match=r"no layer 'conv'; near names: conv1, conv2|near names: conv2, conv1"
    ):
        HookedNet(net, "conv")
    with pytest.raises(ModelError, match="no layer ''"):
        HookedNet(net, "")
    with pytest.raises(ModelError, match="do not depend on layer 'spare'"):
        explain(HookedNet(net, "spare"), x, classes(3), ["gradcam"])
    with pytest.raises(ModelError, match=r"'fc' gives shape \(4, 3\)"):
        HookedNet(net, "fc").forward(x)
    net.add_module("idle", nn.ReLU())
    with pytest.raises(ModelError, match="'idle' ran 0 times"):
        HookedNet(net, "idle").forward(x)
    with pytest.raises(ModelError, match="'idle' ran 0 times"):
        HookedNet(net, "idle").trunk(x)


def test_scores_must_be_one_row_a_tile() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    with pytest.raises(ModelError, match=r"expected scores of shape \(4, classes\)"):
        HookedNet(net, "0").forward(tiles(2))


class OwnNoGrad(nn.Module):
    """A network that runs its backbone under `no_grad`, as frozen backbones often are."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.net.relu(self.net.body(self.net.pool(self.net.stem(x))))
        out: Tensor = self.net.fc(self.net.tail(a).flatten(2).mean(2))
        return out


def test_a_backbone_under_its_own_no_grad_is_explained() -> None:
    expected = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), PURE)
    found = explain(HookedNet(OwnNoGrad(conv_net(2)), "net.relu"), tiles(2), classes(3), PURE)
    for name in PURE:
        assert torch.equal(found.maps[name], expected.maps[name])


class Trunk(nn.Module):
    def __init__(self, net: ConvNet, carry: bool) -> None:
        super().__init__()
        self.net, self.carry = net, carry

    def forward(self, x: Tensor) -> Any:
        a = self.net.relu(self.net.body(self.net.pool(self.net.stem(x))))
        return (a, x.mean()) if self.carry else a


class Tail(nn.Module):
    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, carried: Tensor | None = None) -> Any:
        out = self.net.fc(self.net.tail(a).flatten(2).mean(2))
        return out if carried is None else out + 0 * carried


@pytest.mark.parametrize("carry", [False, True])
def test_a_pair_equals_the_hooked_network(carry: bool) -> None:
    net, x = conv_net(2), tiles(2)
    nets: list[SplitNet] = [PairNet(Trunk(net, carry), Tail(net), "relu"), HookedNet(net, "relu")]
    pair, hooked = (explain(n, x, classes(3), PURE) for n in nets)
    for name in PURE:
        assert torch.equal(pair.maps[name], hooked.maps[name])
    for split in nets:
        a = split.trunk(x)
        assert not a.requires_grad
        torch.testing.assert_close(split.tail(a, x), net(x))
        torch.testing.assert_close(split.tail(0 * a, x), split.tail(torch.zeros_like(a), x[:4]))
        assert not torch.equal(split.tail(2 * a, x), net(x))


@pytest.mark.parametrize("method", ["gradcam", "eigencam"])
def test_two_hundred_calls_leave_nothing_behind(method: str) -> None:
    net, x = conv_net(1), tiles(1, batch=1)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    explain(HookedNet(net, "relu"), x, classes(3), [method])
    before, found = tensors(), state(net)
    for _ in range(200):
        explain(HookedNet(net, "relu"), x, classes(3), [method])
    assert tensors() <= before  # fewer where other tests' garbage was collected meanwhile
    assert state(net) == found
