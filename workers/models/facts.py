"""What planning needs to know of a model, found by loading it once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from schemas.errors import ModelError
from schemas.explanation import AskedPrecision, Precision
from schemas.model import ModelCard, ModelFacts, OutputSpec
from workers.cam.geometry import grid_cells
from workers.cam.methods import method
from workers.cam.reduce import reductions
from workers.cam.targets import resolve, score_names
from workers.models.adapter import ModelAdapter
from workers.models.bags import load_head
from workers.models.card import LoadedCard, resolved
from workers.models.cnn import load_model
from workers.models.fast import make_fast, tiers
from workers.models.lvm_med import LICENCE


def identified(card: ModelCard, model: ModelAdapter) -> dict[str, Any]:
    """The resolved card and the digest of every parameter and buffer that was really loaded.

    A factory may bring its own weights, or make random ones: the card alone does not say what is run.
    """
    state = hashlib.sha256()
    for name, value in sorted(model.net.module.state_dict().items()):
        array = value.detach().cpu().contiguous()
        state.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        state.update(array.reshape(-1).view(torch.uint8).numpy())
    return {**resolved(card), "state_sha256": state.hexdigest()}


def model_facts(
    loaded: LoadedCard,
    layer: str,
    targets: Sequence[str],
    methods: Sequence[str] = (),
    tile: tuple[int, ...] | None = None,
    cell_centres: Literal["receptive_field", "grid"] = "receptive_field",
    precision: AskedPrecision = "fp32",
    device: str = "cpu",
) -> ModelFacts:
    """Load the network of a card on the CPU, check it, and say what it is.

    Parameters
    ----------
    layer
        Layer to explain.
    targets
        Class names, indices, `predicted`, `all`; empty takes the card's default.
    methods
        CAM methods whose grids are wanted.
    tile
        Tile size in model px; None takes the card's.
    cell_centres
        Cells placed where they were measured, or on an even grid over the tile.
    precision
        As asked; `fast` becomes the best tier in which this network runs on `device`.
    device
        Where it will be computed; everything else is found on the CPU.

    Raises
    ------
    ModelError, SpecError
        See `load_model` and `resolve`.
    """
    card = loaded.card
    size = tile or card.input.tile
    model = load_model(loaded, layer=layer, tile=size)
    known = identified(card, model)
    n_outputs = model.n_outputs if card.bag is None else _checked_head(loaded, known["state_sha256"])
    found = resolve(targets, card.output, n_outputs)
    cells = model.cells if cell_centres == "receptive_field" else grid_cells(model.cells.shape, size)
    shape = (card.input.channels, *size)
    files = (
        card.network.weights,
        card.network.trunk,
        card.network.tail,
        card.bag.weights if card.bag else "",
    )
    return ModelFacts(
        card=known,
        classes=score_names(card.output, n_outputs),
        targets=tuple(t.name for t in found),
        target_index=tuple(t.index for t in found),
        layer=layer,
        tile=size,
        precision=_settled(loaded, layer, size, precision, device),
        cells=cells,
        grids={name: method(name).cells(model.net, shape, cells) for name in methods},
        reductions=reductions(model.net, model.prepare(torch.zeros(1, *shape)), methods),
        notes=(f"{LICENCE}; the card says: {card.licence}",) if card.network.adapter == "lvm_med" else (),
        weights_bytes=sum((loaded.folder / f).stat().st_size for f in files if f),
    )


def _checked_head(loaded: LoadedCard, encoder: str) -> int:
    """C of the bag head; ModelError if it was trained on another encoder than the one of this digest."""
    head = load_head(loaded)
    bag = loaded.card.bag
    assert bag is not None
    if bag.encoder_digest not in ("", encoder):
        msg = (
            f"{loaded.path}: the bag head was trained on the features of another encoder: [bag] encoder_digest is "
            f"{bag.encoder_digest[:12]}, that of the encoder's weights here is {encoder[:12]}; give the encoder it was trained on"
        )
        raise ModelError(msg)
    return head.classes


def _settled(
    loaded: LoadedCard, layer: str, tile: tuple[int, ...], asked: AskedPrecision, device: str
) -> Precision:
    """The tier that is run: tried here, so that a network which does not run in it fails before any tile."""
    *better, last = tiers(asked, device)
    for precision in better:
        with suppress(ModelError):
            make_fast(load_model(loaded, device, layer, tile), precision, tile)
            return precision
    if last != "fp32":
        make_fast(load_model(loaded, device, layer, tile), last, tile)
    return last


def retarget(facts: ModelFacts, output: OutputSpec, targets: Sequence[str]) -> ModelFacts:
    """`facts` with other targets: a CSV row may name its own."""
    found = resolve(targets, output, len(facts.classes))
    return facts.model_copy(
        update={"targets": tuple(t.name for t in found), "target_index": tuple(t.index for t in found)}
    )
