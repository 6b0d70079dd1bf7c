"""CF-CAM: channels sorted into dominant ones and clusters, whose gradients are filtered before they become weights.

He, Pan & Yao, arXiv:2504.00060, 2025. The first version's code is public and is the edition `code`; the second version speaks of Gaussian
filters, without equations that could be read: the edition `gaussian` is a reconstruction.

What the released code does, measured: its softmax runs on mean gradients, which behind a pooling head are so small that its weights
are all but equal, and the map is close to the plain mean of the activations, whatever the class. Its filter is no bilateral
one. A filter that keeps the mean, such as a Gaussian with symmetric padding, cannot change a channel's weight at all: what
an edition's filter does, it does at the border of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from workers.cam.dbscan import NOISE, dbscan
from workers.cam.method import Doubt, Options, row
from workers.cam.view import View

Padding = Literal["zero", "symmetric", "mirror"]
Weighting = Literal["softmax", "linear"]
Filter = Callable[[Tensor], Tensor]
"""Maps `(n, *grid)` -> the same, filtered."""


class CodeOptions(Options):
    """The released code has none; `temperature` divides its weights before their softmax."""

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class GaussianOptions(CodeOptions):
    """Settings of the reconstruction."""

    weighting: Weighting = "linear"
    """`linear`: weights as they are, signed; `softmax` over the channels that count."""
    local: bool = False
    """The filtered gradients multiply cell by cell instead of by their mean: ours, no part of CF-CAM."""
    sigma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """In cells."""
    padding: Padding = "zero"
    """What lies outside the map: nothing (gradients at the border count less); the map mirrored with its border cells
    repeated (then the filter has no effect on weights); or mirrored about them."""

    @model_validator(mode="after")
    def _one_weighting(self) -> GaussianOptions:
        if self.local and self.weighting == "softmax":
            msg = "local=true has a weight a cell, and no softmax over channels: leave weighting=linear"
            raise ValueError(msg)
        return self

    def facts(self) -> dict[str, Any]:
        ours = "; local=true is our extension, not CF-CAM" if self.local else ""
        inert = (
            "; symmetric padding: the filter has no effect"
            if self.padding == "symmetric" and not self.local
            else ""
        )
        weights = self.weighting + " weights"
        return {
            "signed": self.weighting == "linear",
            "edition": f"version 2 (reconstruction): Gaussian filter, {weights}, before the final ReLU{inert}{ours}",
        }


DOMINANT = -2


def sort_channels(a: Tensor) -> Tensor:
    """What each channel of one tile is, from its activations `(K, Z)`: `DOMINANT`, `NOISE` or the number of its cluster.

    Dominant: a norm of at least the 75th percentile. The rest by DBSCAN with eps the 25th percentile of their distances
    (at least 1e-5) and `max(2, 5 %)` channels a core. Channels closer than a millionth of their size are taken as equal, those
    further than eps by less than a billionth of it as within. They are taken in the order of their norms, so that not even a
    border channel depends on how channels are numbered.

    Returns
    -------
    Tensor
        `(K,)` int64 on the CPU.
    """
    m = a.double()
    norms = torch.linalg.vector_norm(m, dim=1).cpu().numpy()
    threshold = np.percentile(norms, 75)
    labels = np.full(len(norms), DOMINANT, dtype=np.int64)
    rest = np.flatnonzero(norms < threshold)
    rest = rest[np.argsort(norms[rest], kind="stable")]
    labels[rest] = NOISE
    if len(rest) > 1:
        distances = gram_distances(m[torch.from_numpy(rest).to(m.device)])
        eps = max(float(np.percentile(distances[~np.eye(len(rest), dtype=bool)], 25)), 1e-5)
        labels[rest] = dbscan(distances, eps * (1 + 1e-9), max(2, int(0.05 * len(rest))))
    return torch.from_numpy(labels)


def gram_distances(m: Tensor) -> NDArray[np.float64]:
    """Euclidean distances `(N, N)` of the rows of `(N, Z)`, float64, by their Gram matrix."""
    found = m @ m.T
    squares = found.diagonal().clone()
    total = squares[:, None] + squares
    found = found.mul_(-2).add_(total)
    found[found <= 1e-12 * total] = 0  # what rounding leaves of equal rows
    distances: NDArray[np.float64] = found.sqrt_().cpu().numpy()
    np.fill_diagonal(distances, 0)
    return distances


def code_filter(maps: Tensor) -> Tensor:
    """The released code's filter of maps `(n, *grid)`, with as many axes as there are.

    One kernel as large as the map: a Gaussian of 5 cells about the point half the size from the corner, half a cell off the middle, times
    a Gaussian of .1 of each value's distance from the map's mean (not from the centre's, as a bilateral filter has it), divided
    by its sum + 1e-6; one cross-correlation, zeros outside.
    """
    grid = maps.shape[1:]
    axes = [torch.arange(n, dtype=maps.dtype, device=maps.device) - n / 2 for n in grid]
    squared = sum((c.square() for c in torch.meshgrid(*axes, indexing="ij")), maps.new_zeros(()))
    axis = tuple(range(1, maps.ndim))
    off = maps - maps.mean(axis, keepdim=True)
    kernel = torch.exp(-squared / (2 * 5.0**2)) * torch.exp(-off.square() / (2 * 0.1**2))
    kernel = kernel / (kernel.sum(axis, keepdim=True) + 1e-6)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    # as 'same' padding does it: the odd cell goes to the far side
    sides = [side for n in reversed(grid) for side in ((n - 1) // 2, n - 1 - (n - 1) // 2)]
    padded = F.pad(maps, sides)
    filtered: Tensor = convolve(padded[None], kernel[:, None], groups=len(maps))[0]
    return filtered


def gaussian_filter(sigma: float, padding: Padding = "zero") -> Filter:
    """A separable Gaussian of `sigma` cells, cut at `ceil(3 sigma)`, of sum 1; at `sigma` 0 the identity."""

    def filtered(maps: Tensor) -> Tensor:
        for axis in range(1, maps.ndim):
            matrix = _gaussian(maps.shape[axis], sigma, padding).to(maps)
            maps = torch.tensordot(maps, matrix, dims=([axis], [1])).movedim(-1, axis)
        return maps

    return filtered


def _gaussian(n: int, sigma: float, padding: Padding) -> Tensor:
    """The filter along an axis of n cells as a matrix `(n, n)`: row i makes cell i."""
    radius = math.ceil(3 * sigma)
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offset / sigma) ** 2) if radius else np.ones(1)
    kernel = kernel / kernel.sum()
    to = np.arange(n)[:, None] + offset
    inside = np.full(to.shape, True)
    if padding == "zero":
        inside = (to >= 0) & (to < n)
    elif padding == "symmetric":  # period 2 n: 0 1 2 2 1 0 0 1 2
        to = to % (2 * n)
        to = np.where(to < n, to, 2 * n - 1 - to)
    else:  # period 2 n - 2: 0 1 2 1 0 1 2
        period = max(2 * n - 2, 1)
        to = to % period
        to = np.where(to < n, to, period - to)
    matrix = np.zeros((n, n))
    rows = np.broadcast_to(np.arange(n)[:, None], to.shape)
    np.add.at(matrix, (rows[inside], to[inside]), np.broadcast_to(kernel, to.shape)[inside])
    return torch.from_numpy(matrix)


def cfcam(
    a: Tensor,
    g: Tensor,
    labels: Tensor,
    smooth: Filter,
    *,
    weighting: Weighting = "softmax",
    temperature: float = 1.0,
    local: bool = False,
) -> Tensor:
    """The map of one tile.

    Parameters
    ----------
    a, g
        Activations and gradient `(K, *grid)`.
    labels
        `(K,)` from `sort_channels`; noise does not count.
    smooth
        Filter of a cluster's mean gradient, which its channels share; dominant channels keep their own as it is.
    weighting, temperature
        The mean of a channel's gradient is its weight, divided by `temperature` under a softmax over all that count.
    local
        No mean and no softmax: gradients and activations are multiplied cell by cell.

    Returns
    -------
    Tensor
        `(*grid)`.
    """
    n = int(labels.max()) + 1
    dominant, *clusters = [torch.nonzero(labels == i)[:, 0].to(a.device) for i in (DOMINANT, *range(n))]
    gradients = [g[dominant]]
    if clusters:
        shared = smooth(torch.stack([g[c].mean(0) for c in clusters]))
        gradients += [f.expand(len(c), *f.shape) for f, c in zip(shared, clusters, strict=True)]
    kept, filtered = a[torch.cat([dominant, *clusters])], torch.cat(gradients)
    if local:
        return (filtered * kept).sum(0)
    weight = filtered.flatten(1).mean(1)
    if weighting == "softmax":
        weight = (weight / temperature).softmax(0)
    raw: Tensor = torch.tensordot(weight, kept, dims=1)
    return raw


def _each_tile(view: View, smooth: Filter, **settings: Any) -> tuple[Tensor, Doubt]:
    a = view.a.reshape(view.activations.shape)
    g = view.g.reshape(a.shape)
    # Channels are sorted by activations alone. Those of a tile with NaN have no order; its map is given up as NaN.
    finite = view.a.isfinite().flatten(1).all(1).tolist()
    labels = view.once(
        "cfcam",
        lambda: torch.stack(
            [sort_channels(m if ok else torch.zeros_like(m)) for m, ok in zip(view.a, finite, strict=True)]
        ),
    )
    maps = [
        cfcam(a[b], g[b], labels[b], smooth, **settings) if ok else torch.full_like(a[b, 0], torch.nan)
        for b, ok in enumerate(finite)
    ]
    return torch.stack(maps).flatten(1), None


HE = "He, Pan & Yao, CF-CAM: Cluster Filter Class Activation Mapping, arXiv:2504.00060, 2025"

METHODS = (
    row(
        "cfcam_code", "CF-CAM, released code",
        lambda view, o: _each_tile(view, code_filter, temperature=o.temperature), "1", HE, signed=False,
        edition="version 1 as its code does it: softmax weights, which make it all but class-agnostic; before the final ReLU",
        options=CodeOptions(),
    ),
    row(
        "cfcam", "CF-CAM, Gaussian filter (reconstruction)",
        lambda view, o: _each_tile(
            view, gaussian_filter(o.sigma, o.padding), weighting=o.weighting, temperature=o.temperature, local=o.local
        ), "1", HE,
        edition=GaussianOptions().facts()["edition"], options=GaussianOptions(),
    ),
)  # fmt: skip
