"""Eigen-CAM and its kin: the first principal direction of activations, or of activations times gradients.

The parts are small and additive where they can be, so that one direction can be found for a whole slide: sum `gram` and
`channel_sums` over its tiles, `leading` once, turn the direction with `positive_sum`, `project` every tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.cam.method import Options, row
from workers.cam.view import View

LEAST_ENERGY = 0.2
"""A direction with a smaller share of the energy does not stand for the map."""
LEAST_GAP = 0.01
"""A second singular value nearer to the first than this makes the direction arbitrary."""
TIE = 1e-9
"""Relative size below which two float64 sums are the same."""


def gram(m: Tensor) -> Tensor:
    """Gram matrix of the channels, summed over tiles and cells: additive over batches.

    Parameters
    ----------
    m
        `(B, K, Z)`, finite.

    Returns
    -------
    Tensor
        `(K, K)` float64.
    """
    flat = m.double().transpose(0, 1).flatten(1)
    return flat @ flat.mT


def channel_sums(m: Tensor) -> Tensor:
    """`(2, K)` float64, sums of the channels of `(B, K, Z)` and of their magnitudes: additive over batches."""
    m = m.double()
    return torch.stack([m.sum((0, 2)), m.abs().sum((0, 2))])


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """First eigenvector `(..., n)`, of either sign, and all eigenvalues `(..., n)`, ascending, of `(..., n, n)`."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[..., -1], values


def project(m: Tensor, v: Tensor) -> Tensor:
    """Maps `(B, Z)` float64 of `(B, K, Z)` on one direction `(K,)`, or on a direction a tile `(B, K)`."""
    return torch.matmul(v.expand(len(m), -1)[:, None], m.double())[:, 0]


def largest_entry(v: Tensor) -> Tensor:
    """`(...)` the entry of largest magnitude of `(..., n)`, the first of several."""
    return v.gather(-1, v.abs().argmax(-1, keepdim=True))[..., 0]


def positive_sum(v: Tensor, sums: Tensor) -> Tensor:
    """Turn directions so that the sum of the map is positive; if it vanishes, so that their largest entry is.

    On non-negative activations the first uncentred direction then gives a map that is nowhere negative (Perron-Frobenius).

    Parameters
    ----------
    v
        `(..., K)` float64.
    sums
        `(2, ..., K)`, `channel_sums` of what is projected.
    """
    total, size = (v * sums[0]).sum(-1), (v.abs() * sums[1]).sum(-1)
    turn = torch.where(total.abs() <= TIE * size, largest_entry(v), total) < 0
    return torch.where(turn[..., None], -v, v)


def larger_side(v: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Turn directions so that the map's maximum outweighs its minimum; if both are alike, their largest entry is positive.

    Parameters
    ----------
    v
        `(..., n)` float64.
    high, low
        `(...)` largest and smallest value of the map that `v` gives.
    """
    balance = high + low
    size = torch.maximum(high.abs(), low.abs())
    turn = torch.where(balance.abs() <= TIE * size, largest_entry(v), balance) < 0
    return torch.where(turn[..., None], -v, v)


def arbitrary(values: Tensor) -> Tensor:
    """Whether the first direction is close to arbitrary, `(...)`, from the Gram matrix's eigenvalues `(..., n)`.

    It explains under a fifth of the energy, or the second singular value lies within 1 % of the first.
    """
    energy = values.clamp_min(0)
    first = energy[..., -1]
    second = energy[..., -2] if energy.shape[-1] > 1 else torch.zeros_like(first)
    weak = first < LEAST_ENERGY * energy.sum(-1)
    return (first > 0) & (weak | (second.sqrt() > (1 - LEAST_GAP) * first.sqrt()))


@dataclass(frozen=True)
class Finite:
    """A float64 copy whose rows LAPACK takes: one bad row would have the whole batch refused, so it is solved as zeros."""

    m: Tensor
    sound: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, m: Tensor) -> Finite:
        double = m.to(torch.float64, copy=True)
        sound = double.sum((1, 2)).isfinite()
        return cls(double.masked_fill_(~sound[:, None, None], 0.0), sound, m.dtype)

    def give_back(self, raw: Tensor) -> Tensor:
        """Maps `(B, Z)` in the type that came, bad rows NaN."""
        return torch.where(self.sound[:, None], raw, torch.nan).to(self.dtype)


def principal(m: Tensor) -> tuple[Tensor, Tensor]:
    """First right singular vector `(B, K)` of each tile's `(B, K, Z)`, of either sign, and the Gram's eigenvalues.

    From the Gram matrix of the smaller side, never the larger one.
    """
    k, z = m.shape[1:]
    if k <= z:
        return leading(m @ m.mT)
    u, values = leading(m.mT @ m)
    v = torch.matmul(m, u[..., None])[..., 0]
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(
        torch.finfo(torch.float64).tiny
    ), values


def centre_(m: Tensor) -> Tensor:
    """Take each channel's mean over the cells off `(B, K, Z)`, in place; a channel equal in all cells is 0, not rounding."""
    flat = m.amax(-1, keepdim=True) == m.amin(-1, keepdim=True)
    return m.sub_(m.mean(-1, keepdim=True)).masked_fill_(flat, 0.0)


def eigencam(a: Tensor, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Eigen-CAM (Muhammad & Yeasin, IJCNN 2020): no class, no gradient.

    With `M = A` as Z x K, the map is `M v1`, `v1` the first right singular vector, found in float64. A singular vector has
    no sign. Uncentred: the map's sum is made positive (`positive_sum`). Centred, as pytorch-grad-cam has it: every
    channel's mean is taken off first, and the larger side of the map is made positive (`larger_side`).

    Parameters
    ----------
    a
        `(B, K, Z)`.
    centred
        The library's form.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)`, see `arbitrary`.
    """
    if centred:
        return _larger(a, centred)
    rows = Finite.of(a)
    v, values = principal(rows.m)
    sums = torch.stack([rows.m.sum(-1), torch.linalg.vector_norm(rows.m, 1, -1)])
    return rows.give_back(project(rows.m, positive_sum(v, sums))), arbitrary(values)


def eigengradcam(a: Tensor, g: Tensor, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Eigen-CAM of activations times gradients (pytorch-grad-cam): specific to a class through the gradient alone.

    The larger side of the map is made positive (`larger_side`): evidence for and against cannot be told apart.
    Parameters and returns as `eigencam`.
    """
    return _larger(a * g, centred)


def _larger(m: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    rows = Finite.of(m)
    inner = centre_(rows.m) if centred else rows.m
    v, values = principal(inner)
    low, high = project(inner, v).aminmax(dim=-1)
    return rows.give_back(project(inner, larger_side(v, high, low))), arbitrary(values)


class EigenOptions(Options):
    """Options of Eigen-CAM and EigenGradCAM."""

    centred: bool = False
    """Take each channel's mean off first."""

    def facts(self) -> dict[str, Any]:
        return (
            {"signed": True, "edition": "channels centred (pytorch-grad-cam), sign fixed"}
            if self.centred
            else {}
        )


def _eigencam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    return eigencam(view.a, options.centred)


def _eigengradcam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    return eigengradcam(view.a, view.g, options.centred)


METHODS = (
    row(
        "eigencam", "Eigen-CAM", _eigencam, "1",
        "Muhammad & Yeasin, Eigen-CAM, IJCNN 2020", signed=False,
        edition="uncentred (paper), sum made positive; centred (pytorch-grad-cam): larger side made positive",
        needs=("activations",), class_specific=False, options=EigenOptions(),
    ),
    row(
        "eigengradcam", "EigenGradCAM", _eigengradcam, "1",
        "Gildenblat and contributors, pytorch-grad-cam, 2021", edition="of A g, uncentred unless asked, larger side made positive",
        options=EigenOptions(),
    ),
)  # fmt: skip
