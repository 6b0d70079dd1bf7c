"""Score-CAM and its kin: channels weighted by the score that the input has behind a mask made of the channel.

By definition a forward pass a channel. What is saved changes no result: channels that are equal in all cells make an
empty mask, all of them the same, so one pass a tile stands for them; the passes serve all targets at once; masks are
made a chunk at a time, and nothing is waited for in between. The score of an empty input, which the papers subtract,
cancels in the softmax and is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from workers.cam.method import Options, row
from workers.cam.view import View, full

Mask = Literal["paper", "pgc", "torchcam"]

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

SOFTMAX = "softmax over channels of the scores before any softmax over classes"

EPSILON = 1e-8
"""What both libraries add to the range of a channel."""


class ScoreOptions(Options):
    """Options of Score-CAM."""

    mask: Mask = "paper"
    """How a channel becomes a mask, see `masks`."""
    chunk: int = Field(64, ge=1)
    """Masked inputs in one pass; changes rounding only."""

    def facts(self) -> dict[str, Any]:
        how = "enlarged, then stretched to 0...1" if self.mask == "paper" else f"as {self.mask} has them"
        return {"edition": "; ".join([f"masks {how}", *self.changes(), SOFTMAX])}

    def changes(self) -> tuple[str, ...]:
        """What else is done with a mask, in words."""
        return ()


class SmoothScoreOptions(ScoreOptions):
    """Options of SS-CAM."""

    samples: int = Field(10, ge=1)
    sigma: float = Field(2.0, ge=0, allow_inf_nan=False)
    """Standard deviation of the noise: of a mask, which spans 0 to 1, or of the input, in its units."""
    on: Literal["mask", "input"] = "mask"
    """Where the noise is added: to the mask, or to the masked input."""

    def changes(self) -> tuple[str, ...]:
        return (f"noise on the {self.on}, the same for all channels of a tile, seeded",)


class IntegratedScoreOptions(ScoreOptions):
    """Options of IS-CAM."""

    samples: int = Field(10, ge=1)
    """Steps of the integral."""

    def changes(self) -> tuple[str, ...]:
        return ("mean score along i / n of the mask, i = 1...n",)


def constant_channels(a: Tensor) -> Tensor:
    """`(B, K)` bool: which channels of `(B, K, Z)` are equal in all cells, and so cost no pass of their own."""
    return a.amax(-1) == a.amin(-1)


def masks(low: Tensor, size: tuple[int, ...], preset: Mask) -> Tensor:
    """Channels as masks of the input.

    Parameters
    ----------
    low
        `(n, 1, *grid)`, one channel a row.
    size
        `(*S)`.
    preset
        `paper`: enlarged (linear interpolation, corners not aligned), then stretched to span 0 to 1. `pgc`: enlarged with
        aligned corners, then stretched. `torchcam`: stretched, then enlarged with corners not aligned. The libraries
        add 1e-8 to the range.

    Returns
    -------
    Tensor
        `(n, 1, *S)`; 0 for a channel that is equal in all cells, where the libraries may stretch rounding errors.
    """
    axes = tuple(range(1, low.ndim))
    flat = low.amax(axes, keepdim=True) == low.amin(axes, keepdim=True)
    if preset == "torchcam":
        found = _enlarge(_stretch(low, EPSILON), size, False)
    elif preset == "pgc":
        found = _stretch(_enlarge(low, size, True), EPSILON)
    else:
        found = _stretch(_enlarge(low, size, False), 0.0)
    return found.masked_fill_(flat, 0.0)


def _enlarge(low: Tensor, size: tuple[int, ...], corners: bool) -> Tensor:
    return functional.interpolate(low, size, mode=LINEAR[len(size)], align_corners=corners)


def _stretch(m: Tensor, epsilon: float) -> Tensor:
    axes = tuple(range(1, m.ndim))
    low, high = m.amin(axes, keepdim=True), m.amax(axes, keepdim=True)
    span = high - low + epsilon
    return (m - low).div_(torch.where(span == 0, 1, span))


Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x of some rows `(n, C_in, *S)`, their masks `(n, 1, *S)`, which tile each row is `(n,)`) -> inputs like x. Both are copies
that may be changed in place; equal masks of a tile must give equal inputs."""


def masked_scores(view: View, options: ScoreOptions, samples: int, change: Callable[[int], Change]) -> Tensor:
    """Scores `(B, K, C)` behind every channel's mask, averaged over samples.

    Parameters
    ----------
    view
        Any target of the batch: the scores of all classes are kept.
    options
        Mask and chunk.
    samples
        How many inputs a mask makes.
    change
        Sample -> what is done to the input.
    """
    constant = constant_channels(view.a)
    # of a tile's constant channels the first stands for all
    pairs = (~constant | (constant & (constant.cumsum(1) == 1))).nonzero()
    tiles, channels = pairs[:, 0], pairs[:, 1]
    size = tuple(view.x.shape[2:])
    found = view.scores.new_zeros(*constant.shape, view.scores.shape[1])
    for sample in range(samples):
        make = change(sample)
        for first in range(0, len(pairs), options.chunk):
            tile, channel = tiles[first : first + options.chunk], channels[first : first + options.chunk]
            low = view.a[tile, channel].reshape(-1, 1, *view.grid)
            x = make(view.x[tile], masks(low, size, options.mask).to(view.x.dtype), tile)
            output = view.net.forward(x, differentiable=False).scores
            found[tile, channel] += view.reading(full(output), tile)
    shared = found[torch.arange(len(found), device=found.device), constant.to(torch.uint8).argmax(1)]
    return torch.where(constant[..., None], shared[:, None], found) / samples


def _weighted(view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Map `(B, Z)` of channels weighted by the softmax, over channels, of the target's scores `(B, K, C)`.

    In doubt `(B,)` where no mask moves the score: the weights are then equal, and the map is the mean activation.
    """
    y = torch.einsum("bkc,bc->bk", scores, view.target)
    unmoved = y.amax(1) - y.amin(1) <= 1e-6 * y.abs().amax(1)
    return torch.einsum("bk,bkz->bz", y.softmax(1), view.a), unmoved


def scorecam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    """Score-CAM (Wang et al., CVPR Workshops 2020): weights are the softmax over channels of `y(x * mask_k)`."""

    def change(_: int) -> Change:
        return lambda x, mask, _tile: x.mul_(mask)

    return _weighted(view, view.once(("scorecam", options), lambda: masked_scores(view, options, 1, change)))


def sscam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    """SS-CAM (Wang et al., arXiv:2006.14255): Score-CAM with scores averaged over Gaussian noise.

    The noise is a function of a tile's seed and of the sample, the same for all channels, so that channels are compared
    under equal conditions. On the mask it is one pattern `(*S)` for all channels of the input.
    """

    def change(sample: int) -> Change:
        noise = options.sigma * view.noise(sample)
        if options.on == "input":
            return lambda x, mask, tile: x.mul_(mask).add_(noise[tile])
        return lambda x, mask, tile: x.mul_(mask + noise[tile, :1])

    return _weighted(
        view, view.once(("sscam", options), lambda: masked_scores(view, options, options.samples, change))
    )


def iscam(view: View, options: Any) -> tuple[Tensor, Tensor]:
    """IS-CAM (Naidu et al., arXiv:2010.03023): Score-CAM with scores averaged along `i / n` of the mask, i = 1...n."""

    def change(sample: int) -> Change:
        share = (sample + 1) / options.samples
        return lambda x, mask, _tile: x.mul_(mask).mul_(share)

    return _weighted(
        view, view.once(("iscam", options), lambda: masked_scores(view, options, options.samples, change))
    )


METHODS = (
    row(
        "scorecam", "Score-CAM", scorecam, "1",
        "Wang et al., Score-CAM, CVPR Workshops 2020", signed=False,
        edition=ScoreOptions().facts()["edition"],
        needs=("activations", "input"), options=ScoreOptions(),
    ),
    row(
        "sscam", "SS-CAM", sscam, "1",
        "Wang et al., SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization, arXiv:2006.14255", signed=False,
        edition=SmoothScoreOptions().facts()["edition"],
        needs=("activations", "input"), options=SmoothScoreOptions(),
    ),
    row(
        "iscam", "IS-CAM", iscam, "1",
        "Naidu et al., IS-CAM: Integrated Score-CAM for axiomatic-based explanations, arXiv:2010.03023", signed=False,
        edition=IntegratedScoreOptions().facts()["edition"],
        needs=("activations", "input"), options=IntegratedScoreOptions(),
    ),
)  # fmt: skip
