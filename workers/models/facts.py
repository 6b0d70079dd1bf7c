"""What planning needs to know of a model, found by loading it once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from schemas.model import ModelFacts, OutputSpec
from workers.cam.geometry import grid_cells
from workers.cam.targets import resolve
from workers.models.card import LoadedCard, resolved
from workers.models.cnn import load_model


def model_facts(
    loaded: LoadedCard,
    layer: str,
    targets: Sequence[str],
    tile: tuple[int, ...] | None = None,
    cell_centres: Literal["receptive_field", "grid"] = "receptive_field",
) -> ModelFacts:
    """Load the network of a card on the CPU, check it, and say what it is.

    Parameters
    ----------
    layer
        Layer to explain.
    targets
        Class names, indices, `predicted`, `all`; empty takes the card's default.
    tile
        Tile size in model px; None takes the card's.
    cell_centres
        Cells placed where they were measured, or on an even grid over the tile.

    Raises
    ------
    ModelError, SpecError
        See `load_model` and `resolve`.
    """
    card = loaded.card
    size = tile or card.input.tile
    model = load_model(loaded, layer=layer, tile=size)
    found = resolve(targets, card.output, model.n_outputs)
    cells = model.cells if cell_centres == "receptive_field" else grid_cells(model.cells.shape, size)
    files = (card.network.weights, card.network.trunk, card.network.tail)
    if card.output.kind == "logit":
        classes = card.output.classes[-1:] or ("1",)
    else:
        classes = card.output.classes or tuple(str(i) for i in range(model.n_outputs))
    return ModelFacts(
        card=resolved(card),
        classes=classes,
        targets=tuple(t.name for t in found),
        target_index=tuple(t.index for t in found),
        layer=layer,
        tile=size,
        cells=cells,
        weights_bytes=sum((loaded.folder / f).stat().st_size for f in files if f),
    )


def retarget(facts: ModelFacts, output: OutputSpec, targets: Sequence[str]) -> ModelFacts:
    """`facts` with other targets: a CSV row may name its own."""
    found = resolve(targets, output, len(facts.classes))
    return facts.model_copy(
        update={"targets": tuple(t.name for t in found), "target_index": tuple(t.index for t in found)}
    )
