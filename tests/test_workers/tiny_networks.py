"""Small networks that the tests of the CAM engine, the model loaders and the parity tests share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from schemas.model import OutputSpec
from workers.cam.methods import METHODS
from workers.cam.targets import ResolvedTarget, resolve

M = TypeVar("M", bound=nn.Module)

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

TILES = {1: (23,), 2: (18, 26), 3: (9, 12, 14)}
"""Odd, unequal sizes: an axis taken for another one does not pass unseen."""


class ConvNet(nn.Module):
    """Two convolutions, the explained layer `relu`, a tail that is linear (`head='gap'`) or not (`'conv'`)."""

    def __init__(self, ndim: int, *, head: str = "conv", classes: int = 3, inplace: bool = False) -> None:
        super().__init__()
        conv = CONV[ndim - 1]
        self.stem = nn.Sequential(conv(2, 6, 3, padding=1), NORM[ndim - 1](6), nn.ReLU())
        self.pool = POOL[ndim - 1](2)
        self.body = conv(6, 5, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.tail = nn.Sequential(conv(5, 4, 3), nn.ReLU()) if head == "conv" else nn.Identity()
        self.fc = nn.Linear(4 if head == "conv" else 5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.body(self.pool(self.stem(x))))
        out: Tensor = self.fc(self.tail(x).flatten(2).mean(2))
        return out


def conv_net(
    ndim: int, *, head: str = "conv", classes: int = 3, seed: int = 0, inplace: bool = False
) -> ConvNet:
    torch.manual_seed(seed)
    return lively(ConvNet(ndim, head=head, classes=classes, inplace=inplace))


def lively(net: M) -> M:
    """Running statistics and biases as training would leave them, so that no term vanishes by being 0 or 1."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    return net.eval()


def tiles(ndim: int, batch: int = 4, channels: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, *TILES[ndim], generator=torch.Generator().manual_seed(seed))


EVERYWHERE = tuple(
    name
    for name, m in METHODS.items()
    if {"activations", "gradients", "tail"}.issuperset(m.info.needs) and name != "normgrad_proper"
)
"""Methods that need of a network no more than its two halves; `normgrad_proper` explains convolutions alone."""


def classes(n: int) -> tuple[ResolvedTarget, ...]:
    """Every class of an n-class model as a target."""
    return resolve(["all"], OutputSpec(classes=tuple(f"class {i}" for i in range(n))), n)


def monai_networks() -> dict[str, tuple[nn.Module, str, tuple[int, ...]]]:
    """Name -> untrained network, its last activation layer, its tile `(C_in, *S)`."""
    from monai.networks.nets.densenet import DenseNet
    from monai.networks.nets.resnet import ResNet

    torch.manual_seed(0)
    dense: dict[str, Any] = {"out_channels": 3, "init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
    return {
        "resnet-2d": (
            lively(
                ResNet(
                    "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=2, n_input_channels=3, num_classes=3
                )
            ),
            "layer4",
            (3, 48, 64),
        ),
        "densenet-2d": (lively(DenseNet(spatial_dims=2, in_channels=3, **dense)), "features", (3, 40, 56)),
        "densenet-3d": (
            lively(DenseNet(spatial_dims=3, in_channels=1, **dense)),
            "features",
            (1, 24, 32, 40),
        ),
    }
