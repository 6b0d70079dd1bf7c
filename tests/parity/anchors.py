"""What the three parity tests share: networks, batches of mixed classes, our maps, tolerances.

Tolerances, in float32 on one machine: both sides run the same network, so activations and gradients agree but for the order
of a few sums: 1e-5 relative, plus 1e-6 of the largest value where terms cancel. Methods that divide (XGrad-CAM,
Grad-CAM++) carry the other library's epsilon in a denominator: 1e-4.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tests.test_workers.tiny_networks import conv_net, monai_networks
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.targets import ResolvedTarget

CASES = ("conv-2d", "conv-3d", "resnet-2d", "densenet-2d", "densenet-3d")
"""`conv-*`: a tail that is not linear. DenseNet: target `features`, followed by an in-place ReLU."""

BATCH = 4


def case(name: str) -> tuple[nn.Module, str, Tensor, list[int]]:
    """Network, layer, batch, and a class a row (mixed)."""
    if name.startswith("conv"):
        ndim = int(name[5])
        net, layer, shape = conv_net(ndim), "relu", (2, *(19, 14, 16)[:ndim])
    else:
        net, layer, shape = monai_networks()[name]  # type: ignore[assignment]
    x = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(3))
    return net, layer, x, [2, 0, 1, 2]


def ours(net: nn.Module, layer: str, x: Tensor, classes: list[int], method: str) -> Tensor:
    """Our raw maps `(B, *grid)` of row `b` for `classes[b]`, from a frozen copy of the network."""
    frozen = copy.deepcopy(net).requires_grad_(False)
    done = explain(HookedNet(frozen, layer), x, [ResolvedTarget(str(c), c) for c in range(3)], [method])
    return done.maps[method][range(len(x)), classes]


def agree(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Equal to `rtol`, and to a tenth of it of the largest value where terms cancel."""
    expected = expected.detach()
    scale = float(expected.abs().max())
    assert scale > 0, "two empty maps prove nothing"
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=rtol / 10 * scale)
