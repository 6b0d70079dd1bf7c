"""Layer-wise relevance propagation as gradients: `R = a * c` for every activation, `c` a gradient under changed rules.

A rule says through which `z'` the relevance of an output `z` flows back. Written as `z' * stop(z / z')`, the forward value
is the network's own and an ordinary backward pass does the rest: the relevance of `z` is `z * c(z)`, its share of an input
`a * dz'/da * z c(z) / z'` (Bach et al., PLOS ONE 2015; in one pass: Ali et al., ICML 2022; RelP: Jafari et al., 2025).
LRP is patented: see `workers.cam.relevance`, which is the same for the layers of CNN encoders, as relevance and not as a
gradient. The rules are put in from outside, in `with RelevanceRules(...)`: a network needs no second edition of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from schemas.errors import ModelError

NEAR_ZERO = 1e-6
"""Added to an activation's input, away from 0, where its output is written as a multiple of it."""


@dataclass(frozen=True)
class LinearRule:
    """How relevance passes a layer that is linear in its input."""

    kind: Literal["0", "epsilon", "gamma"] = "0"
    epsilon: float = 1e-6
    gamma: float = 0.25
    biases: Literal["share", "drop"] = "share"
    """`share`: a bias takes what it gave; `drop`: the inputs take it all, so that relevance is conserved, but may change
    its sign where the bias outweighs them."""

    def modified(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias through which relevance flows."""
        if self.kind == "gamma":
            weight = weight + self.gamma * weight.clamp_min(0)
            bias = None if bias is None else bias + self.gamma * bias.clamp_min(0)
        return weight, bias if self.biases == "share" else None

    @property
    def plain(self) -> bool:
        """Relevance flows as the gradient does."""
        return self.kind == "0" and self.biases == "share"


def redistributed(z: Tensor, modified: Tensor, epsilon: float = 0.0) -> Tensor:
    """The value of `z`, its relevance flowing through `modified`; where that is 0 none flows."""
    below = modified.detach() + torch.where(modified < 0, -epsilon, epsilon)
    factor = torch.where(below == 0, 0, z.detach() / torch.where(below == 0, 1, below))
    flow = modified * factor
    return z.detach() + (flow - flow.detach())


class RelevanceRules(TorchFunctionMode):
    """Inside, gradients of what a network computes are coefficients of relevance.

    Linear layers and convolutions follow `rule`; layer norms keep their own forward with a constant deviation; what is
    an activation function `f(x)` passes as `x * stop(f(x) / x)` (ReLU as it is); of a product of two things that hang on the
    input each gets half; softmax, hence attention, is a constant: the features that it weighs are explained.

    Parameters
    ----------
    rule
        Of the linear layers.

    Attributes
    ----------
    biases
        Leaves that stand for the biases of all layers passed: `(b * gradient).sum()` is the relevance that b took.
    """

    def __init__(self, rule: LinearRule) -> None:
        super().__init__()
        self.rule = rule
        self.biases: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR:
            return self._linear(func, *args, **kwargs)
        if func in CONSTANT:
            return func(*args, **kwargs).detach()
        if func in ACTIVATIONS:
            return redistributed(func(*args, **kwargs), args[0], NEAR_ZERO)
        if func in PRODUCTS:
            return _halves(func, args, kwargs)
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            query, key, value, *rest = args
            return func(query.detach(), key.detach(), value, *rest, **kwargs)
        if func in OPAQUE:
            msg = f"relevance cannot be followed through {func.__name__}, which is one piece; use another bag method"
            raise ModelError(msg)
        return func(*args, **kwargs)

    def _linear(
        self,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        changed, kept = self.rule.modified(weight, bias)
        leaf = None if kept is None else self._leaf(kept)
        modified = func(x, changed, leaf, *rest, **options)
        if self.rule.plain:
            return modified
        z = func(x, weight, bias, *rest, **options)
        return redistributed(z, modified, 0.0 if self.rule.kind == "0" else self.rule.epsilon)

    def _layer_norm(
        self,
        x: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        z = functional.layer_norm(x, shape, weight, bias, eps)
        axes = tuple(range(-len(shape), 0))
        centred = x - x.mean(axes, keepdim=True)
        deviation = (centred.square().mean(axes, keepdim=True) + eps).sqrt().detach()
        flow = centred / deviation if weight is None else centred / deviation * weight
        if bias is not None:
            if self.rule.biases == "drop":
                return redistributed(z, flow)
            flow = flow + self._leaf(bias)
        return z.detach() + (flow - flow.detach())

    def _leaf(self, bias: Tensor) -> Tensor:
        leaf = bias.detach().clone().requires_grad_()
        self.biases.append(leaf)
        return leaf


def _halves(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product whose factors each get half of its relevance, where more than one hangs on the input."""
    moving = [i for i, factor in enumerate(args) if isinstance(factor, Tensor) and factor.requires_grad]
    if len(moving) < 2:
        return func(*args, **kwargs)
    each = [
        func(*(a if j == i or j not in moving else a.detach() for j, a in enumerate(args)), **kwargs)
        for i in moving
    ]
    return torch.stack(each).mean(0)


LINEAR = frozenset({
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d,
    torch.conv1d, torch.conv2d, torch.conv3d,
})  # fmt: skip
CONSTANT = frozenset({functional.softmax, torch.softmax, Tensor.softmax})
ACTIVATIONS = frozenset({
    functional.gelu, functional.silu, functional.elu, functional.softplus, functional.tanh, functional.sigmoid,
    torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid,
})  # fmt: skip
PRODUCTS = frozenset({
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.mv, Tensor.mv, torch.einsum,
})  # fmt: skip
OPAQUE = frozenset({functional.multi_head_attention_forward})
