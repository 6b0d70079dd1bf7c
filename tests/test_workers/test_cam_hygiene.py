"""A call leaves nothing: no hook, flag, gradient or changed weight on the network, no memory, no state of torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_workers.every_method import NAMES, Setting, last_linear, setting
from tests.test_workers.tiny_networks import classes, conv_net
from workers.cam.capture import HookedNet
from workers.cam.explain import explain

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def in_use(of: Setting) -> Setting:
    """As in the middle of training: some of it frozen, gradients lying about, a hook of somebody's own."""
    net = of.net.train()
    first = next(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm))
    first.eval()
    next(net.parameters()).requires_grad_(False)
    linear = last_linear(net)
    linear.weight.grad = torch.full_like(linear.weight, 7.0)
    linear.register_forward_hook(lambda _m, _i, _o: None)
    return of


def state(of: Setting) -> dict[str, Any]:
    net = of.net
    return {
        "training": [m.training for m in net.modules()],
        "hooks": [[list(getattr(m, h)) for h in HOOKS] for m in net.modules()],
        "inplace": [getattr(m, "inplace", None) for m in net.modules()],
        "forward": [m.__dict__.get("forward") for m in net.modules()],
        "names": [n for n, _ in net.named_modules()],
        "trainable": [p.requires_grad for p in net.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "values": [v.tolist() for v in net.state_dict().values()],
        "parameters": [id(p) for p in net.parameters()],
        "input": (of.x.tolist(), of.x.requires_grad, of.x.grad),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
        "random": torch.get_rng_state().tolist(),
        "functions": [
            id(f) for f in (torch.softmax, F.softmax, F.scaled_dot_product_attention, Tensor.softmax)
        ],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_network_and_torch_are_left_as_found(name: str) -> None:
    of = in_use(setting(name))
    before = state(of)
    of.explain(name)
    after = state(of)
    for key, value in before.items():
        assert after[key] == value, key


@pytest.fixture(scope="module")
def young() -> Iterator[None]:
    """The collector looks at what is made from here on alone; else it walks a million objects of the libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> int:
    # by type, not isinstance: that asks lazy modules for attributes
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("name", NAMES)
def test_a_few_calls_leave_no_tensor(name: str) -> None:
    """Not even one that the cycle collector would free in time: on a GPU it would hold memory until then."""
    of = setting(name)
    of.explain(name)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            of.explain(name)
        assert tensors() <= before  # fewer where other tests' garbage was collected meanwhile
    finally:
        gc.enable()


def resident() -> int:
    found: int = psutil.Process(os.getpid()).memory_info().rss
    return found


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("name", ["gradcam", "eigencam"])
def test_a_thousand_calls_leave_memory_where_it_was(name: str) -> None:
    net, targets = conv_net(2), classes(3)[:1]
    x = torch.randn(1, 2, 48, 48, generator=torch.Generator().manual_seed(0))

    def call() -> int:
        maps = explain(HookedNet(net, "relu"), x, targets, [name]).maps[name]
        return maps.element_size() * maps.numel()

    for _ in range(100):
        size = call()
    gc.collect()
    count, before = tensors(), resident()
    for _ in range(1000):
        call()
    gc.collect()
    assert tensors() <= count
    # activations are five times the map: to keep a map alone would cost this much, activations or a graph far more
    assert resident() - before < 1000 * size
