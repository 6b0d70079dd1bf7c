"""Guided backpropagation and Guided Grad-CAM: the input's gradient through ReLUs that pass only what is positive."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from schemas.errors import ModelError
from schemas.explanation import CellGeometry
from workers.cam.capture import SplitNet
from workers.cam.geometry import grid_cells
from workers.cam.inputs import attached, coarse, mean_onto, parts
from workers.cam.method import Doubt, Options, row
from workers.cam.noise import of_tiles
from workers.cam.view import View, full

_OTHERS = frozenset({
    "gelu", "erf", "silu", "mish", "hardswish", "hardtanh", "leaky_relu", "prelu", "_prelu_kernel", "elu", "celu", "selu",
    "softplus", "threshold", "rrelu_with_noise", "rrelu_with_noise_functional", "softshrink", "hardshrink",
    "log_sigmoid_forward",
})  # fmt: skip
"""Rectifiers and their likes for which the rule is not defined; `relu6` comes as `hardtanh`."""

_LINEAR = ("linear", "bilinear", "trilinear")


class CellOptions(Options):
    """The grid of a map that is as fine as the input."""

    cell: Annotated[int, Field(ge=1)] = 4
    """Pixels a cell, at most: where it does not divide the tile, all cells are a little smaller."""
    pool: Literal["mean", "abs"] = "mean"
    """Of a cell's pixels: the mean, or the mean of magnitudes, in which opposite signs do not cancel."""

    def facts(self) -> dict[str, Any]:
        return {"signed": self.pool == "mean"}


def guided_gradient(view: View) -> Tensor:
    """Gradient of the target `(B, C_in, *S)` by guided backpropagation (Springenberg et al., ICLR workshop 2015).

    Every ReLU passes back `gradient * [x > 0] * [gradient > 0]`. ReLUs are found as the operation they are, below
    autograd, be they modules, functions, in place or scripted; the network is not touched.

    Raises
    ------
    ModelError
        The network has other rectifiers (GELU, SiLU, ...), or no ReLU: the plain gradient would pass for a guided one.
    """
    found = []
    for rows in parts(view):
        with _Guided() as guided:
            leaf, y = attached(view, rows)
            found.append(full(of_tiles(view.net, rows).grad(y, leaf)))
        if not guided.met:
            msg = (
                "guided backpropagation acts on ReLUs, and there is none between the network's input and its scores (or it "
                "is compiled, where operations are not seen). Use method 'gradcam' or 'hirescam'"
            )
            raise ModelError(msg)
    return torch.cat(found)


class _Guided(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The backward rule of ReLU replaced, and its likes refused."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; to be marked as not for dynamo, torch would import it, which takes seconds.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.met = 0
        self._gate: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "threshold_backward":
            self.met += 1
            return func(args[0].clamp_min(0), *args[1:], **kwargs)
        if name in _OTHERS or (name in ("clamp", "clamp_min") and _floor(args, kwargs) == 0):
            _refuse(name)
        if name == "mul" and self._gate and {id(a) for a in args} == {id(t) for t in self._gate}:
            _refuse("silu")  # written out as x * sigmoid(x)
        out = func(*args, **kwargs)
        if name == "sigmoid":
            self._gate = (args[0], out)
        return out


def _floor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("min")


def _refuse(name: str) -> None:
    msg = (
        f"guided backpropagation is defined for ReLU networks; this one uses {name!r}, which is unsupported. Use method "
        "'gradcam' or 'hirescam'"
    )
    raise ModelError(msg)


def _pooled(signed: Tensor, options: CellOptions) -> Tensor:
    """`(B, C_in, *S)` summed over channels (magnitudes, with `abs`), averaged over each cell's pixels."""
    pixels = (signed.abs() if options.pool == "abs" else signed).sum(1)
    return mean_onto(pixels, coarse(pixels.shape[1:], options.cell))


def guidedbackprop(view: View, options: CellOptions) -> tuple[Tensor, Doubt]:
    """Guided backpropagation as a map `(B, *cells)`: a mean over pixels, so that its size does not hang on `cell`."""
    return _pooled(guided_gradient(view), options), None


def guidedgradcam(view: View, options: CellOptions) -> tuple[Tensor, Doubt]:
    """Guided Grad-CAM (Selvaraju et al., ICCV 2017, 3.2): guided gradient times the upsampled positive Grad-CAM map.

    The product is made pixel by pixel and then averaged over cells. Grad-CAM's map is taken as it is, as in the authors'
    code; scaled to a maximum of 1 a tile, tiles could not be compared.
    """
    tile = view.x.shape[2:]
    if len(view.grid) != len(tile):
        msg = (
            f"method 'guidedgradcam' lays the layer's map over the input; the layer's cells have {len(view.grid)} axes, the "
            f"input has {len(tile)}. Use method 'guidedbackprop'"
        )
        raise ModelError(msg)
    cam = torch.einsum("bk,bkz->bz", view.g.mean(-1), view.a).relu().reshape(-1, 1, *view.grid)
    fine = torch.nn.functional.interpolate(cam, size=tile, mode=_LINEAR[len(tile) - 1], align_corners=False)
    return _pooled(fine * guided_gradient(view), options), None


def cells_of_input(
    _net: SplitNet, input_shape: tuple[int, ...], _layer: CellGeometry, options: CellOptions
) -> CellGeometry:
    """An even grid over the tile."""
    return grid_cells(coarse(input_shape[1:], options.cell), input_shape[1:])


METHODS = (
    row(
        "guidedbackprop", "Guided backpropagation", guidedbackprop, "1",
        "Springenberg et al., Striving for Simplicity: The All Convolutional Net, ICLR workshop 2015",
        edition="summed over input channels (pool=abs: magnitudes), averaged over a cell; a companion of Grad-CAM, hardly class-specific",
        needs=("gradients", "input"), options=CellOptions(), place=cells_of_input,
    ),
    row(
        "guidedgradcam", "Guided Grad-CAM", guidedgradcam, "1",
        "Selvaraju et al., Grad-CAM, ICCV 2017",
        edition="times the unscaled positive Grad-CAM map (authors' code); summed over input channels (pool=abs: magnitudes), averaged over a cell",
        needs=("activations", "gradients", "input"), options=CellOptions(), place=cells_of_input,
    ),
)  # fmt: skip
