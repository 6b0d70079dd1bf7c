"""The demo's tiny networks, trained on the spot on synthetic data other than what they explain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from schemas.model import CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
from workers.models.card import write_card
from workers.models.cnn import prepare
from workers.models.networks import monai_network
from workers.synthetic.slides import Progress, training_tiles
from workers.synthetic.tissue import Planted
from workers.synthetic.volumes import training_crops
from workers.training.fit import fit, turn_and_jitter_tiles, turn_and_jitter_volumes

SLIDE_TILE_PX = 224
VOLUME_TILE_PX = 32
ENCODER_TILE_PX = 128
FEATURES = 16
"""Numbers a tile of the encoder."""
_BATCH = 16
_SLIDE_STEPS, _VOLUME_STEPS = 120, 220
_VOLUME_CROPS = 1200
_TRAINING_SLIDE_PX = 4096
_DIRECTIONS = 8
_ENCODER_STEPS, _ENCODER_BATCH, _ENCODER_SLIDE_PX = 150, 32, 3072
_ENCODER_RADII_PX = (60.0, 130.0)
_STANDARDISED = 640
_LAST = "class_layers.out"
_LAYER = "class_layers.relu"
"""The last activation: what follows is a mean over cells and one linear layer, nothing that works in place."""


def train_slide_model(folder: Path, seed: int, progress: Progress | None = None) -> Path:
    """Train a DenseNet (stride 16) that says whether a tile holds a distractor, a lesion; return its `model.toml`.

    Parameters
    ----------
    folder
        Made if missing; gets `model.toml` and `weights.safetensors`.
    seed
        Of the training slides, the first weights and the order.
    progress
        Called with (steps done, steps in all).
    """
    args = {
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": 2,
        "init_features": 16,
        "growth_rate": 8,
        "block_config": [2, 2, 2],
        "bn_size": 2,
    }
    pixels = InputSpec(kind="slide", channels=3, tile=(SLIDE_TILE_PX, SLIDE_TILE_PX), mpp=0.5)
    x, y, mask = training_tiles(_SLIDE_STEPS * _BATCH, SLIDE_TILE_PX, seed, slide_px=_TRAINING_SLIDE_PX)
    net = _new_net(args, seed)
    fit(
        net,
        x,
        y,
        mask=mask,
        prepare=_preparing(pixels),
        augment=turn_and_jitter_tiles,
        seed=seed,
        steps=_SLIDE_STEPS,
        batch=_BATCH,
        progress=progress,
    )
    output = OutputSpec(kind="logits", classes=("distractor", "lesion"), default_target="lesion")
    return _save(folder, net, "demo-slide", args, pixels, output)


def train_volume_model(folder: Path, seed: int, progress: Progress | None = None) -> Path:
    """Train a 3-D DenseNet (stride 4) that tells rim+ from rim- and from nothing; return its `model.toml`.

    Parameters are those of `train_slide_model`.
    """
    args = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "init_features": 16,
        "growth_rate": 16,
        "block_config": [4],
        "bn_size": 2,
    }
    tile = (VOLUME_TILE_PX,) * 3
    pixels = InputSpec(
        kind="volume",
        channels=1,
        tile=tile,
        spacing_mm=(1.0, 1.0, 1.0),
        # comes to (ppb - 6) / 30; veins, two to four times as bright, are cut off
        window=(-24.0, 66.0),
        mean=(1 / 3,),
        std=(1 / 3,),
    )
    x, y = training_crops(_VOLUME_CROPS, tile, seed=seed)
    net = _new_net(args, seed)
    fit(
        net,
        x,
        y,
        prepare=_preparing(pixels),
        augment=turn_and_jitter_volumes,
        seed=seed,
        steps=_VOLUME_STEPS,
        batch=_BATCH,
        progress=progress,
    )
    output = OutputSpec(kind="logit", classes=("rim-", "rim+"), default_target="rim+")
    return _save(folder, net, "demo-volume", args, pixels, output)


def train_tile_encoder(folder: Path, seed: int, progress: Progress | None = None) -> Path:
    """Train a DenseNet (stride 16, mean over cells, one linear layer) that describes a tile; return its `model.toml`.

    It learns to tell whether nuclei of a focus point in each of eight directions or in all of them, from labelled tiles of other
    synthetic slides, through `FEATURES` numbers that are kept as the embedding, standardised over those tiles. It never sees the label of a slide, nor
    that two of the eight directions mean anything: that is left for a head to find out.

    Parameters are those of `train_slide_model`.
    """
    kinds = range(1, _DIRECTIONS + 2)
    directions = [180.0 * k / _DIRECTIONS for k in range(_DIRECTIONS)]
    planted = [
        Planted(kind, radius, direction)
        for radius in reversed(_ENCODER_RADII_PX)
        for kind, direction in zip(kinds, [*directions, None], strict=True)
    ]
    x, y, mask = training_tiles(
        _ENCODER_STEPS * _ENCODER_BATCH,
        ENCODER_TILE_PX,
        seed,
        slide_px=_ENCODER_SLIDE_PX,
        planted=planted,
        kinds=kinds,
    )
    args = {
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": FEATURES,
        "init_features": 16,
        "growth_rate": 8,
        "block_config": [2, 2, 2],
        "bn_size": 2,
    }
    pixels = InputSpec(kind="slide", channels=3, tile=(ENCODER_TILE_PX, ENCODER_TILE_PX), mpp=0.5)
    net = _new_net(args, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        both = torch.nn.Sequential(net, torch.nn.Linear(FEATURES, len(kinds)))
    fit(
        both,
        x,
        y,
        mask=mask,
        prepare=_preparing(pixels),
        augment=turn_and_jitter_tiles,
        seed=seed,
        steps=_ENCODER_STEPS,
        batch=_ENCODER_BATCH,
        progress=progress,
    )
    _standardise(net, x[:: max(1, len(x) // _STANDARDISED)], _preparing(pixels))
    return _save(folder, net, "demo-tiles", args, pixels, OutputSpec(kind="embedding"))


@torch.no_grad()
def _standardise(
    net: torch.nn.Module, x: NDArray[Any], prepared: Callable[[NDArray[Any]], torch.Tensor]
) -> None:
    """Fold into the last layer what makes each number of the embedding of `x` have mean 0 and deviation 1."""
    last = net.get_submodule(_LAST)
    assert isinstance(last, torch.nn.Linear)
    found = torch.cat([net(prepared(part)) for part in np.array_split(x, -(-len(x) // _ENCODER_BATCH))])
    spread = found.std(0)
    last.weight /= spread[:, None]
    last.bias.copy_((last.bias - found.mean(0)) / spread)


def _new_net(args: dict[str, Any], seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return monai_network("DenseNet", args)


def _preparing(pixels: InputSpec) -> Callable[[NDArray[Any]], torch.Tensor]:
    return lambda raw: prepare(raw, pixels, torch.device("cpu"))


def _save(
    folder: Path, net: torch.nn.Module, name: str, args: dict[str, Any], pixels: InputSpec, output: OutputSpec
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    save_file(net.state_dict(), weights)
    card = ModelCard(
        schema=1,
        name=name,
        version="1",
        licence="CC0-1.0",
        intended_use="demonstration only: trained for seconds on synthetic images; it knows nothing of patients",
        network=NetworkSpec(
            adapter="monai",
            name="DenseNet",
            args=args,
            weights=weights.name,
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        ),
        input=pixels,
        output=output,
        cam=CamLayer(layer=_LAYER),
    )
    path = folder / "model.toml"
    write_card(path, card)
    return path
