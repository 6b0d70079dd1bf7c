"""Eigen-CAM: the activations' first principal direction."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.cam.method import row


def eigencam(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-CAM, uncentred (Muhammad & Yeasin, IJCNN 2020): no class, no gradient.

    With `M = A` as Z x K, the map is `M v1`, `v1` the first right singular vector. It is found in float64 from the Gram
    matrix of the smaller side. A singular vector has no sign: the map's sum is made positive (on non-negative
    activations the map is then non-negative everywhere); if that sum vanishes, the largest entry of `v1` is.

    Parameters
    ----------
    a
        `(B, K, Z)`.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)` True where the direction is close to arbitrary: it explains under a fifth of the energy, or the second
        singular value lies within 1 % of the first.
    """
    m = a.double()
    finite = m.isfinite().flatten(1).all(1)
    # LAPACK refuses the whole batch for one bad row: such a row is solved as zeros and given back as NaN.
    m = torch.where(finite[:, None, None], m, 0.0)
    k, z = m.shape[1:]
    if k <= z:
        values, vectors = torch.linalg.eigh(m @ m.mT)
        v = vectors[..., -1]
    else:
        values, vectors = torch.linalg.eigh(m.mT @ m)
        v = torch.einsum("bkz,bz->bk", m, vectors[..., -1])
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    projected = torch.einsum("bk,bkz->bz", v, m)
    total = projected.sum(1)
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0]
    tied = total.abs() <= 1e-9 * projected.abs().sum(1)
    flip = torch.where(tied, largest, total) < 0
    projected = torch.where(flip[:, None], -projected, projected)

    energy = values.clamp_min(0)
    first = energy[:, -1]
    second = energy[:, -2] if energy.shape[1] > 1 else torch.zeros_like(first)
    doubtful = (first > 0) & ((first < 0.2 * energy.sum(1)) | (second.sqrt() > 0.99 * first.sqrt()))
    return torch.where(finite[:, None], projected, torch.nan).to(a.dtype), doubtful


METHODS = (
    row(
        "eigencam", "Eigen-CAM", lambda view, _: eigencam(view.a), "1",
        "Muhammad & Yeasin, Eigen-CAM, IJCNN 2020", signed=False, edition="uncentred (paper), sum made positive",
        needs=("activations",), class_specific=False,
    ),
)  # fmt: skip
