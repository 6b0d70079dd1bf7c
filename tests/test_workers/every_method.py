"""Every row of the method table on a small network that it can explain; new rows are covered without being named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.test_workers.tiny_networks import ConvNet, classes, conv_net
from tests.test_workers.tiny_transformers import PATCH, TinyViT, tiny_vit, vit_tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import Explained
from workers.cam.method import Method
from workers.cam.methods import METHODS, method
from workers.cam.tokens import TokenLayout
from workers.trust import explained

CHEAP = {
    "smoothgradcampp": "n=3",
    "igcam": "steps=8",
    "sscam": "samples=2",
    "iscam": "samples=3",
}
"""Options that only save time."""

NAMES = tuple(f"{name}+{CHEAP[name]}" if name in CHEAP else name for name in METHODS)


class Setting(NamedTuple):
    net: nn.Module
    layer: str
    tokens: TokenLayout
    x: Tensor

    def explain(self, name: str) -> Explained:
        return explained(HookedNet(self.net, self.layer, tokens=self.tokens), self.x, classes(3), name)


def row(name: str) -> Method:
    return method(name)


def attends(name: str) -> bool:
    return "attention" in method(name).info.needs


def uses_gradients(name: str) -> bool:
    """Relevance through attention differentiates too."""
    return "gradients" in method(name).info.needs or name in ("attention_relevance", "legrad")


def setting(name: str, *, head: str = "gap", side: int = 12, seed: int = 0) -> Setting:
    """A network for one method: pooling and a linear layer behind the explained one, or a small transformer."""
    if attends(name):
        return Setting(tiny_vit(pool="mean", seed=seed), "blocks.1", TokenLayout("tokens", 3), vit_tiles())
    x = torch.randn(3, 2, side, side + 2, generator=torch.Generator().manual_seed(1))
    layer = "body" if name == "normgrad_proper" else "relu"
    return Setting(conv_net(2, head=head, seed=seed), layer, TokenLayout(), x)


def one_cell(name: str) -> Setting:
    """The explained layer has one position."""
    found = setting(name)
    if attends(name):
        net = found.net
        assert isinstance(net, TinyViT)
        net.position = nn.Parameter(torch.randn(1, 1, 8))
        return found._replace(x=found.x[:, :, :PATCH, :PATCH])
    return found._replace(x=found.x[:, :, :2, :2])


def all_alike(name: str) -> Setting:
    """Every position of the explained layer holds the same, and the network treats them alike."""
    found = setting(name)
    if attends(name):
        assert isinstance(found.net, TinyViT)
        with torch.no_grad():
            found.net.position.zero_()
        return found._replace(x=torch.ones_like(found.x))
    assert isinstance(found.net, ConvNet)
    with torch.no_grad():
        found.net.body.weight.zero_()
        assert found.net.body.bias is not None
        found.net.body.bias.copy_(torch.linspace(0.3, 1.7, 5))
    return found


def last_linear(net: nn.Module) -> nn.Linear:
    assert isinstance(net.fc, nn.Linear)
    return net.fc


class Spoilt(torch.autograd.Function):
    """A finite value with a NaN gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * torch.nan


def spoil(net: nn.Module) -> None:
    """Give the input of the last linear layer a NaN gradient."""
    linear = last_linear(net)
    inner: Callable[[Tensor], Tensor] = linear.forward
    changed: Any = lambda x: inner(Spoilt.apply(x))  # type: ignore[no-untyped-call]  # noqa: E731
    linear.forward = changed  # type: ignore[method-assign]
