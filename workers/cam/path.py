"""Methods that go back through the tail more than once: along a path, or to second order."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from schemas.errors import ModelError
from schemas.explanation import Need
from workers.cam.fan import tail_of_many
from workers.cam.method import Doubt, Options, row
from workers.cam.view import View, full

INCOMPLETE = 0.02
"""Share of a map's mass by which it may miss the score it has to sum to."""

ROWS_AT_ONCE = 64
"""Rows of activations that go through the tail together: several points of a path."""

TAIL: tuple[Need, ...] = ("activations", "gradients", "tail")


class PathOptions(Options):
    """Settings of integrated-gradients CAM."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Gauss-Legendre nodes."""


def igcam(view: View, options: PathOptions) -> tuple[Tensor, Doubt]:
    """Integrated gradients of the layer, from no activation to the activations there are, summed over channels.

    Sundararajan et al. (ICML 2017, eq. 1) with the layer's activations in place of the input: `A` times the mean gradient
    of the tail along the straight line from 0 to `A`. By their completeness axiom the cells sum to `y(A) - y(0)`.
    Integrated Grad-CAM (Sattarzadeh et al., ICASSP 2021) takes its path through the input instead and has no such
    sum.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)` True where the sum misses `y(A) - y(0)` by more than 2 % of the map's mass: more steps are needed.
    """
    nodes, weights = np.polynomial.legendre.leggauss(options.steps)
    points = torch.from_numpy((nodes + 1) / 2).to(view.activations)
    shares = torch.from_numpy(weights / 2).to(view.a)
    tiles, at_once = len(view.x), max(1, ROWS_AT_ONCE // len(view.x))
    mean = torch.zeros_like(view.a)
    for first in range(0, options.steps, at_once):
        some = points[first : first + at_once]
        rows = torch.arange(tiles, device=view.x.device).repeat(len(some))
        along = some.repeat_interleave(tiles).view(-1, *(1,) * (view.activations.ndim - 1))
        leaf = (view.activations[rows] * along).requires_grad_()
        with torch.enable_grad():
            y = view.y(tail_of_many(view.net, leaf, view.x, rows), rows)
        g = full(view.net.grad(y, leaf)).reshape(len(some), *view.a.shape)
        mean += torch.einsum("n,nbkz->bkz", shares[first : first + at_once], g)
    terms = view.a * mean
    start = view.y(view.net.tail(torch.zeros_like(view.activations), view.x))
    gap = terms.sum((1, 2)) - ((view.scores * view.target).sum(1) - start)
    return terms.sum(1), gap.abs() > INCOMPLETE * terms.abs().sum((1, 2))


def shapleycam(view: View, _: Options) -> tuple[Tensor, Doubt]:
    """ShapleyCAM: channels weighted by the mean of `g - 1/2 H A`, with `H` the score's Hessian (Cai, 2025).

    The second-order expansion of the score in the activations, from which a cell's Shapley value is estimated. `H A` is
    one Hessian-vector product: the gradient of the gradient. Where the tail is piecewise linear `H` is 0 and the map is
    Grad-CAM's.

    Raises
    ------
    ModelError
        An operation of the tail has no second derivative.
    """
    first = view.g.mean(-1)
    leaf = view.activations.clone().requires_grad_()
    # the fused attention kernels cannot be differentiated twice
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        y = view.y(view.net.tail(leaf, view.x)).sum()
        (g,) = torch.autograd.grad(y, leaf, create_graph=True)
        curved = None
        if g.requires_grad:
            try:
                (curved,) = torch.autograd.grad(g, leaf, view.activations, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                msg = f"method 'shapleycam' needs second derivatives, which the network's tail does not have: {error}"
                raise ModelError(msg) from error
    weight = first if curved is None else first - full(curved).flatten(2).mean(-1) / 2
    return torch.einsum("bk,bkz->bz", weight, view.a), None


def _gradient_itself(_: Tensor, g: Tensor) -> tuple[Tensor, Doubt]:
    return g, None


METHODS = (
    row(
        "igcam", "Integrated-gradients CAM", igcam, "logit",
        "Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017",
        edition="path through the layer's activations from 0; sums to y(A) - y(0); before any ReLU",
        needs=TAIL, weigh=_gradient_itself, options=PathOptions(),
    ),
    row(
        "shapleycam", "ShapleyCAM", shapleycam, "logit/cell",
        "Cai, CAMs as Shapley Value-based Explainers, arXiv:2501.06261, 2025",
        edition="logit, mean of g - HA/2 (the authors' code in pytorch-grad-cam), before the final ReLU",
        needs=TAIL, weigh=_gradient_itself,
    ),
)  # fmt: skip
