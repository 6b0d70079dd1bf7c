"""The `fast` tier: convolutions with their batch norms folded in, channels last, bfloat16 where the processor computes in it.

Other numbers than fp32, therefore a tier of its own in what is hashed. Activations are lifted to float32 before any method
sums them (`workers.cam.view.full`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schemas.errors import ModelError
from schemas.explanation import AskedPrecision, Precision
from workers.cam.capture import CONVOLUTIONS, FOLDED, HookedNet, SplitNet, frozen
from workers.cam.view import full
from workers.models.adapter import ModelAdapter

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SAME = 1e-4
"""Relative L2 within which a folded network is the same network in float32."""
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative L2 of activations and scores, fast against fp32 on a synthetic batch, above which the tier is refused."""


def tiers(asked: AskedPrecision, device: str) -> tuple[Precision, ...]:
    """What `fast` may mean on a device, best first: bfloat16 only where the processor multiplies in it, since it is slow else."""
    if asked != "fast":
        return (asked,)
    return ("fast-bf16", "fast-fp32") if _multiplies_bf16(torch.device(device)) else ("fast-fp32",)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def make_fast(model: ModelAdapter, precision: Precision, tile: Sequence[int]) -> None:
    """`accelerate` the network of a loaded model, checked on two tiles of noise; fp32 is left as it is."""
    if precision != "fp32":
        noise = torch.randn(2, model.card.input.channels, *tile, generator=torch.Generator().manual_seed(0))
        accelerate(model.net, precision, noise.to(model.device))


def accelerate(net: SplitNet, precision: Precision, x: Tensor) -> HookedNet:
    """Make a network fast, in place.

    Module names stay: a folded batch norm becomes an `Identity`. A convolution that took one in has no output of its own any
    more and cannot be explained (`HookedNet` says so).

    Parameters
    ----------
    net
        A frozen eager network in eval mode, float32.
    precision
        `fast-fp32` or `fast-bf16`.
    x
        A synthetic batch `(B, C_in, *S)` on which the fast network is compared with what it was.

    Raises
    ------
    ModelError
        Not an eager network; or it is not close to what it was.
    """
    if not isinstance(net, HookedNet):
        msg = (
            "--precision fast rewrites the modules of an eager network; this card's network is an exported program, whose "
            "arithmetic is fixed: use --precision fp32"
        )
        raise ModelError(msg)
    dtype = torch.bfloat16 if precision == "fast-bf16" else torch.float32
    before = _outputs(net, x)
    fold(net, x)
    net.module.to(memory_format=_layout(x))  # type: ignore[call-overload]
    if dtype != torch.float32:
        for module in net.module.modules():
            # Running variances of 8 bits would cost more than they save.
            if not isinstance(module, NORMS):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    net.module.register_forward_pre_hook(partial(_enter, dtype))
    try:
        after = _outputs(net, x)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        msg = f"--precision {precision}: the network does not run in it on {x.device.type} ({reason}): use --precision fp32"
        raise ModelError(msg) from error
    for what, a, b in zip(("activations", "scores"), after, before, strict=True):
        differ = _distance(a, b)
        if not differ <= CLOSE[dtype]:
            msg = (
                f"--precision {precision}: {what} differ from those of fp32 by {differ:.1%} (relative L2 on a synthetic batch), "
                f"at most {CLOSE[dtype]:.1%} is accepted: use --precision fp32"
            )
            raise ModelError(msg)
    return net


def _enter(dtype: torch.dtype, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = inputs
    return x.to(dtype, memory_format=_layout(x)), *rest


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last where it pays: on CPUs it gained nothing for volumes."""
    if x.ndim == 5 and x.device.type != "cpu":
        return torch.channels_last_3d
    return torch.channels_last if x.ndim == 4 else torch.preserve_format


class Pair(NamedTuple):
    """A convolution and the batch norm that alone reads its output."""

    conv_name: str
    norm_name: str
    conv: nn.Module
    norm: nn.Module


def fold(net: HookedNet, x: Tensor) -> tuple[Pair, ...]:
    """Fold each batch norm into the convolution before it, where that is proven to change nothing.

    Proven twice: in a recorded pass the norm's input is the convolution's output, and no other operation of the whole network
    reads that tensor; and the folded network gives the activations and scores it gave before. If it does not, pairs are
    folded one by one and those that change something are left.
    """
    before = _outputs(net, x)

    def unchanged() -> bool:
        return all(_distance(a, b) <= SAME for a, b in zip(_outputs(net, x), before, strict=True))

    found = pairs(net, x)
    undo = [_fold(net, pair) for pair in found]
    if unchanged():
        return found
    for back in undo:
        back()
    kept = []
    for pair in found:
        back = _fold(net, pair)
        if unchanged():
            kept.append(pair)
        else:
            back()
    return tuple(kept)


def _fold(net: HookedNet, pair: Pair) -> Callable[[], None]:
    conv: Any = pair.conv
    norm: Any = pair.norm
    weight, bias = conv.weight, conv.bias
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    rest = [None if t is None else t.double() for t in (bias, norm.weight, norm.bias)]
    folded = fuse_conv_bn_weights(weight.double(), rest[0], mean, variance, norm.eps, rest[1], rest[2])
    conv.weight, conv.bias = (nn.Parameter(p.to(weight.dtype), requires_grad=False) for p in folded)
    setattr(conv, FOLDED, pair.norm_name)
    parent, _, name = pair.norm_name.rpartition(".")
    setattr(net.module.get_submodule(parent), name, nn.Identity())

    def back() -> None:
        conv.weight, conv.bias = weight, bias
        delattr(conv, FOLDED)
        setattr(net.module.get_submodule(parent), name, norm)

    return back


def pairs(net: HookedNet, x: Tensor) -> tuple[Pair, ...]:
    """Convolutions whose output one batch norm in eval mode reads and nothing else does, in a pass over `x`.

    The explained layer's own output, and what the network gives out, count as read.
    """
    names = {module: name for name, module in net.module.named_modules()}
    shared = Counter(id(p) for m in names for p in m.parameters(recurse=False))
    made: dict[nn.Module, list[Tensor]] = {}
    read: dict[nn.Module, list[Read]] = {}
    reads: Counter[int] = Counter()
    seen: list[Tensor] = []

    def convolved(conv: nn.Module, _inputs: Any, output: Tensor) -> None:
        made.setdefault(conv, []).append(output)  # kept, so that its id stays its own
        reads[id(output)] = 0

    def normed(norm: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
        read.setdefault(norm, []).append(Read(inputs[0], reads[id(inputs[0])]))

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts the operations that read a convolution's output, in whatever code they are."""

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # True, the default, imports the whole compiler: seconds, for what is never compiled

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in _tensors((args, kwargs)):
                if id(leaf) in reads:
                    reads[id(leaf)] += 1
            return func(*args, **(kwargs or {}))

    def foldable(module: nn.Module) -> bool:
        hooks = module._forward_hooks or module._forward_pre_hooks
        return not hooks and all(shared[id(p)] == 1 for p in module.parameters())

    convs = [m for m in names if type(m) in CONVOLUTIONS and foldable(m)]
    # The explained layer stays the module it is.
    norms = [
        m
        for m in names
        if type(m) in NORMS and m is not net.target and foldable(m) and m.running_mean is not None
    ]
    handles = [m.register_forward_hook(convolved) for m in convs]
    handles += [m.register_forward_hook(normed) for m in norms]
    handles += [net.target.register_forward_hook(lambda _m, _i, output: seen.extend(_tensors(output)))]
    try:
        with frozen(net.module), torch.no_grad(), Count():  # type: ignore[no-untyped-call]
            seen.extend(_tensors(net.module(x)))
    finally:
        for handle in handles:
            handle.remove()
    outside = {id(t) for t in seen}
    sources = {id(outputs[0]): conv for conv, outputs in made.items() if len(outputs) == 1}
    found = []
    for norm, (first, *more) in read.items():
        conv = sources.get(id(first.tensor))
        # Read once by the time the norm was done, and never again: then the norm it was.
        if (
            conv
            and not more
            and id(first.tensor) not in outside
            and first.reads == reads[id(first.tensor)] == 1
        ):
            found.append(Pair(names[conv], names[norm], conv, norm))
    return tuple(found)


class Read(NamedTuple):
    """What a norm was given, and how many operations had read that by the time it was done."""

    tensor: Tensor
    reads: int


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _outputs(net: HookedNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and scores, at least float32."""
    split = net.forward(x, differentiable=False)
    return full(split.activations), full(split.scores)


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))
