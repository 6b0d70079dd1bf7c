"""Neuron importance, and words for it (Selvaraju et al., Grad-CAM, IJCV 2020, section 7).

Grad-CAM's channel weights say which channels speak for a target and which against. Where the model card names channels of the
explained layer, the list can be read; a name is somebody's finding and is shown with its score and where it comes from, and a channel
without one is shown by its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from schemas.errors import SpecError
from schemas.evidence import Evidence, Neuron
from schemas.model import CamLayer, ChannelName
from workers.cam.view import View


def importance(view: View) -> Tensor:
    """`(B, K)` Grad-CAM's channel weights: the mean over cells of the target's gradient, in logit/cell per activation."""
    return view.g.mean(-1)


def names_of(cam: CamLayer, layer: str) -> Mapping[int, ChannelName]:
    """The card's names, if they are of this layer: those of another layer's channels would be wrong words."""
    return cam.channels if layer == cam.layer else {}


def evidence(
    target: str, weights: Tensor, names: Mapping[int, ChannelName] | None = None, n: int = 5
) -> Evidence:
    """Rank channels.

    Parameters
    ----------
    target
        Its name.
    weights
        `(N, K)` importance of each channel in N tiles, of which the mean is taken; tiles that are not finite are left out.
    names
        By channel.
    n
        At most so many for and against; a channel of importance 0 is neither.

    Raises
    ------
    SpecError
        No finite tile, or a name for a channel that the layer does not have.
    """
    names = names or {}
    finite = weights.isfinite().all(1)
    if not bool(finite.any()):
        msg = f"channels cannot be ranked: none of {len(weights)} tiles has finite gradients"
        raise SpecError(msg)
    mean = weights[finite].double().mean(0)
    beyond = [k for k in names if k >= len(mean)]
    if beyond:
        msg = f"[cam.channels] names channel {beyond[0]}, but the layer has {len(mean)}, numbered from 0"
        raise SpecError(msg)
    order = mean.argsort(descending=True, stable=True).tolist()
    values = mean.tolist()

    def neurons(channels: Sequence[int]) -> tuple[Neuron, ...]:
        return tuple(Neuron(channel=k, importance=values[k], name=names.get(k)) for k in channels[:n])

    return Evidence(
        target=target,
        tiles=int(finite.sum()),
        supports=neurons([k for k in order if values[k] > 0]),
        opposes=neurons([k for k in reversed(order) if values[k] < 0]),
    )


def without(view: View, channels: Sequence[int]) -> Tensor:
    """`(B,)` change of the target when channels are set to 0: whether an importance is one.

    Behind a linear head exactly `-sum A g` over those channels and all cells: the map's own claim.
    """
    kept = torch.ones(view.activations.shape[1], dtype=view.activations.dtype, device=view.activations.device)
    kept[list(channels)] = 0
    left = view.activations * kept.view(-1, *[1] * len(view.grid))
    rows = torch.arange(len(left), device=left.device)
    with torch.no_grad():
        changed = view.y(view.net.tail(left, view.x), rows)
    return changed - (view.scores * view.target).sum(1)
