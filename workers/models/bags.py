"""The bag head of a model card: built, its weights loaded strictly, tried on a random bag."""

from __future__ import annotations

import torch

from schemas.errors import ModelError
from schemas.model import OutputSpec
from workers.models.card import LoadedCard
from workers.models.checkpoint import load_weights
from workers.models.heads.head import BagHead
from workers.models.heads.registry import build_head

_TRIED = 3
"""Tiles of the random bag."""


def load_head(loaded: LoadedCard, device: str = "cpu") -> BagHead:
    """The head that `[bag]` of a card names, in eval mode and frozen.

    Checkpoints of CLAM, of plain and gated ABMIL, of DSMIL, TransMIL and of the MHIM-MIL baselines load under the names
    they were published with, `module.` anywhere in them.

    Parameters
    ----------
    loaded
        The card; its `[output]` says what the bag's logits are.
    device
        Torch's name of where it goes.

    Raises
    ------
    ModelError
        No `[bag]`, an unknown head or argument, an order of tiles the head does not bear, weights that are another file,
        unsafe, or do not fit the head (features, classes and every key), or logits that are not finite.
    """
    bag = loaded.card.bag
    if bag is None:
        msg = f"{loaded.path}: the card has no [bag]; a model of whole bags needs head, weights, sha256 and features there"
        raise ModelError(msg)
    try:
        head = build_head(bag.head, bag.features, outputs(loaded.card.output), bag.args)
        if head.ordered and bag.order == "any":
            msg = (
                f"[bag] order = 'any', but the head {bag.head!r} reads its tiles in an order; write order = 'row_col' and "
                "give them as it was trained"
            )
            raise ModelError(msg)
        load_weights(
            head,
            loaded.folder / bag.weights,
            bag.sha256,
            adapt=head.adapt,
            said_by="[bag] head, features and args, and [output] classes,",
        )
    except ModelError as error:
        msg = f"{loaded.path}: {error.message}"
        raise ModelError(msg) from error
    head.eval().requires_grad_(False).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        logits = head(torch.randn(_TRIED, bag.features, generator=generator))
    if not logits.isfinite().all():
        msg = (
            f"{loaded.path}: the head {bag.head!r} gives {logits.tolist()} for a random bag; expected finite logits: are "
            f"the weights in {bag.weights} sound?"
        )
        raise ModelError(msg)
    return head


def outputs(output: OutputSpec) -> int:
    """C, the logits a bag head of this `[output]` has.

    Raises
    ------
    ModelError
        A kind that a bag has not, or no way to know how many.
    """
    match output.kind:
        case "logit":
            return 1
        case "logits" | "regression" if output.classes:
            return len(output.classes)
    msg = (
        f"[output] kind {output.kind!r} with {len(output.classes)} classes says nothing of a bag's outputs; with [bag] it is "
        "'logits' or 'regression' with classes = [...], or 'logit'"
    )
    raise ModelError(msg)
