"""Smooth Grad-CAM++: derivatives averaged over noisy copies of the input."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.method import Options, row
from workers.cam.view import View

Numerator = Literal["corrected", "paper"]


class SmoothOptions(Options):
    """Settings of Smooth Grad-CAM++."""

    n: Annotated[int, Field(ge=1)] = 25
    """Noisy copies."""
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.15
    """Standard deviation of the noise, as a share of each tile's max(x) - min(x)."""
    numerator: Numerator = "corrected"
    channels: Annotated[str, Field(pattern=r"^(all|top[1-9]\d*|\d+(-\d+)*)$")] = "all"
    """`3-7-9`: only these channels are summed; `top16`: each tile's 16 of largest weight."""


def smoothgradcampp(
    a: Tensor,
    d1: Tensor,
    d2: Tensor,
    d3: Tensor,
    *,
    numerator: Numerator = "corrected",
    channels: str = "all",
    region: Tensor | None = None,
    neurons: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Smooth Grad-CAM++ from averaged derivatives (Omeiza et al., arXiv:1908.01224).

    `alpha = D / (2 D2 + S D3)` with `S` the channel's sum and `D` = D1 as the paper prints it or, `corrected`, D2, which for
    one copy without noise is Grad-CAM++; a denominator of 0 is replaced by 1. Channel weights are
    `sum over cells of alpha relu(D1)`. A subset restricts the last sum alone, never the weights, so that the maps of
    disjoint subsets add up to the whole map.

    Parameters
    ----------
    a
        Activations of the clean input, `(B, K, Z)`.
    d1, d2, d3
        `(B, K, Z)`: means over the copies of the gradient, of its square and of its cube.
    numerator
        `corrected` or `paper`.
    channels
        `all`, indices joined by hyphens, or `topM`: the M of largest weight in each row, the lower index first among equals.
    region
        `(Z,)` or `(B, Z)` bool: cells outside are 0.
    neurons
        `(K, Z)` or `(B, K, Z)` bool: single terms of the sum.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)` True where a cell that counts has a denominator at or below 0.

    Raises
    ------
    ModelError
        A channel that the layer does not have.
    """
    denominator = 2 * d2 + a.sum(-1, keepdim=True) * d3
    alpha = (d2 if numerator == "corrected" else d1) / torch.where(denominator == 0, 1, denominator)
    weight = (alpha * d1.relu()).sum(-1)
    doubtful = ((denominator <= 0) & (d1 > 0)).flatten(1).any(1)
    kept = torch.where(_chosen(weight, channels), weight, 0)
    terms = a if neurons is None else torch.where(neurons, a, 0)
    found = torch.einsum("bk,bkz->bz", kept, terms)
    return found if region is None else torch.where(region, found, 0), doubtful


def _chosen(weight: Tensor, channels: str) -> Tensor:
    """Which channels `(B, K)` are summed."""
    k = weight.shape[1]
    if channels == "all":
        return torch.ones_like(weight, dtype=torch.bool)
    if channels.startswith("top"):
        order = weight.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1) < int(channels[3:])
    index = [int(c) for c in channels.split("-")]
    if max(index) >= k:
        msg = f"channels={channels}: the layer explained has {k} channels, numbered from 0; leave out {max(index)}"
        raise ModelError(msg)
    chosen = torch.zeros(k, dtype=torch.bool, device=weight.device)
    chosen[index] = True
    return chosen.expand_as(weight)


def noisy_derivatives(view: View, n: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means over `n` noisy copies of the gradient, its square and its cube: `(B, K, Z)` float64.

    Copies are made one after the other: the memory is that of one pass. Noise has each tile's own range, and comes from
    the tile's seed. The cube of a float32 gradient underflows on large grids, so sums are float64.
    """
    x = view.x
    flat = x.flatten(1)
    std = spread * (flat.amax(1) - flat.amin(1)).view(-1, *(1,) * (x.ndim - 1))
    moments = [torch.zeros_like(view.a, dtype=torch.float64) for _ in range(3)]
    for sample in range(n):
        split = view.net.forward(x + std * view.noise(sample))
        with torch.enable_grad():
            y = view.y(split.scores)
        g = view.net.grad(y, split.activations).flatten(2).double()
        for power, moment in enumerate(moments, start=1):
            moment += g**power / n
    return moments[0], moments[1], moments[2]


def _raw(view: View, options: SmoothOptions) -> tuple[Tensor, Tensor]:
    derivatives = noisy_derivatives(view, options.n, options.spread)
    return smoothgradcampp(
        view.a.double(), *derivatives, numerator=options.numerator, channels=options.channels
    )


METHODS = (
    row(
        "smoothgradcampp", "Smooth Grad-CAM++", _raw, "1",
        "Omeiza et al., Smooth Grad-CAM++, arXiv:1908.01224, 2019",
        edition=(
            "numerator D2 where the paper prints D1 (numerator=paper: as printed); noise a share of each tile's range; "
            "before the final ReLU"
        ),
        needs=("activations", "gradients", "input"), options=SmoothOptions(),
    ),
)  # fmt: skip
