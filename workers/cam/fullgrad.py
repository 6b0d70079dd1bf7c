"""FullGrad: the score taken apart, without remainder, into what the input and every bias bring to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from schemas.errors import ModelError
from workers.cam.inputs import attached, parts, sum_onto
from workers.cam.method import Doubt, Options, row
from workers.cam.noise import of_tiles
from workers.cam.view import View, full

_CHANNEL_AXIS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "batch_norm"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "linear": -1,
}
"""Functions that are affine in their first argument, and where their output has its channels."""


def fullgrad(view: View, _: Options) -> tuple[Tensor, Doubt]:
    """FullGrad on the explained layer's grid (Srinivas & Fleuret, NeurIPS 2019, eq. 3), with nothing but sums.

    Input times its gradient, plus each bias times its gradient in every place where it was added, BatchNorm's implicit
    bias `beta - gamma mean / std` included. Finer and coarser layers are brought to the grid by area, conserving sums (both
    are taken to part the tile evenly); biases without a place (fully connected layers) are spread evenly. In a network of
    linear, ReLU and pooling layers the map sums to the target's score. The paper's pictures take magnitudes and
    min-max scale each layer first, which loses that.

    Returns
    -------
    map
        `(B, Z)`.
    doubtful
        `(B,)` True where the sum misses the score: a part of the network is not piecewise linear (normalised by its own
        statistics, attention, GELU), or adds a constant in a way that is not seen (scripted or compiled code).

    Raises
    ------
    ModelError
        The layer's cells have other axes than the input; the scores cannot be differentiated down to the input.
    """
    if len(view.grid) != view.x.ndim - 2:
        msg = (
            f"method 'fullgrad' lays the input over the layer's cells; those have {len(view.grid)} axes, the input has "
            f"{view.x.ndim - 2}. Explain a layer that keeps the input's axes"
        )
        raise ModelError(msg)
    maps, doubts = [], []
    for rows in parts(view):
        with _Biases(len(rows), view.grid) as biases:
            leaf, y = attached(view, rows)
        g = of_tiles(view.net, rows).grad(y, leaf)
        mine = biases.total + sum_onto((full(g) * full(leaf.detach())).sum(1), view.grid)
        y, found = y.detach(), mine.flatten(1)
        maps.append(found)
        missed = (found.sum(1) - y).abs()
        doubts.append(missed > 1e-3 * y.abs() + 1e-5 * found.abs().sum(1))
    return torch.cat(maps), torch.cat(doubts)


class _Biases(TorchFunctionMode):
    """Adds up bias times gradient of every affine function that a pass inside calls, as the gradients come back."""

    def __init__(self, batch: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.total: Tensor | float = 0.0
        self._batch = batch
        self._grid = tuple(grid)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        axis = _CHANNEL_AXIS.get(getattr(getattr(func, "overloadpacket", func), "__name__", ""))
        if axis is None or not out.requires_grad or len(out) != self._batch:
            return out
        rest = dict(kwargs)
        x, *others = args or (rest.pop("input"),)
        with torch.no_grad():
            bias = full(func(torch.zeros_like(x[:1]), *others, **rest))  # whatever it adds to nothing
        if bool(bias.any()):
            out.register_hook(lambda g: self._add((full(g) * bias).sum(axis)))
        return out

    def _add(self, part: Tensor) -> None:
        """`(n, *s)` onto the grid; what has other axes than the grid has no place there, and is spread evenly."""
        if part.ndim - 1 != len(self._grid):
            part = part.flatten(1).sum(1) if part.ndim > 1 else part
            part = part.view(-1, *(1,) * len(self._grid))
        self.total = self.total + sum_onto(part, self._grid)


METHODS = (
    row(
        "fullgrad", "FullGrad", fullgrad, "logit",
        "Srinivas & Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019",
        edition="signed sum that adds up to the score, on the layer's grid by area; not the paper's magnitudes and min-max scaling",
        needs=("gradients", "input"),
    ),
)  # fmt: skip
