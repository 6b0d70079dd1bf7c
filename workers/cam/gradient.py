"""CAM methods that are pure functions of activations and gradients.

All take `A` and `g = dy/dA` as `(B, K, Z)`, space flattened to its Z cells, and give the raw signed map `(B, Z)`, before
the ReLU that the papers draw. Nothing here knows how many axes the space had.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradcam(a: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM: channels weighted by their mean gradient (Selvaraju et al., ICCV 2017).

    The authors' code sums the gradient instead of averaging: Z times these values, the same picture.
    """
    return _weighted(g.mean(-1), a)


def hirescam(a: Tensor, g: Tensor) -> Tensor:
    """HiResCAM: gradient times activation, cell by cell (Draelos & Carin, 2020).

    Where the tail is linear in `A` the cells sum to the score minus its bias.
    """
    return (g * a).sum(1)


def layercam(a: Tensor, g: Tensor) -> Tensor:
    """Layer-CAM: activation times the positive part of the gradient (Jiang et al., TIP 2021)."""
    return (g.relu() * a).sum(1)


def xgradcam(a: Tensor, g: Tensor) -> Tensor:
    """XGrad-CAM: gradients averaged with each channel's normalised activations as weights (Fu et al., BMVC 2020).

    A channel whose activations sum to 0 gets weight 0: on a ReLU layer it is zero everywhere.
    """
    total = a.sum(-1)
    weight = (a * g).sum(-1) / torch.where(total == 0, torch.inf, total)
    return _weighted(weight, a)


def gradcampp(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM++ (Chattopadhyay et al., WACV 2018, eq. 19), without the factor exp(y).

    `alpha = g^2 / (2 g^2 + S g^3) = 1 / (2 + S g)` with `S` the channel's sum; the short form needs no epsilon, which in
    other implementations outweighs `g^2` on large grids. exp(y) only scales a map, and differently for each target
    and tile, so it would make maps incomparable. Where `2 + S g = 0` alpha is `g^2`, as with the paper's denominator
    replaced by 1.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)` True where a channel that counts has a denominator at or below 0: `S < 0`, possible only on layers
        without a ReLU, for which the method was not made.
    """
    denominator = 2 + a.sum(-1, keepdim=True) * g
    alpha = torch.where(denominator == 0, g * g, 1 / torch.where(denominator == 0, 1, denominator))
    doubtful = ((denominator <= 0) & (g > 0)).flatten(1).any(1)
    return _weighted((alpha * g.relu()).sum(-1), a), doubtful


def _weighted(weight: Tensor, a: Tensor) -> Tensor:
    """Channels `(B, K, Z)` summed with weights `(B, K)`."""
    return torch.einsum("bk,bkz->bz", weight, a)
