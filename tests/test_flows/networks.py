"""Networks whose maps are known, and cards for them; imported by workers by name."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.model import BagSpec, CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
from workers.models.card import write_card
from workers.models.heads.registry import build_head


class PooledChannels(nn.Module):
    """Average pooling, then each channel summed: the HiResCAM of class c is the pooled channel c itself."""

    def __init__(self, cell: int, ndim: int) -> None:
        super().__init__()
        self.pool = (nn.AvgPool2d, nn.AvgPool3d)[ndim - 2](cell)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled.flatten(2).sum(2)


def pooled_channels(cell: int, ndim: int = 2) -> nn.Module:
    return PooledChannels(cell, ndim)


class ConstantMap(nn.Module):
    """Whatever comes in, every cell is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(16)
        self.ones = nn.Hardtanh(1.0, 1.0 + 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        ones: Tensor = self.ones(self.pool(x))
        return ones.flatten(2).sum(2)[:, :2]


def constant_map() -> nn.Module:
    return ConstantMap()


def write_factory_card(
    folder: Path, function: str, args: dict[str, Any], layer: str, classes: tuple[str, ...],
    weights: dict[str, Tensor] | None = None, **inputs: Any,
) -> str:  # fmt: skip
    """Card of a network made by a function of this module."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = {}
    if weights is not None:
        save_file(weights, folder / "weights.safetensors")
        sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        loaded = {"weights": "weights.safetensors", "sha256": sha256}
    card = ModelCard(
        schema=1,
        name=function,
        version="1",
        licence="Apache-2.0",
        intended_use="tests",
        network=NetworkSpec(adapter="factory", name=f"{__name__}:{function}", args=args, **loaded),
        input=InputSpec(**inputs),
        output=OutputSpec(kind="logits", classes=classes),
        cam=CamLayer(layer=layer),
    )
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


def write_densenet_card(folder: Path, kind: str, **inputs: Any) -> str:
    """Card of a small MONAI DenseNet with fixed random weights."""
    from monai.networks.nets.densenet import DenseNet

    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"channels": 3 if kind == "slide" else 1, **inputs}
    args = {
        "spatial_dims": 2 if kind == "slide" else 3,
        "in_channels": inputs["channels"],
        "out_channels": 2,
        "init_features": 8,
        "growth_rate": 4,
        "block_config": [2, 2],
        "bn_size": 2,
    }
    torch.manual_seed(0)
    save_file(DenseNet(**args).state_dict(), folder / "weights.safetensors")
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    card = ModelCard(
        schema=1,
        name=f"tiny {kind}",
        version="1",
        licence="Apache-2.0",
        intended_use="tests",
        network=NetworkSpec(
            adapter="monai", name="DenseNet", args=args, weights="weights.safetensors", sha256=sha256
        ),
        input=InputSpec(kind=kind, **inputs),
        output=OutputSpec(kind="logits", classes=("benign", "tumour")),
        cam=CamLayer(layer="class_layers.relu"),
    )
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


class SmallNet(nn.Module):
    """Strided and padded convolutions, norms, both kinds of pooling: all that rounds, and seconds less to import than MONAI."""

    def __init__(self, ndim: int, channels: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.Conv3d)[ndim - 2], (nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 2]
        largest, mean = (nn.MaxPool2d, nn.MaxPool3d)[ndim - 2], (nn.AvgPool2d, nn.AvgPool3d)[ndim - 2]
        self.features = nn.Sequential(
            conv(channels, 8, 7, stride=2, padding=3, bias=False), norm(8), nn.ReLU(), largest(3, 2, 1),
            conv(8, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), mean(2),
            conv(16, 24, 3, padding=1, bias=False), norm(24),
        )  # fmt: skip
        self.relu = nn.ReLU()
        self.out = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(self.relu(self.features(x)).flatten(2).mean(2))
        return scores


def small_net(ndim: int, channels: int) -> nn.Module:
    return SmallNet(ndim, channels)


def write_convnet_card(folder: Path, kind: str, **inputs: Any) -> str:
    """Card of `small_net` with fixed random weights."""
    inputs = {"channels": 3 if kind == "slide" else 1, **inputs}
    args = {"ndim": 2 if kind == "slide" else 3, "channels": inputs["channels"]}
    torch.manual_seed(0)
    state = small_net(**args).state_dict()
    return write_factory_card(
        folder, "small_net", args, "relu", ("benign", "tumour"), weights=state, kind=kind, **inputs
    )


class SlowPooledChannels(PooledChannels):
    """The same, taking its time: a run long enough to be interrupted."""

    def __init__(self, cell: int, ndim: int, seconds: float) -> None:
        super().__init__(cell, ndim)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


def slow_pooled_channels(cell: int, ndim: int = 2, seconds: float = 0.2) -> nn.Module:
    return SlowPooledChannels(cell, ndim, seconds)


class Embedder(PooledChannels):
    """The same as an embedding: the HiResCAM of `<r, e>` is the pooled channels weighted by `r`."""


def embedder(cell: int, ndim: int = 2) -> nn.Module:
    return Embedder(cell, ndim)


class RandomEncoder(nn.Module):
    """Two convolutions of random weights that a seed fixes, and the mean over cells."""

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU())
            self.body = nn.Conv2d(6, features, 4, 4)
            self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.relu(self.body(self.stem(x)))
        return maps.mean((2, 3))


def random_encoder(features: int, seed: int) -> nn.Module:
    return RandomEncoder(features, seed)


def write_encoder_card(folder: Path, features: int = 6, seed: int = 0) -> str:
    """Card of a random encoder for slides at 1 um, without a head."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"features": features, "seed": seed}
    card = ModelCard(
        schema=1,
        name="encoder",
        version="1",
        licence="Apache-2.0",
        intended_use="tests",
        network=NetworkSpec(adapter="factory", name=f"{__name__}:random_encoder", args=args),
        input=InputSpec(kind="slide", channels=3, tile=(128, 128), mpp=1.0),
        output=OutputSpec(kind="embedding"),
        cam=CamLayer(layer="relu"),
    )
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


def write_bag_card(
    folder: Path, head: str, classes: tuple[str, ...] = ("benign", "tumour"), features: int = 3,
    args: dict[str, Any] | None = None, network: NetworkSpec | None = None, layer: str = "pool", **bag: Any,
) -> str:  # fmt: skip
    """Card of `embedder`, or another encoder, for slides at 1 um, under a head with fixed random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = build_head(head, features, len(classes), args).state_dict()
    save_file({name: 2 * value.contiguous() for name, value in state.items()}, folder / "head.safetensors")
    sha256 = hashlib.sha256((folder / "head.safetensors").read_bytes()).hexdigest()
    card = ModelCard(
        schema=1,
        name=head,
        version="1",
        licence="Apache-2.0",
        intended_use="tests",
        network=network or NetworkSpec(adapter="factory", name=f"{__name__}:embedder", args={"cell": 32}),
        input=InputSpec(kind="slide", channels=3, tile=(128, 128), mpp=1.0),
        output=OutputSpec(kind="logits", classes=classes),
        cam=CamLayer(layer=layer),
        bag=BagSpec(
            head=head, weights="head.safetensors", sha256=sha256, features=features, args=args or {}, **bag
        ),
    )
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


class TwoWords(nn.Module):
    """Two symbols of a vocabulary of three: one said of the left half of a tile, one of the right."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(cell)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        half = pooled.shape[-1] // 2
        return torch.stack([side.sum((2, 3)) for side in (pooled[..., :half], pooled[..., half:])], dim=1)


def two_words(cell: int) -> nn.Module:
    return TwoWords(cell)
