"""CAM methods that are pure functions of activations and gradients.

All functions take `A` and `g = dy/dA` as `(B, K, Z)`, space flattened to its Z cells, and give the raw signed map `(B, Z)`, before
the ReLU that the papers draw. Nothing here knows how many axes the space had.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.method import Doubt, Options, pure, row
from workers.cam.view import View

CANCELLED = 1e-4
"""Share of its terms below which a sum is taken for rounding, or for the small constant inside a norm."""


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


def cancels(a: Tensor, g: Tensor) -> Tensor:
    """`(B,)` True where gradient times activation, summed over channels, is but rounding in every cell.

    So it is wherever a layer is read through a layer norm alone, as the output of a transformer's block is: the norm does not
    care how long a token is, hence the gradient is at right angles to it.
    """
    terms = g * a
    size = terms.abs().sum(1).amax(1)
    return (size > 0) & (terms.sum(1).abs().amax(1) <= CANCELLED * size)


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
    alpha, doubtful = _gradcampp_alpha(a.sum(-1, keepdim=True), g)
    return _weighted((alpha * g.relu()).sum(-1), a), doubtful.flatten(1).any(1)


def counterfactual(a: Tensor, g: Tensor) -> Tensor:
    """Counterfactual Grad-CAM: where removing what is there would raise the score (Selvaraju et al., ICCV 2017, 3.3)."""
    return -gradcam(a, g)


def gradcam_elementwise(a: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM element-wise: the positive part of gradient times activation, summed over channels; never negative."""
    return (g * a).relu().sum(1)


def gradcampp_official(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM++ as its authors' code computes it, without the factor exp(y) of their weights.

    Alpha is that of `gradcampp` divided by its own sum over the cells with a positive gradient (by 1 where that sum is
    0). The authors' weights are `exp(y)` times these, with `y` the target's score: beyond 88 that overflows float32, so
    the factor is carried as its logarithm, which is the score that is stored with every map.

    Returns
    -------
    map
        `(B, Z)`; the authors' is `exp(y)` times it.
    doubtful
        `(B,)`, as in `gradcampp`.
    """
    weight, doubtful = gradcampp_official_weights(a, g)
    return _weighted(weight, a), doubtful


def gradcampp_official_weights(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Channel weights `(B, K)` over `exp(y)`, and doubt `(B,)`."""
    alpha, doubtful = _gradcampp_alpha(a.sum(-1, keepdim=True), g)
    total = torch.where(g > 0, alpha, 0).sum(-1, keepdim=True)
    alpha = alpha / torch.where(total == 0, 1, total)
    return (alpha * g.relu()).sum(-1), doubtful.flatten(1).any(1)


def _gradcampp_alpha(total: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha for channel sums `total`, and where a cell that counts has a denominator at or below 0."""
    denominator = 2 + total * g
    alpha = torch.where(denominator == 0, g * g, 1 / torch.where(denominator == 0, 1, denominator))
    return alpha, (denominator <= 0) & (g > 0)


def _no_linear_head(_view: View, _options: Options) -> NoReturn:
    """CAM is asked of a tail that is no linear head, so that its weights are not there to be used."""
    msg = (
        "method 'cam' needs a layer followed directly by global average pooling and one linear layer; the layer explained "
        "is not. Explain the last activation before pooling, or use method 'gradcam' or 'hirescam', which need neither"
    )
    raise ModelError(msg)


def _weighted(weight: Tensor, a: Tensor) -> Tensor:
    """Channels `(B, K, Z)` summed with weights `(B, K)`."""
    return torch.einsum("bk,bkz->bz", weight, a)


# The same methods where the gradient (B or 1, T, K) is equal in all cells: channel weights (B or 1, T, K).


def _gradient_itself(_: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    return g, None


def _positive_gradient(_: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    return g.relu(), None


def _gradient_of_live_channels(a: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    return torch.where(a.sum(-1)[:, None] == 0, 0, g), None


def _gradcampp_weights(a: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    alpha, doubtful = _gradcampp_alpha(a.sum(-1)[:, None], g)
    return a.shape[-1] * alpha * g.relu(), doubtful.any(-1)


def _gradcampp_official_weights(a: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    # alpha is the same in all cells, so that normalised it is 1 / Z: the weight is the positive gradient
    _, doubtful = _gradcampp_alpha(a.sum(-1)[:, None], g)
    return g.relu().expand(*doubtful.shape), doubtful.any(-1)


def _negative_gradient(_: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    return -g, None


METHODS = (
    row(
        "gradcam", "Grad-CAM", pure(gradcam), "logit/cell",
        "Selvaraju et al., Grad-CAM, ICCV 2017", edition="mean gradient (paper), before the final ReLU",
        weigh=_gradient_itself,
    ),
    row(
        "hirescam", "HiResCAM", pure(lambda a, g: (hirescam(a, g), cancels(a, g))), "logit",
        "Draelos & Carin, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891", edition="before the final ReLU",
        weigh=_gradient_itself,
    ),
    row(
        "cam", "CAM", _no_linear_head, "logit",
        "Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016",
        edition="divided by the number of cells, so that a map sums to its score minus the bias",
        needs=("activations", "weights"), weigh=_gradient_itself,
    ),
    row(
        "layercam", "Layer-CAM", pure(layercam), "1",
        "Jiang et al., LayerCAM, IEEE TIP 2021", signed=False, edition="one layer, before the final ReLU",
        weigh=_positive_gradient,
    ),
    row(
        "gradcampp", "Grad-CAM++", pure(gradcampp), "1",
        "Chattopadhyay et al., Grad-CAM++, WACV 2018", signed=False,
        edition="without exp(y), no epsilon, before the final ReLU", weigh=_gradcampp_weights,
    ),
    row(
        "xgradcam", "XGrad-CAM", pure(xgradcam), "1",
        "Fu et al., Axiom-based Grad-CAM, BMVC 2020", edition="before the final ReLU",
        weigh=_gradient_of_live_channels,
    ),
    row(
        "gradcampp_official", "Grad-CAM++ official", pure(gradcampp_official), "1",
        "Chattopadhyay et al., Grad-CAM++, WACV 2018", signed=False,
        edition="authors' code: alpha normalised over cells of positive gradient; map over exp(score), before the final ReLU",
        weigh=_gradcampp_official_weights,
    ),
    row(
        "gradcam_elementwise", "Grad-CAM element-wise", pure(gradcam_elementwise), "logit",
        "Gildenblat et al., pytorch-grad-cam (GradCAMElementWise), 2021", signed=False,
        edition="positive part of gradient times activation, a channel at a time",
    ),
    row(
        "counterfactual", "Counterfactual Grad-CAM", pure(counterfactual), "logit/cell",
        "Selvaraju et al., Grad-CAM, ICCV 2017", edition="mean negated gradient (paper), before the final ReLU",
        weigh=_negative_gradient,
    ),
)  # fmt: skip
