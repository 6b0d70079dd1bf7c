"""Layer-wise relevance propagation as a method: the target's score dealt out backwards, layer by layer.

LRP is patented; see `workers.cam.relevance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from schemas.explanation import CellGeometry
from workers.cam.capture import SplitNet
from workers.cam.geometry import grid_cells
from workers.cam.inputs import coarse, parts, sum_onto
from workers.cam.method import Doubt, Options, row
from workers.cam.relevance import Propagating
from workers.cam.rules import Rule, Rules
from workers.cam.view import View, full

_COMPOSITES: dict[str, tuple[Rule, Rule, Rule | None]] = {
    "epsilon_plus": ("zplus", "epsilon", None),
    "gamma_box": ("gamma", "epsilon", "zbox"),
}
"""Rules of convolutions, of fully connected layers, and of the layer that sees the pixels."""

Tile = Literal["tile"]


class LrpOptions(Options):
    """Rules, and where relevance is stopped."""

    rule: Literal["epsilon_plus", "gamma_box", "zero", "epsilon", "gamma", "zplus", "alphabeta", "flat"] = (
        "epsilon_plus"
    )
    """`epsilon_plus`: z+ on convolutions, epsilon on fully connected layers. `gamma_box`: gamma on convolutions, epsilon on
    fully connected layers, z-box on the layer that sees the pixels. Any other: that rule on both."""
    to: Literal["layer", "input"] = "layer"
    """The explained layer's cells, or the input, down through the whole network."""
    cell: Annotated[int, Field(ge=1)] = 4
    """Pixels a cell of a map of the input, at most: where it does not divide the tile, all cells are a little smaller."""
    first: Literal["default", "zbox", "flat"] = "default"
    """Another rule for the layer that sees the pixels."""
    epsilon: Annotated[float, Field(ge=0)] = 1e-6
    gamma: Annotated[float, Field(ge=0)] = 0.25
    alpha: Annotated[float, Field(ge=1)] = 2.0
    """`beta` is `alpha - 1`."""
    low: float | Tile = "tile"
    """Least value the network's input can have, for z-box; or each tile's own."""
    high: float | Tile = "tile"
    bias: Literal["share", "drop"] = "share"
    """Biases keep their share of the relevance, or get none."""

    @model_validator(mode="after")
    def _about_pixels(self) -> LrpOptions:
        if self.first != "default" and self.to != "input":
            msg = f"first={self.first} is for the layer that sees the pixels, which relevance reaches with to=input"
            raise ValueError(msg)
        if (self.low, self.high) != ("tile", "tile") and self.rules().first != "zbox":
            msg = "low and high are the pixels' bounds of z-box: with rule=gamma_box+to=input, or first=zbox+to=input"
            raise ValueError(msg)
        if self.low != "tile" and self.high != "tile" and self.low >= self.high:
            msg = f"low = {self.low} is not below high = {self.high}"
            raise ValueError(msg)
        return self

    def rules(self) -> Rules:
        """What `Propagating` is to do."""
        if self.rule == "epsilon_plus" or self.rule == "gamma_box":
            conv, linear, first = _COMPOSITES[self.rule]
        else:
            conv, linear, first = self.rule, self.rule, None
        if self.first != "default":
            first = self.first
        return Rules(
            conv, linear, first if self.to == "input" else None,
            epsilon=self.epsilon, gamma=self.gamma, alpha=self.alpha, bias=self.bias == "share",
            low=None if self.low == "tile" else self.low, high=None if self.high == "tile" else self.high,
        )  # fmt: skip


def lrp(view: View, options: LrpOptions) -> tuple[Tensor, Doubt]:
    """LRP (Bach et al., PLoS ONE 2015; Montavon et al. 2019): the score is dealt out to cells, or to pixels.

    What leaves the network is `score x target` of each class; rules are those of `workers.cam.rules`. A layer's cells
    hold the sum over channels, cells of the input the sum over channels and pixels. Maps sum to the score but for what biases
    keep (`bias=share`), what by-passes the layer, and what rules leave out by definition (`zplus` where a layer has no positive
    product, `alphabeta` where it has products of one sign only). With `rule=zero` of a ReLU network the map is gradient times
    activation: HiResCAM.

    Returns
    -------
    map
        `(B, *cells)`, in logits.
    doubtful
        `(B,)` True where the target is no weighted sum of what the network puts out (a cosine), so that there is no one
        relevance to begin with.

    Raises
    ------
    ModelError
        An operation has no rule (attention, layer norm, a gate), or z-box finds no layer that sees the pixels.
    SpecError
        The input is beyond `low` or `high`.
    """
    if options.to == "layer":
        # Targets share the pass; only where relevance sets out differs.
        leaf, scores = view.once(("lrp", options), lambda: _layer_pass(view, options))
        found, doubt = _relevance(view, leaf, scores, torch.arange(len(leaf), device=leaf.device))
        return found.sum(1), doubt
    grid = coarse(view.x.shape[2:], options.cell)
    maps, doubts = [], []
    for rows in parts(view):
        leaf = view.x[rows].clone().requires_grad_()
        found, doubt = _relevance(view, leaf, _passed(options, leaf, view.net.end_to_end), rows)
        maps.append(sum_onto(found.sum(1), grid))
        doubts.append(doubt)
    return torch.cat(maps), torch.cat(doubts)


def _layer_pass(view: View, options: LrpOptions) -> tuple[Tensor, Tensor]:
    leaf = view.activations.clone().requires_grad_()
    return leaf, _passed(options, leaf, lambda a: view.net.tail(a, view.x))


def _passed(options: LrpOptions, leaf: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores as the network gives them, whose gradient with respect to the leaf is relevance."""
    with torch.enable_grad(), Propagating(options.rules()) as propagating:
        scores = run(leaf)
    propagating.check(scores)
    return scores


def _relevance(view: View, leaf: Tensor, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of the leaf, and doubt `(n,)`."""
    with torch.enable_grad():
        output = scores.detach().requires_grad_()
        y = view.y(output, rows)
        # what leaves the network: through a linear readout, value times gradient
        (slope,) = torch.autograd.grad(y.sum(), output, allow_unused=True, materialize_grads=True)
        start = (output * slope).detach()
        found = view.net.grad((scores * start).flatten(1).sum(1), leaf, retain=True)
    y, start = y.detach(), full(start).flatten(1)
    missed = (start.sum(1) - y).abs() > 1e-3 * y.abs() + 1e-5 * start.abs().sum(1)
    return full(found), missed


def _cells(
    _net: SplitNet, input_shape: tuple[int, ...], layer: CellGeometry, options: LrpOptions
) -> CellGeometry:
    """The layer's cells, or an even grid over the tile."""
    if options.to == "layer":
        return layer
    return grid_cells(coarse(input_shape[1:], options.cell), input_shape[1:])


METHODS = (
    row(
        "lrp", "Layer-wise relevance propagation", lrp, "logit",
        "Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by LRP, PLoS ONE 10(7), 2015; "
        "Montavon et al., Layer-Wise Relevance Propagation: An Overview, Springer LNCS 11700, 2019",
        edition="z+ on convolutions, epsilon on fully connected layers (or as rule= says); batch norms folded; starts from the logit, "
        "summed over channels; patented (WO 2016/150472), see the guide",
        needs=("activations", "gradients", "input"), options=LrpOptions(), place=_cells,
    ),
)  # fmt: skip
