"""Weighted convolutions: a kernel times a fixed or learned density that falls off from its centre.

Cammarasana & Patanè, Optimal Density Functions for Weighted Convolution in Learning Models, 2025 (arXiv 2505.24527). The layer
is a plain convolution by `weight * Phi`: it changes training only. Loaded networks are folded, so that whatever reads a
convolution's weight (relevance propagation, NormGrad, folding of batch norms) reads the one that acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.models.networks import monai_network


class WeightedConv(nn.modules.conv._ConvNd):
    """What the three layers share; its entries in a state dict bear the published names.

    Arguments are those of `nn.Conv1d` to `nn.Conv3d`, defaults included (the published layers pad by 1 and have no bias), and:

    Parameters
    ----------
    den
        Density from the outermost place to the one beside the centre, whose own is 1: r numbers for a kernel of 2 r + 1.
    trainable
        `den` is a parameter; else the density is a buffer.

    Raises
    ------
    ModelError
        A kernel that is even or not the same on every axis, or another number of values.
    """

    alfa: Tensor
    Phi: Tensor
    den: nn.Parameter

    def _weigh(self, den: Sequence[float], trainable: bool) -> None:
        size, *others = self.kernel_size
        if set(others) - {size} or size % 2 == 0:
            msg = f"{type(self).__name__}: kernel {self.kernel_size}; a density is defined for one odd size on every axis"
            raise ModelError(msg)
        if len(den) != size // 2:
            msg = (
                f"{type(self).__name__}: den has {len(den)} values, a kernel of {size} takes {size // 2}: from the outermost "
                "place to the one beside the centre"
            )
            raise ModelError(msg)
        values = torch.tensor(den, dtype=self.weight.dtype, device=self.weight.device)
        if trainable:
            self.den = nn.Parameter(values)
        else:
            self.register_buffer("alfa", profile(values))
            self.register_buffer("Phi", density(values, len(self.kernel_size)))

    def reset_parameters(self) -> None:
        """Kaiming's normal weights by fan out, as published; no bias."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def effective(self) -> Tensor:
        """The weight that acts, of the shape of `weight`."""
        phi = density(self.den, len(self.kernel_size)) if hasattr(self, "den") else self.Phi
        return self.weight * phi

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C_in, *S)` -> `(B, C_out, *S')`."""
        out: Tensor = self._conv_forward(x, self.effective, self.bias)
        return out

    def plain(self) -> nn.Module:
        """The plain convolution that this one is."""
        conv: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            PLAIN[type(self)],
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        conv.weight = nn.Parameter(self.effective.detach(), requires_grad=self.weight.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)  # type: ignore[no-any-return]


class WeightedConv1d(WeightedConv, nn.Conv1d):
    def __init__(self, *args: Any, den: Sequence[float], trainable: bool = False, **kwargs: Any) -> None:
        nn.Conv1d.__init__(self, *args, **kwargs)
        self._weigh(den, trainable)


class WeightedConv2d(WeightedConv, nn.Conv2d):
    def __init__(self, *args: Any, den: Sequence[float], trainable: bool = False, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._weigh(den, trainable)


class WeightedConv3d(WeightedConv, nn.Conv3d):
    def __init__(self, *args: Any, den: Sequence[float], trainable: bool = False, **kwargs: Any) -> None:
        nn.Conv3d.__init__(self, *args, **kwargs)
        self._weigh(den, trainable)


PLAIN: Mapping[type, type[nn.Module]] = {
    WeightedConv1d: nn.Conv1d,
    WeightedConv2d: nn.Conv2d,
    WeightedConv3d: nn.Conv3d,
}
_WEIGHTED = {plain: weighted for weighted, plain in PLAIN.items()}


def profile(den: Tensor) -> Tensor:
    """`(den_1..den_r, 1, den_r..den_1)`."""
    return torch.cat([den, den.new_ones(1), den.flip(0)])


def density(den: Tensor, ndim: int) -> Tensor:
    """Phi `(k,) * ndim`: the outer product of the profile with itself."""
    return reduce(lambda a, b: a[..., None] * b, [profile(den)] * ndim)


def weigh(network: nn.Module, den: Mapping[int, Sequence[float]], *, trainable: bool = False) -> nn.Module:
    """Put weighted convolutions in the place of plain ones, their weights kept; in place.

    Parameters
    ----------
    den
        Kernel size -> its density. Convolutions of other sizes, or not the same on every axis, stay plain.

    Raises
    ------
    ModelError
        A size that no convolution has, or a density that does not fit it.
    """
    found: set[int] = set()

    def swap(conv: Any) -> nn.Module | None:
        if type(conv) not in _WEIGHTED:
            return None
        size, *others = conv.kernel_size
        if size not in den or set(others) - {size}:
            return None
        found.add(size)
        new = _WEIGHTED[type(conv)](
            conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode,
            den=den[size], trainable=trainable,
        )  # fmt: skip
        new.weight, new.bias = conv.weight, conv.bias
        assert isinstance(new, WeightedConv)
        return new

    network = _swapped(network, swap)
    if idle := sorted(set(den) - found):
        msg = f"{type(network).__name__} has no convolution of kernel {', '.join(map(str, idle))}; leave it out of the density"
        raise ModelError(msg)
    return network


def folded(network: nn.Module) -> nn.Module:
    """`network` with a plain convolution in the place of each weighted one, under its name; in place."""
    return _swapped(network, lambda m: m.plain() if isinstance(m, WeightedConv) else None)


def _swapped(network: nn.Module, swap: Any) -> nn.Module:
    made: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            new = made.get(child) or swap(child)
            if new is not None:
                made[child] = new
                setattr(parent, name, new)
    return swap(network) or network


def weighted_monai(
    network: str, den: Mapping[str, Sequence[float]], *, trainable: bool = False, **args: Any
) -> nn.Module:
    """`monai.networks.nets.<network>(**args)` with weighted convolutions: a factory for model cards.

    Parameters
    ----------
    den
        As in `weigh`, kernel sizes as text: `{"3" = [0.7]}` in TOML.
    """
    try:
        sizes = {int(size): values for size, values in den.items()}
    except ValueError as error:
        msg = f"den = {dict(den)}: its keys are kernel sizes, such as '3'"
        raise ModelError(msg) from error
    return weigh(monai_network(network, args), sizes, trainable=trainable)
