"""NormGrad (Rebuffi et al., CVPR 2020): how much each position would change the weights of a layer put in there.

An identity layer after the activations `A`, with `g = dy/dA`, has a weight gradient that is a sum over positions of a
term `o_u`; the map is an aggregate of that term over all but the position. Each choice of layer (`at`) is a grouped
convolution, `o_u` = union over groups of (window of the group's input at u) outer (the group's `g_u`), and none of the aggregates (`by`)
needs the outer product: with p+ and p- the positive and negative part,

    norm      |a outer g|_F        = |a| |g|
    selective |(a outer g)+|_F     = sqrt(|a+|^2 |g+|^2 + |a-|^2 |g-|^2)
    sum       sum of a outer g     = sum(a) sum(g)
    max       max |a outer g|      = max|a| max|g|

so that only sums and maxima over windows of channel-reduced maps are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from workers.cam.capture import CONVOLUTIONS
from workers.cam.method import Doubt, Options, row
from workers.cam.noise import eager
from workers.cam.view import View, full

At = Literal["bias", "scaling", "conv1x1", "conv3x3", "depthwise3x3", "real"]
By = Literal["norm", "selective", "sum", "max"]


class NormGradOptions(Options):
    """`at`: the virtual layer (`real`: the explained layer itself, a convolution); `by`: how its term is aggregated."""

    at: At = "conv1x1"
    by: By = "norm"

    def facts(self) -> dict[str, Any]:
        return {
            "signed": self.by == "sum",
            "unit": "logit" if (self.at, self.by) == ("scaling", "sum") else "1",
        }


@dataclass(frozen=True)
class Window:
    """What one output position of a convolution sees, an entry an axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """As `torch.nn.functional.pad` takes it: last axis first, before and after."""
    mode: str = "constant"

    def reduce(self, x: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`(B, G, *S)` -> `(B, G, *out)`: `how(windows, axis)` applied to every axis of the window in turn."""
        x = F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            if (k, s) != (1, 1):
                x = how(x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d], -1)
        return x


def cube(size: int, ndim: int) -> Window:
    """Windows of `size` cells an axis, stride 1, zeros round the border."""
    one = (1,) * ndim
    return Window((size,) * ndim, one, one, (size // 2,) * (2 * ndim))


def window_of(conv: nn.Module) -> Window:
    """The windows of a convolution layer."""
    assert isinstance(conv, CONVOLUTIONS)
    if isinstance(conv.padding, str):  # 'same' and 'valid'; an odd one goes to the far side
        totals = [
            d * (k - 1) * (conv.padding == "same")
            for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
        ]
        sides = [(t // 2, t - t // 2) for t in totals]
    else:
        sides = [(p, p) for p in conv.padding]
    mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
    padding = tuple(p for side in reversed(sides) for p in side)
    return Window(conv.kernel_size, conv.stride, conv.dilation, padding, mode)


def normgrad(x: Tensor, g: Tensor, window: Window, groups: int = 1, by: By = "norm") -> Tensor:
    """Aggregate at every position of the weight gradient of a grouped convolution.

    Parameters
    ----------
    x
        `(B, K_in, *S)`, the convolution's input.
    g
        `(B, K_out, *out)`, gradient of the target with respect to its output.
    window
        What an output position sees.
    groups
        Channel groups; `K_in` groups of one channel are a depthwise convolution, or without neighbours a scaling.
    by
        `norm`, `selective` (norm of the positive entries), `sum` (signed), `max` (largest magnitude).

    Returns
    -------
    Tensor
        `(B, *out)`.
    """
    xs = x.reshape(len(x), groups, -1, *x.shape[2:])
    gs = g.reshape(len(g), groups, -1, *g.shape[2:])

    def windows(entries: Tensor) -> Tensor:
        return window.reduce(entries.sum(2), Tensor.sum)

    if by == "sum":
        return (windows(xs) * gs.sum(2)).sum(1)
    if by == "max":
        largest = window.reduce(xs.abs().amax(2), Tensor.amax)
        return (largest * gs.abs().amax(2)).amax(1)
    # Squares of a gradient spread over a large volume would leave float32: they are taken of its ratio to the largest.
    size = gs.abs().flatten(1).amax(1).view(-1, *[1] * (gs.ndim - 1))
    gs = gs / torch.where(size > 0, size, 1)
    if by == "norm":
        squares = windows(xs.square()) * gs.square().sum(2)
    else:
        squares = windows(xs.relu().square()) * gs.relu().square().sum(2)
        squares = squares + windows((-xs).relu().square()) * (-gs).relu().square().sum(2)
    return squares.sum(1).sqrt() * size[:, 0, 0]


@dataclass(frozen=True)
class Site:
    """A layer in a pass: what it put out, what it was given, and the target's gradient with respect to its output."""

    layer: str
    module: nn.Module | None
    """None for a cut network."""
    activations: Tensor
    """`(B, K, *grid)`."""
    g: Tensor
    """The same shape."""
    inputs: Tensor | None
    """`(B, K_in, *S_in)` of a convolution, where they are asked for."""


def site(view: View, at: At) -> Site:
    """The explained layer."""
    net = eager(view.net)
    g = view.g.reshape(view.activations.shape)
    # kept for nobody else: at an early layer of a volume it is more than all the rest
    inputs = view.once("given", lambda: net.given(view.x)) if net and at == "real" else None
    return Site(net.layer if net else "", net.target if net else None, full(view.activations), g, inputs)


def extract(at: Site, options: NormGradOptions) -> tuple[Tensor, Doubt]:
    """The map `(B, *grid)` of a layer, and where it is doubtful.

    A bias has no activations in its term: behind global average pooling, where the gradient is equal in all cells, its
    map is a constant and says nothing of where. It is then doubtful.
    """
    a, g = at.activations, at.g
    channels, ndim = a.shape[1], a.ndim - 2
    if options.at == "real":
        if at.inputs is None or not isinstance(at.module, CONVOLUTIONS):
            kind = (
                "the cut of a network in two parts" if at.module is None else f"a {type(at.module).__name__}"
            )
            msg = (
                f"NormGrad of a layer's own weights needs a convolution, but layer {at.layer!r} is {kind}: explain a "
                "convolution, name one (normgrad_layers+at=real+layers=<convolution>), or take a virtual layer (normgrad)"
            )
            raise ModelError(msg)
        conv = at.module
        return normgrad(full(at.inputs), g, window_of(conv), conv.groups, options.by), None
    if options.at == "bias":
        same = (g.flatten(2).amax(2) == g.flatten(2).amin(2)).all(1)
        return normgrad(torch.ones_like(a), g, cube(1, ndim), channels, options.by), same
    groups = channels if options.at in ("scaling", "depthwise3x3") else 1
    window = cube(3 if options.at.endswith("3x3") else 1, ndim)
    return normgrad(a, g, window, groups, options.by), None


def of_view(view: View, options: NormGradOptions) -> tuple[Tensor, Doubt]:
    """NormGrad at the explained layer, `(B, Z)`."""
    raw, doubtful = extract(site(view, options.at), options)
    return raw.flatten(1), doubtful


def fixed(at: At, by: By) -> Callable[[View, Options], tuple[Tensor, Doubt]]:
    """NormGrad at the explained layer with its two choices made."""
    options = NormGradOptions(at=at, by=by)
    return lambda view, _: of_view(view, options)


REBUFFI = "Rebuffi et al., There and Back Again: Revisiting Backpropagation Saliency Methods, CVPR 2020"

METHODS = (
    row(
        "normgrad", "NormGrad", of_view, "1", REBUFFI, signed=False,
        edition="virtual identity layer; default 1x1 convolution, Frobenius norm; close to class-agnostic",
        options=NormGradOptions(),
    ),
    row(
        "normgrad_selective", "NormGrad selective", fixed("scaling", "selective"), "1", REBUFFI, signed=False,
        edition="scaling layer, norm of the positive entries",
    ),
    row(
        "gradient", "Gradient at the layer", fixed("bias", "max"), "1",
        "Simonyan et al., Deep Inside Convolutional Networks, ICLR workshop 2014; " + REBUFFI, signed=False,
        edition="largest magnitude over channels (NormGrad's bias and max)",
    ),
    row(
        "linear_approximation", "Linear approximation", fixed("scaling", "sum"), "logit",
        REBUFFI, edition="activation times gradient summed over channels, signed (NormGrad's scaling and sum)",
        weigh=lambda _, g: (g, None),
    ),
    row(
        "normgrad_proper", "NormGrad proper", fixed("real", "norm"), "1", REBUFFI, signed=False,
        edition="the explained convolution's own weights, norm; the layer must be a convolution",
    ),
)  # fmt: skip
