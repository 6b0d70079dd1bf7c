"""Tile models: a card becomes a network that is loaded, frozen, split and checked before any tile is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.explanation import CellGeometry
from schemas.model import CamLayer, InputSpec, ModelCard
from workers.cam.capture import HookedNet, SplitNet
from workers.cam.geometry import measure_cells
from workers.cam.reach import check_tokens
from workers.cam.targets import resolve
from workers.cam.tokens import TokenLayout
from workers.models.adapter import ModelAdapter
from workers.models.card import LoadedCard
from workers.models.checkpoint import check_digest, load_weights
from workers.models.embedding import Embedding
from workers.models.exported import load_exported, load_scripted_pair
from workers.models.lvm_med import lvm_med, lvm_med_names
from workers.models.names import without
from workers.models.networks import factory_network, monai_network
from workers.models.optional import timm_network, transformers_names, transformers_network
from workers.models.outputs import make_readout
from workers.models.weighted import folded

Adapt = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class TileModel:
    """A network that scores tiles; see `ModelAdapter`."""

    card: ModelCard
    device: torch.device
    target_layer: str
    net: SplitNet
    cells: CellGeometry
    n_outputs: int

    def prepare(self, pixels: NDArray[Any] | Tensor) -> Tensor:
        return prepare(pixels, self.card.input, self.device)

    def scores(self, x: Tensor) -> Tensor:
        output = self.net.forward(x, differentiable=False).scores.detach()
        return self.net.readout.reading(output)(output)


def load_model(
    loaded: LoadedCard, device: str = "cpu", layer: str | None = None, tile: tuple[int, ...] | None = None
) -> ModelAdapter:
    """Load the network of a card.

    Parameters
    ----------
    loaded
        The card, from `load_card`.
    device
        A torch device.
    layer
        Target layer instead of the card's.
    tile
        Tile size (model px, array order) instead of the card's.

    Returns
    -------
    ModelAdapter
        Run once on a synthetic batch: layer, gradient and number of outputs are known to be right.

    Raises
    ------
    ModelError
        Weights differ from their digest or do not fit, an unknown network or layer, or outputs that are not the card's
        classes; the message begins with the card's path.
    """
    card = loaded.card
    layer = layer or card.cam.layer
    place = torch.device(device)
    size = tile or card.input.tile
    try:
        net = _split(loaded, layer, size, place)
        n_outputs = _preflight(net, card, size, place)
        cells = measure_cells(net, (card.input.channels, *size))
    except ModelError as error:
        msg = f"{loaded.path}: {error.message}"
        raise ModelError(msg) from error
    return TileModel(card, place, layer, net, cells, n_outputs)


def prepare(pixels: NDArray[Any] | Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    """Pixels as read to the network's scale.

    `scale` maps its two values to 0 and 1; `window` clips first; then `(x - mean) / std` a channel.

    Parameters
    ----------
    pixels
        `(B, C_in, *S)` uint8 or float32, as the reader gives them.
    spec
        The card's `[input]`.
    device
        Where the result lies; uint8 is moved as such.

    Returns
    -------
    Tensor
        `(B, C_in, *S)` float32, contiguous.

    Raises
    ------
    ModelError
        Other channels or axes than the card's.
    """
    raw = torch.as_tensor(pixels)
    if raw.ndim != 2 + len(spec.tile) or raw.shape[1] != spec.channels:
        msg = (
            f"pixels of shape {tuple(raw.shape)} do not fit the model: expected (tiles, {spec.channels} channels, "
            f"{len(spec.tile)} spatial axes)"
        )
        raise ModelError(msg)
    x = raw.to(device).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    low, high = spec.window or spec.scale
    if spec.window:
        x.clamp_(low, high)
    x.sub_(low).div_(high - low)
    trailing = [1] * len(spec.tile)
    if spec.mean:
        x.sub_(torch.tensor(spec.mean, device=device).view(1, -1, *trailing))
    if spec.std:
        x.div_(torch.tensor(spec.std, device=device).view(1, -1, *trailing))
    return x


def _split(loaded: LoadedCard, layer: str, tile: tuple[int, ...], device: torch.device) -> SplitNet:
    spec = loaded.card.network
    if spec.adapter == "export":
        return _program(loaded, layer, tile, device)
    network = _eager(loaded)
    if spec.embedding:
        cam = loaded.card.cam
        lies = TokenLayout(cam.layout, cam.prefix_tokens, cam.token_grid)
        Embedding(spec.embedding, spec.embedding_layer, lies).attach(network)
    readout = make_readout(loaded)
    return HookedNet(
        network.eval().requires_grad_(False).to(device),
        layer,
        readout,
        tokens=_tokens(loaded.card.cam, layer),
    )


def _eager(loaded: LoadedCard) -> nn.Module:
    """The network of a card, its weights loaded, weighted convolutions folded."""
    spec = loaded.card.network
    adapt: Adapt = dict
    match spec.adapter:
        case "monai":
            network = monai_network(spec.name, spec.args)
        case "lvm_med":
            network = lvm_med(spec.name, spec.args)
            adapt = partial(lvm_med_names, network)
        case "timm":
            network = timm_network(spec.name, spec.args)
        case "transformers":
            config = loaded.folder / spec.config if spec.config else None
            if config:
                check_digest(config, spec.config_sha256)
            network = transformers_network(spec.name, spec.args, config, whole=not spec.embedding)
            adapt = partial(transformers_names, network)
        case _:
            network = factory_network(spec.name, spec.args)
    if spec.weights:
        path = loaded.folder / spec.weights
        load_weights(network, path, spec.sha256, adapt=lambda state: adapt(without(state, spec.leave_out)))
    elif spec.adapter != "factory":
        msg = f"[network] weights is missing: {spec.name!r} would be explained with random weights"
        raise ModelError(msg)
    return folded(network)


def _tokens(cam: CamLayer, layer: str) -> TokenLayout:
    # Another layer of the network has the same patches, but may lie otherwise.
    return TokenLayout(cam.layout if layer == cam.layer else "", cam.prefix_tokens, cam.token_grid)


def _program(loaded: LoadedCard, layer: str, tile: tuple[int, ...], device: torch.device) -> SplitNet:
    spec = loaded.card.network
    if spec.weights:
        path = loaded.folder / spec.weights
        check_digest(path, spec.sha256)
        net = load_exported(path, layer, (loaded.card.input.channels, *tile), make_readout(loaded))
    else:
        if layer != loaded.card.cam.layer:
            msg = f"layer {layer!r} is asked for, but a trunk and tail pair is cut where its card says: {loaded.card.cam.layer!r}"
            raise ModelError(msg)
        trunk, tail = loaded.folder / spec.trunk, loaded.folder / spec.tail
        check_digest(trunk, spec.trunk_sha256)
        check_digest(tail, spec.tail_sha256)
        net = load_scripted_pair(trunk, tail, layer, make_readout(loaded))
    net.module.requires_grad_(False).to(device)
    net.tokens = _tokens(loaded.card.cam, layer)
    return net


def _preflight(net: SplitNet, card: ModelCard, tile: tuple[int, ...], device: torch.device) -> int:
    """Number of outputs, from a pass over two synthetic tiles that also needs a gradient to reach the layer."""
    shape = (2, card.input.channels, *tile)
    if len(tile) != len(card.input.tile):
        msg = f"tile = {list(tile)} has {len(tile)} axes; the model's input has {len(card.input.tile)}"
        raise ModelError(msg)
    x = torch.linspace(0, 1, math.prod(shape), device=device)
    try:
        split = net.forward(x.reshape(shape))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        msg = f"the network does not take input of shape {shape} (tiles, channels, *tile): {reason}"
        raise ModelError(msg) from error
    found = tuple(split.activations.shape[2:])
    if len(found) != len(tile):
        msg = (
            f"the layer gives {found or 'no'} cells a channel, the tile has {len(tile)} axes: name a layer whose output is a "
            "feature map, or say in the card's [cam] how its tokens lie (layout, prefix_tokens, token_grid)"
        )
        raise ModelError(msg)
    check_tokens(net, x.reshape(shape), split)
    reading = net.readout.reading(split.scores.detach())
    with torch.enable_grad():
        scores = reading(split.scores)
    net.grad(scores.sum(1), split.activations)
    if card.bag is not None and scores.shape[1] != card.bag.features:
        msg = (
            f"the encoder gives {scores.shape[1]} numbers a tile, the bag head takes [bag] features = {card.bag.features}; "
            "correct the card, or use the encoder that the head was trained on"
        )
        raise ModelError(msg)
    resolve(["all"], card.tile_output, scores.shape[1])
    return scores.shape[1]
