"""KPCA-CAM: the first component of kernel PCA over the cells."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.eigen import Finite, arbitrary, centre_, larger_side, leading
from workers.cam.method import Options, row
from workers.cam.view import View

AT_ONCE = 2**24
"""Entries of kernel matrices held together: 128 MiB in float64."""
MOST_CELLS = 2**13
"""Of a map: its kernel matrix is then 512 MiB, and its eigenvectors take minutes a tile."""


class KernelOptions(Options):
    """Options of KPCA-CAM."""

    kernel: Literal["sigmoid", "rbf", "poly", "cosine", "linear"] = "sigmoid"
    gamma: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Scale of sigmoid, rbf and poly; 0: one over the number of channels."""
    coef0: float = Field(1.0, allow_inf_nan=False)
    """Constant of sigmoid and poly."""
    degree: int = Field(3, ge=1)
    """Of poly."""


def kpcacam(a: Tensor, options: KernelOptions | None = None) -> tuple[Tensor, Tensor]:
    """KPCA-CAM (Karmani et al., MMSP 2024): cells are points of K channels, the map is their first kernel component.

    Channels are centred over the cells, the kernel matrix `(Z, Z)` is centred, and the map is its first eigenvector times
    the root of the eigenvalue, as in the authors' code. The larger side of the map is made positive
    (`workers.cam.eigen.larger_side`). With the linear kernel it is the centred Eigen-CAM.

    Parameters
    ----------
    a
        `(B, K, Z)`.
    options
        Kernel and its constants.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)`, see `workers.cam.eigen.arbitrary`, of the eigenvalues above 0 (the sigmoid kernel has others too).

    Raises
    ------
    ModelError
        More than `MOST_CELLS` cells.
    """
    if a.shape[-1] > MOST_CELLS:
        msg = (
            f"method 'kpcacam' compares every cell with every other one; the layer has {a.shape[-1]} cells, at most "
            f"{MOST_CELLS} are taken. Explain a coarser layer, or use method 'eigencam' with centred=true, its linear kernel"
        )
        raise ModelError(msg)
    options = options or KernelOptions()
    rows = Finite.of(a)
    some = max(1, AT_ONCE // a.shape[-1] ** 2)
    parts = [_component(rows.m[i : i + some], options) for i in range(0, len(a), some)]
    return rows.give_back(torch.cat([raw for raw, _ in parts])), torch.cat([doubt for _, doubt in parts])


def _component(m: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    matrix = _kernel(centre_(m).mT, options)
    rounding = 1e-14 * m.shape[-1] * matrix.abs().amax((1, 2))
    matrix = centre_(centre_(matrix).mT)
    u, values = leading((matrix + matrix.mT) / 2)  # symmetric but for rounding
    # cells that are all alike leave only rounding, whose direction is no map
    first = torch.where(values[:, -1] > rounding, values[:, -1], 0.0)
    low, high = u.aminmax(dim=-1)
    return larger_side(u, high, low) * first.sqrt()[:, None], arbitrary(values) & (first > 0)


def _kernel(points: Tensor, options: KernelOptions) -> Tensor:
    """Kernel matrices `(B, Z, Z)` of points `(B, Z, K)`."""
    gamma = options.gamma or 1 / points.shape[-1]
    dot = points @ points.mT
    match options.kernel:
        case "sigmoid":
            return torch.tanh(gamma * dot + options.coef0)
        case "poly":
            return (gamma * dot + options.coef0) ** options.degree
        case "rbf":
            square = dot.diagonal(dim1=-2, dim2=-1)
            return torch.exp(-gamma * (square[:, :, None] + square[:, None] - 2 * dot).clamp_min(0))
        case "cosine":
            norm = dot.diagonal(dim1=-2, dim2=-1).sqrt()
            unit = points / torch.where(norm == 0, 1, norm)[..., None]
            return unit @ unit.mT
    return dot


def _kpcacam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    return kpcacam(view.a, options)


METHODS = (
    row(
        "kpcacam", "KPCA-CAM", _kpcacam, "1",
        "Karmani et al., KPCA-CAM: Visual Explainability of Deep Computer Vision Models using Kernel PCA, arXiv:2410.00267",
        edition="channels centred, larger side made positive", needs=("activations",), class_specific=False,
        options=KernelOptions(),
    ),
)  # fmt: skip
