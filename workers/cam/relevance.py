"""Layer-wise relevance propagation under any PyTorch network: the backward of each operation replaced by a rule.

What flows back is relevance itself: operations that only move values keep torch's own backward (relevance follows its value,
a max-pool's to the maximum, what was used twice is summed), the others get a rule of `workers.cam.rules`. Operations are seen
as they are called, be they modules, functions or operators, in place or not; no module is changed. Whatever the graph holds
that is neither is refused by name, so that no plain gradient passes for relevance.

LRP is patented (Fraunhofer and TU Berlin: WO 2016/150472, EP 3271863, US 12061966 and others). This project's licence grants no
rights in those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from schemas.errors import ModelError
from workers.cam.rules import Affine, Rule, Rules, Share, Term, quotient, redistribute
from workers.cam.view import full

Back = Callable[[Tensor], tuple[Tensor, ...]]
"""Relevance of an output -> relevance of each differentiable input."""


class _Ruled(torch.autograd.Function):
    """A value whose backward is a rule's."""

    @staticmethod
    def forward(ctx: Any, value: Callable[[], Tensor], back: Back, *_: Tensor) -> Tensor:
        ctx.back = back
        return value()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, *ctx.back(grads[0]))


class _Made(NamedTuple):
    """How a tensor came about, for the batch norm that may follow."""

    version: int
    x: Tensor
    w: Tensor
    b: Tensor | None
    f: Affine
    rule: Rule


_MADE = "_relevance_made"
_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d" for n in (1, 2, 3)}
_MATMULS = {"matmul", "mm", "bmm", "mv"}
_MEANS = {
    "mean", "sum", "interpolate", "upsample",
    *(f"{kind}{n}d" for kind in ("avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)),
}  # fmt: skip
"""Linear, without weights of their own."""
_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "tanh",
    "clamp", "clamp_min",
}  # fmt: skip
_SUMS = {"add": (1, 1), "sub": (1, -1), "__rsub__": (-1, 1), "rsub": (-1, 1)}
"""Signs of the two operands."""
_SCALES = {"mul", "multiply", "div", "divide", "true_divide", "neg", "negative"}

_MOVES = {
    "AccumulateGrad", "Alias", "AsStrided", "Cat", "Clone", "ConstantPadNd", "CopySlices", "CopyBackwards", "Expand", "Flip",
    "Gather", "Index", "IndexSelect", "Narrow", "Permute", "PixelShuffle", "PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D",
    "ReflectionPad3D", "Repeat", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "ReshapeAlias", "Roll", "Select",
    "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView",
    "Unsqueeze", "View", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Max", "Amax",
    "Maximum", "_Ruled",
}  # fmt: skip
"""Nodes of the graph that relevance goes through as a gradient does: values are moved, or the largest is taken."""
_MOVES_IN_PLACE = {"copy", "squeeze", "unsqueeze", "transpose", "t", "swapaxes", "__setitem__"}
"""Functions in place that move values and no more; any other would hide in the graph behind a view."""


class Propagating(TorchFunctionMode):
    """Inside, what is computed from a leaf is computed as ever, and its `torch.autograd.grad` gives relevance.

    Parameters
    ----------
    rules
        Which rule for what.
    """

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._rules = rules
        self._called: dict[Any, str] = {}
        self._used_first = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(_attached(a) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        called = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        name = called if called.startswith("__") else called.rstrip("_")
        stand_in: Callable[..., Any] = _RULED.get(name, Propagating._plain)
        return stand_in(self, name, func, args, kwargs)

    def _plain(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With torch's own backward: of what moves values, or lies off the way; `check` tells."""
        given = [(a, a._version) for a in (*args, *kwargs.values()) if _attached(a)]
        out = func(*args, **kwargs)
        if name not in _MOVES_IN_PLACE and any(a._version != version for a, version in given):
            _refuse(f"{name} in place")
        known = {a.grad_fn for a, _ in given}
        for made in out if isinstance(out, tuple | list) else (out,):
            if _attached(made):
                self._called |= dict.fromkeys(_nodes(made, known), name)
        return out

    def check(self, scores: Tensor) -> None:
        """That everything between the leaf and the scores has a rule.

        Raises
        ------
        ModelError
            An operation has none; or no layer sees the input as it is, where that layer was to have a rule of its own.
        """
        for node in _nodes(scores):
            if _kind(node) not in _MOVES:
                _refuse(self._called.get(node, _kind(node)))
        if self._rules.first and not self._used_first:
            msg = (
                f"rule {self._rules.first!r} is for the layer that sees the pixels; this network's first layer is given something "
                "else, since the network scales or shifts its input before: use another rule"
            )
            raise ModelError(msg)

    def _rule(self, x: Tensor, otherwise: Rule) -> Rule:
        if self._rules.first is None or any(_kind(node) == "_Ruled" for node in _nodes(x)):
            return otherwise
        self._used_first = True
        return self._rules.first

    def _ruled(self, made: _Made, out: Tensor) -> Tensor:
        """`out`, of a layer, with the layer's rule as its backward."""
        a, version, rules = made.x.detach(), made.x._version, self._rules
        _, _, w, b, f, rule = made

        def back(r: Tensor) -> tuple[Tensor, ...]:
            if a._version != version:
                msg = "the network overwrites the input of a layer after the layer has run, so that relevance cannot go back through it"
                raise ModelError(msg)
            shares = rules.shares(rule, full(a), full(w), None if b is None else full(b))
            return (redistribute(full(r), f, shares, rules.stabiliser(rule)).to(a.dtype),)

        return _apply(out, back, made.x)

    def _layer(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A convolution or a fully connected layer."""
        (x, w, b), rest, named = _bound(("input", "weight", "bias"), args, kwargs)
        if _attached(w) or _attached(b):
            return self._plain(f"{name} with weights that depend on the input", func, args, kwargs)

        def f(values: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
            found: Tensor = func(values, weights, bias, *rest, **named)
            return found

        rule = self._rule(x, self._rules.linear if name == "linear" else self._rules.conv)
        out = f(x.detach(), w, b)
        made = _Made(out._version, x, w, b, f, rule)
        out = self._ruled(made, out)
        # Channels on the second axis of the output and the first of the weights, where a batch norm can be folded.
        if out.ndim == w.ndim and name not in _TRANSPOSED:
            setattr(out, _MADE, made._replace(version=out._version))
        return out

    def _norm(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A batch norm: part of the layer whose output it is given, if that is so; else a layer with a weight a channel."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        if func is not F.batch_norm:  # torch's own, and an exported program's
            names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        values, _, _ = _bound(names, args, kwargs)
        given = dict(zip(names, values, strict=True))
        x, mean, var = given["input"], given["running_mean"], given["running_var"]
        w, b = given["weight"], given["bias"]
        if given["training"] or mean is None:
            return self._plain("batch_norm by the batch's own statistics", func, args, kwargs)
        if _attached(w) or _attached(b):
            return self._plain(f"{name} with weights that depend on the input", func, args, kwargs)
        scale = (var + (1e-5 if given["eps"] is None else given["eps"])).rsqrt()
        scale = scale if w is None else scale * w
        shift = -mean * scale if b is None else b - mean * scale
        out = func(
            *(a.detach() if a is x else a for a in args),
            **{k: v.detach() if v is x else v for k, v in kwargs.items()},
        )
        made: _Made | None = getattr(x, _MADE, None)
        if made is not None and made.version == x._version:
            bias = shift if made.b is None else shift + made.b * scale
            weights = made.w * scale.view(-1, *(1,) * (made.w.ndim - 1))
            return self._ruled(made._replace(w=weights, b=bias), out)
        shape = (1, -1, *(1,) * (x.ndim - 2))

        def f(values: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
            return values * weights if bias is None else values * weights + bias

        rule = self._rule(x, self._rules.conv)
        return self._ruled(_Made(0, x, scale.view(shape), shift.view(shape), f, rule), out)

    def _matmul(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product with a matrix that does not hang on the input."""
        if len(args) != 2 or kwargs or all(map(_attached, args)):
            return self._plain(f"{name} of two things that both depend on the input", func, args, kwargs)
        left, right = args

        def before(values: Tensor, weights: Tensor, _: Tensor | None) -> Tensor:
            found: Tensor = func(values, weights)
            return found

        def after(values: Tensor, weights: Tensor, _: Tensor | None) -> Tensor:
            found: Tensor = func(weights, values)
            return found

        x, w, f = (left, right, before) if _attached(left) else (right, left, after)
        rule = self._rule(x, self._rules.linear) if x is left else self._rules.linear
        return self._ruled(_Made(0, x, w, None, f, rule), f(x.detach(), w, None))

    def _mean(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A sum with fixed weights: everything gets what it brought."""
        (x,), rest, named = _bound(("input",), args, kwargs)
        a, epsilon = x.detach().clone(), self._rules.of_sums

        def f(values: Tensor, _w: Tensor, _b: Tensor | None) -> Tensor:
            found: Tensor = func(values, *rest, **named)
            return found

        def back(r: Tensor) -> tuple[Tensor, ...]:
            shares = (Share(1.0, (Term(full(a), full(a), None),)),)
            return (redistribute(full(r), f, shares, epsilon).to(a.dtype),)

        return _apply(f(a, a, None), back, x)

    def _activation(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Value by value, nothing from nothing: relevance passes."""
        (x,), rest, named = _bound(("input",), args, kwargs)
        if any(map(_attached, (*rest, *named.values()))) or bool(
            func(torch.zeros_like(x), *rest, **named).any()
        ):
            what = f"{name} that makes something of 0, or has a bound that depends on the input"
            return self._plain(what, func, args, kwargs)
        return _in_place(x, lambda own: func(own, *rest, **named), lambda r: (r,), x)

    def _sum(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Two things added: each gets its share of the sum, what does not depend on the leaf too."""
        (x, y), rest, named = _bound(("input", "other"), args, kwargs)
        signs = _SUMS[name]
        parts = [
            sign * (full(t.detach()) if isinstance(t, Tensor) else t)
            for t, sign in ((x, signs[0]), (y, signs[1]))
        ]
        scaled = 0 if name == "rsub" else 1
        parts[scaled] = parts[scaled] * named.get("alpha", 1)
        z = parts[0] + parts[1]
        if not self._rules.bias:
            z = z - sum(p for p, t in zip(parts, (x, y), strict=True) if _is_bias(t, z))
        attached = [(p, t) for p, t in zip(parts, (x, y), strict=True) if _attached(t)]
        shares = [quotient(p, z, self._rules.of_sums) for p, _ in attached]
        sizes = [(t.shape, t.dtype) for _, t in attached]

        def back(r: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                (full(r) * share).sum_to_size(shape).to(dtype)
                for share, (shape, dtype) in zip(shares, sizes, strict=True)
            )

        other = y.detach() if isinstance(y, Tensor) else y
        return _in_place(x, lambda own: func(own, other, *rest, **named), back, *(t for _, t in attached))

    def _scale(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each value times one that does not depend on the input: relevance passes."""
        (x,), rest, named = _bound(("input",), args, kwargs)
        others = (*rest, *named.values())
        if _attached(x) and any(map(_attached, others)):
            return self._plain(
                f"{name} of two things that both depend on the input (a gate)", func, args, kwargs
            )
        if named.get("rounding_mode"):
            return self._plain(f"{name} that rounds", func, args, kwargs)
        if not _attached(x) and name not in ("mul", "multiply"):
            return self._plain(f"{name} by something that depends on the input", func, args, kwargs)
        source = x if _attached(x) else next(t for t in others if _attached(t))
        shape = source.shape
        rest = tuple(t.detach() if t is source else t for t in rest)
        named = {k: t.detach() if t is source else t for k, t in named.items()}
        return _in_place(x, lambda own: func(own, *rest, **named), lambda r: (r.sum_to_size(shape),), source)


_RULED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_CONVOLUTIONS | _TRANSPOSED | {"linear"}, Propagating._layer),
    "batch_norm": Propagating._norm,
    **dict.fromkeys(_MATMULS, Propagating._matmul),
    **dict.fromkeys(_MEANS, Propagating._mean),
    **dict.fromkeys(_ACTIVATIONS, Propagating._activation),
    **dict.fromkeys(_SUMS, Propagating._sum),
    **dict.fromkeys(_SCALES, Propagating._scale),
}
"""What stands in for a function, in place or not, by its name."""


def _in_place(x: Tensor, compute: Callable[[Tensor], Tensor], back: Back, *inputs: Tensor) -> Tensor:
    """`compute` on a copy of `x`; where that changes the copy, `x` is changed, history and all."""
    own = x.detach().clone()
    version = own._version
    out = _apply(compute(own), back, *inputs)
    return x.copy_(out) if own._version != version else out


def _apply(out: Tensor, back: Back, *inputs: Tensor) -> Tensor:
    found: Tensor = _Ruled.apply(lambda: out, back, *inputs)  # type: ignore[no-untyped-call]
    return found


def _attached(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_bias(t: Any, like: Tensor) -> bool:
    """A number or a parameter, rather than the values of another branch."""
    return not _attached(t) and (not isinstance(t, Tensor) or t.shape != like.shape)


def _bound(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """Arguments by name (None where left out), and the rest."""
    named = dict(kwargs)
    found = [args[i] if i < len(args) else named.pop(name, None) for i, name in enumerate(names)]
    return found, args[len(names) :], named


def _nodes(tensor: Tensor, known: Iterable[Any] = ()) -> Iterator[Any]:
    """The graph behind a tensor, down to what is known, a node once."""
    todo: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None, *known}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += [before for before, _ in node.next_functions]


def _kind(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", type(node).__name__)


def _refuse(what: str) -> NoReturn:
    msg = (
        f"relevance propagation has no rule for {what!r}, which this network uses between the explained layer (or its input) and its "
        "scores. Use method 'fullgrad' or 'igcam', which also add up"
    )
    raise ModelError(msg)
