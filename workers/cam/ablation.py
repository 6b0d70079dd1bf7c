"""Ablation-CAM: channels weighted by what the score loses without them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.cam.fan import tail_of_many
from workers.cam.head import linear_head
from workers.cam.method import Options, row
from workers.cam.view import View, full

LEAST_SCORE = 0.01
"""A score of smaller magnitude than this share of the largest drop is no scale to divide by."""


class AblationOptions(Options):
    """Options of Ablation-CAM."""

    divisor: Literal["none", "magnitude", "score"] = "none"
    """What the drop is divided by: nothing, so that maps of tiles are comparable; the score's magnitude; or the score as it is,
    which turns the map over where it is negative (the paper as printed, pytorch-grad-cam)."""
    chunk: int = Field(128, ge=1)
    """Ablated activations in one pass; changes rounding only."""

    def facts(self) -> dict[str, Any]:
        drop = "drop of the score with channel k set to 0"
        editions = {
            "magnitude": f"{drop}, over the score's magnitude: each tile on a scale of its own",
            "score": f"{drop}, over the signed score (as printed): each tile on a scale of its own",
        }
        return {"edition": editions[self.divisor]} if self.divisor in editions else {}


def ablationcam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    """Ablation-CAM (Desai & Ramaswamy, WACV 2020): weights `y - y_k`, `y_k` the score with channel k set to 0.

    The paper divides by `y`, which rescales each tile's map by itself, without bound where a tile's score is near 0, and turns
    evidence for the target into evidence against it where the score is negative: see `divisor`.

    Behind a proven linear head `y - y_k` is the sum of gradient times channel, exactly, without a pass. Behind any other
    tail it takes one pass of the tail a channel, for all targets at once; a channel that is 0 anyway takes none.

    Returns
    -------
    map
        `(B, Z)`; not finite where `y` is 0 and a channel counts.
    doubtful
        `(B,)` True where `|y|` is under a hundredth of the largest drop, and divided by.
    """
    drop = drops(view, options.chunk)
    y = (view.scores * view.target).sum(1, keepdim=True)
    if options.divisor == "none":
        return _sum(drop, view.a), torch.zeros_like(y[:, 0], dtype=torch.bool)
    weight = torch.where(drop == 0, 0, drop / (y.abs() if options.divisor == "magnitude" else y))
    return _sum(weight, view.a), y[:, 0].abs() < LEAST_SCORE * drop.abs().amax(1)


def drops(view: View, chunk: int) -> Tensor:
    """What the target's score loses with each channel set to 0, `(B, K)`."""
    head = linear_head(view.net, view.x)
    if head is not None and head.speaks_for(view.a, view.scores):
        return head.gradient(view.target, view.a.shape[-1]) * view.a.sum(-1)
    lost = view.once(("ablated", chunk), lambda: lost_scores(view, chunk))
    return torch.einsum("bkc,bc->bk", lost, view.target)


def lost_scores(view: View, chunk: int) -> Tensor:
    """What every score loses with each channel set to 0, `(B, K, C)`, by passes of the tail."""
    pairs = (view.a != 0).any(-1).nonzero().cpu()  # waited for once, not once a chunk
    tiles, channels = pairs[:, 0], pairs[:, 1]
    found = view.scores.new_zeros(*view.a.shape[:2], view.scores.shape[1])
    for first in range(0, len(pairs), chunk):
        tile, channel = tiles[first : first + chunk], channels[first : first + chunk]
        ablated = view.activations[tile]
        ablated[torch.arange(len(tile)), channel] = 0
        output = tail_of_many(view.net, ablated, view.x, tile)
        found[tile, channel] = view.scores[tile] - view.reading(full(output.detach()), tile)
    return found


def _sum(weight: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("bk,bkz->bz", weight, a)


METHODS = (
    row(
        "ablationcam", "Ablation-CAM", ablationcam, "1",
        "Desai & Ramaswamy, Ablation-CAM, WACV 2020",
        edition="drop of the score with channel k set to 0, not divided by the score as the paper does", needs=("activations", "tail"),
        options=AblationOptions(),
    ),
)  # fmt: skip
