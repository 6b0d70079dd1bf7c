"""Finer-CAM: what tells a class from those most like it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.head import linear_head
from workers.cam.method import Doubt, Options, row
from workers.cam.view import View


class FinerOptions(Options):
    """Settings of Finer-CAM; the defaults are the authors'."""

    n: Annotated[int, Field(ge=1)] = 3
    """Classes compared with; all others where the network has fewer."""
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.6
    """How much of their scores is taken away: 0 is Grad-CAM, 1 the plain difference."""
    mean: Literal["even", "softmax"] = "even"
    """How the classes are averaged: the paper's even mean, or by their softmax, as the authors' later code does."""
    similar: Literal["scores", "weights"] = "scores"
    """Most similar by score (the authors' code), or by the cosine of the rows of a linear head."""

    def facts(self) -> dict[str, Any]:
        by = {"scores": "score, as in the authors' code", "weights": "the cosine of the head's weights"}
        over = {"even": "even mean", "softmax": "mean weighted by their softmax"}
        return {
            "edition": f"on Grad-CAM; most alike by {by[self.similar]}; their {over[self.mean]}; before the final ReLU"
        }


def finer_target(
    scores: Tensor, target: Tensor, likeness: Tensor, n: int, gamma: float, mean: str = "even"
) -> Tensor:
    """The comparison as a linear function of the scores.

    Parameters
    ----------
    scores
        `(B, C)`.
    target
        `(B, C)`, one class a row: one entry that is not 0.
    likeness
        `(B, C)`, larger for classes more like the target's.
    n, gamma
        So many classes, and how strongly.
    mean
        `even`: `y_c - gamma mean_d y_d`. `softmax`: `sum_d q_d (y_c - gamma y_d)` with `q` the softmax over the n classes,
        differentiated as well, as it is in the authors' code.

    Returns
    -------
    Tensor
        `(B, C)` weights of the scores, of which the gradient is to be taken.
    """
    own = target != 0
    order = torch.where(own, -torch.inf, likeness).argsort(dim=1, descending=True, stable=True)
    other = order[:, : min(n, scores.shape[1] - 1)]
    y = scores.gather(1, other)
    if mean == "even":
        weight = torch.full_like(y, -gamma / y.shape[1])
    else:
        q = y.softmax(1)
        weight = -gamma * q * (1 + y - (q * y).sum(1, keepdim=True))
    sign = target.sum(1, keepdim=True)
    return sign * torch.where(own, 1.0, torch.zeros_like(scores).scatter(1, other, weight))


def _raw(view: View, options: FinerOptions) -> tuple[Tensor, Doubt]:
    """Grad-CAM of the target's score minus `gamma` times those of the `n` classes most like it."""
    if view.scores.shape[1] < 2 or not bool(((view.target != 0).sum(1) == 1).all()):
        msg = (
            "method 'finercam' compares one class with others; the network has a single score, or the target is no "
            "single class. Use method 'gradcam'"
        )
        raise ModelError(msg)
    if options.similar == "scores":
        likeness = -(view.scores - (view.scores * view.target.abs()).sum(1, keepdim=True)).abs()
    else:
        head = linear_head(view.net, view.x)
        if head is None:
            msg = (
                "method 'finercam' with similar=weights needs a layer followed by global average pooling and one linear "
                "layer; the layer explained is not. Use similar=scores"
            )
            raise ModelError(msg)
        rows = torch.nn.functional.normalize(head.weight, dim=1)
        likeness = view.target.abs().to(rows.dtype) @ (rows @ rows.T)
    target = finer_target(view.scores, view.target, likeness, options.n, options.gamma, options.mean)
    g = view.gradient(target)
    return torch.einsum("bk,bkz->bz", g.mean(-1), view.a), None


METHODS = (
    row(
        "finercam", "Finer-CAM", _raw, "logit/cell",
        "Zhang et al., Finer-CAM, CVPR 2025",
        edition=FinerOptions().facts()["edition"],
        needs=("activations", "gradients", "tail"), options=FinerOptions(),
    ),
)  # fmt: skip
