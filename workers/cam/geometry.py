"""Where a layer's cells lie in the input: measured by sending the coordinates themselves through the network.

The network is run once on an image whose every pixel holds its own coordinate, with each operation replaced by its
position-preserving shadow: convolutions and max-pools average evenly, norms and activations do nothing, padding goes on
where the image ended. Every cell then holds the centre of what it sees. (Transposed, this is back-propagating ones through
a copy with equal positive weights; forward it needs neither a copy nor a gradient, works on TorchScript and exported
graphs, and is exact in border cells too.) The replacement happens below autograd, operator by operator, so the network
itself is not touched and its weights play no part: the geometry belongs to the architecture.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from schemas.explanation import CellGeometry
from workers.cam.capture import SplitNet

REGULAR_PX = 0.02
"""Cells further than this share of a stride from an even spacing are not called regular."""


def measure_cells(net: SplitNet, input_shape: Sequence[int]) -> CellGeometry:
    """Measure stride and first centre of a layer's cells.

    Parameters
    ----------
    net
        The network, split at the layer.
    input_shape
        `(C_in, *S)`: channels and tile of the model, S of 2 or 3 axes.

    Returns
    -------
    CellGeometry
        In input px, pixel `i` being centred at `i + 0.5`. `source` is `grid` (an even grid over the tile) where
        position cannot be followed through the network: attention, transposed convolutions, custom kernels. Tokens always
        lie on that grid, which is where patches that do not overlap are cut from.

    Raises
    ------
    ModelError
        The layer does not exist or is not reached.
    """
    channels, *tile = input_shape
    device = next((p.device for p in net.module.parameters()), torch.device("cpu"))
    x = torch.zeros(2, channels, *tile, device=device)
    shape = tuple(net.trunk(x).shape[2:])
    tokens = net.arrangement(x).layout != "channels_first"
    if len(shape) == len(tile) >= 2 and not tokens:
        # On a small tile a deep layer has one cell and no stride: a larger input has the same stride and first centre.
        # An operation that hides positions does so at any size (and a volume 64 times as large is not tried for nothing).
        with contextlib.suppress(_HiddenError):
            for factor in (1, 2, 4):
                measured = _measure(net, channels, [t * factor for t in tile], device)
                if measured:
                    cell, first = measured
                    return CellGeometry(
                        shape=shape, cell_px=cell, first_centre_px=first, source="receptive_field"
                    )
    return grid_cells(shape, tile)


def grid_cells(shape: Sequence[int], tile: Sequence[int]) -> CellGeometry:
    """The even grid: `shape` cells that part the tile of `tile` px between them."""
    if len(shape) != len(tile):
        # no axis of the layer can be told to be one of the tile's (a sequence of tokens): one cell, the whole tile
        shape = (1,) * len(tile)
    cell = tuple(t / n for t, n in zip(tile, shape, strict=True))
    return CellGeometry(
        shape=tuple(shape), cell_px=cell, first_centre_px=tuple(c / 2 for c in cell), source="grid"
    )


def _measure(
    net: SplitNet, channels: int, size: list[int], device: torch.device
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Stride and first centre an axis, or None where the field comes out as no even grid."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) + (0.5 - n / 2) for n in size]
    fields = [torch.ones(size, device=device), *torch.meshgrid(*axes, indexing="ij")]
    x = torch.stack(fields)[:, None].expand(-1, channels, *size).contiguous()
    try:
        with _lifted(net.module), _Shadow(len(size)):
            out = net.trunk(x)
    except _HiddenError:
        raise
    except Exception:  # whatever breaks on such input is not measurable; `source` says so
        return None
    summed = out.double().sum(1)
    if out.ndim != x.ndim or min(out.shape[2:]) < 2 or not bool((summed[0].abs() > 0).all()):
        return None
    centres = summed[1:] / summed[0]
    cell, first = [], []
    for d, n in enumerate(out.shape[2:]):
        profile = centres[d].movedim(d, 0)
        step = (profile[-1] - profile[0]).mean() / (n - 1)
        even = profile[0].mean() + step * torch.arange(n, device=device)
        deviation = (profile - even.view(-1, *[1] * (len(size) - 1))).abs().max()
        if not float(step) > 0 or not float(deviation) <= REGULAR_PX * float(step):
            return None
        cell.append(round(float(step), 3))
        first.append(round(float(even[0]) + size[d] / 2, 3))
    return tuple(cell), tuple(first)


@contextlib.contextmanager
def _lifted(module: nn.Module) -> Iterator[None]:
    """Half-precision parameters and buffers as float32 inside, the very tensors outside.

    In half precision coordinates would be rounded to whole pixels and more. Not for concurrent calls on one module.
    """
    found = {t: t.data for t in (*module.parameters(), *module.buffers()) if t.dtype in _HALVES}
    try:
        for t, data in found.items():
            t.data = data.float()
        yield
    finally:
        for t, data in found.items():
            t.data = data


class _HiddenError(Exception):
    """An operation through which a position cannot be followed."""


_HALVES = frozenset({torch.float16, torch.bfloat16})
_IDENTITY = frozenset({
    "relu", "relu6", "leaky_relu", "_prelu_kernel", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "hardswish", "hardtanh", "softplus", "threshold", "tanh", "rrelu_with_noise", "clamp", "clamp_min",
    "clamp_max", "dropout", "alpha_dropout", "feature_dropout", "batch_norm", "instance_norm", "group_norm",
    "layer_norm",
})  # fmt: skip
_NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
    "native_group_norm", "native_layer_norm", "native_dropout",
})  # fmt: skip
_GATES = frozenset({"sigmoid", "hardsigmoid"})
_CONVOLUTIONS = frozenset({"convolution", "_convolution", "convolution_overrideable"})
_PADS = ("constant_pad_nd", "reflection_pad", "replication_pad")
_OPAQUE = ("softmax", "scaled_dot_product", "bmm", "upsample", "lstm", "gru", "grid_sampler")


class _Shadow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Each operator replaced by what it does to positions."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; to be marked as not for dynamo, torch would import it, which takes seconds.
        return False

    def __init__(self, ndim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ndim = ndim

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name: str = func.overloadpacket.__name__
        plain = name.rstrip("_")
        if plain in _IDENTITY:
            return args[0] if name.endswith("_") else args[0].clone()
        if plain in _NORMS:
            empty = args[0].new_empty(0)
            return (args[0].clone(), *[empty] * (len(func._schema.returns) - 1))
        if plain in _GATES:
            # a gate (squeeze-and-excitation, SiLU written out) scales what passes and moves nothing
            return args[0].fill_(1.0) if name.endswith("_") else torch.ones_like(args[0])
        if plain in _CONVOLUTIONS:
            return self._convolution(*args[:9])
        if name.startswith("max_pool"):
            pooled = self._pool(*args)
            return (pooled, torch.zeros_like(pooled, dtype=torch.long)) if "indices" in name else pooled
        if name.startswith("avg_pool"):
            return self._average(*args)
        if name.startswith("adaptive_max_pool"):
            pooled = _adaptive(args[0], args[1])
            return pooled, torch.zeros_like(pooled, dtype=torch.long)
        if name.startswith(_PADS):
            return _extend(args[0], args[1])
        if name == "mean" and len(args) > 1 and self._is_spatial(args[0], args[1]):
            # global context says nothing of where
            return torch.zeros_like(func(*args, **kwargs))
        if name in ("addmm", "mm", "linear"):
            return _mix(args[1] if name == "addmm" else args[0], func(*args, **kwargs).shape)
        if name == "_to_copy" and kwargs.get("dtype") in _HALVES:
            return func(*args, **{**kwargs, "dtype": args[0].dtype})
        if any(word in name for word in _OPAQUE):
            raise _HiddenError(name)
        return func(*args, **kwargs)

    def _is_spatial(self, x: Tensor, dims: Any) -> bool:
        """Whether a mean over `dims` is over all spatial axes of a feature map."""
        return dims is not None and x.ndim == self._ndim + 2 and len(dims) == self._ndim and 0 not in dims

    def _convolution(
        self, x: Tensor, weight: Tensor, _bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
        _output_padding: Any, _groups: int,
    ) -> Tensor:  # fmt: skip
        n = weight.ndim - 2
        if transposed:
            raise _HiddenError("transposed convolution")
        kernel = weight.shape[2:]
        pads = [p for size in reversed(_each(padding, n)) for p in (size, size)]
        window = x.new_full((1, 1, *kernel), 1 / math.prod(kernel))
        # All channels are mixed evenly, so that one convolution serves every output channel.
        mixed = _extend(x.mean(1, keepdim=True), pads)
        convolve = _CONVOLVE[n - 1]
        out = convolve(mixed, window, stride=_each(stride, n), dilation=_each(dilation, n))
        return out.expand(-1, weight.shape[0], *out.shape[2:]).contiguous()

    def _average(
        self, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False, *_: Any
    ) -> Tensor:
        return self._pool(x, kernel, stride, padding, 1, ceil_mode)

    def _pool(
        self,
        x: Tensor,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Tensor:
        n = self._ndim
        kernel, padding, dilation = _each(kernel, n), _each(padding, n), _each(dilation, n)
        stride = _each(stride, n) if stride else kernel
        pads = []
        for size, k, s, p, d in reversed(
            list(zip(x.shape[-n:], kernel, stride, padding, dilation, strict=True))
        ):
            span = d * (k - 1) + 1
            free = size + 2 * p - span
            count = (math.ceil if ceil_mode else math.floor)(free / s) + 1
            if ceil_mode and (count - 1) * s >= size + p:
                count -= 1  # the last window must start inside the input or its left padding
            pads += [p, max((count - 1) * s + span - size - p, -p)]
        lead = x.shape[:-n]
        flat = _extend(x, pads).reshape(-1, 1, *_padded(x.shape[-n:], pads))
        window = x.new_full((1, 1, *kernel), 1 / math.prod(kernel))
        out = _CONVOLVE[n - 1](flat, window, stride=stride, dilation=dilation)
        return out.reshape(*lead, *out.shape[2:])


_CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def _each(value: Any, n: int) -> list[int]:
    """An int or a list of 1 or n ints -> n ints."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def _padded(shape: Sequence[int], pads: Sequence[int]) -> list[int]:
    n = len(shape)
    return [s + pads[2 * (n - 1 - i)] + pads[2 * (n - 1 - i) + 1] for i, s in enumerate(shape)]


def _extend(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Pad (last axis first, as `F.pad`) by going on in a straight line; negative pads crop."""
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        axis = x.ndim - 1 - i
        n = x.shape[axis]
        if before <= 0 and after <= 0:
            x = x.narrow(axis, -before, n + before + after)
            continue
        if n < 2:
            raise ValueError("an axis of one element has no slope")
        place = torch.arange(-before, n + after, device=x.device)
        # beyond the ends: the end value plus so many steps of the last difference
        inside = place.clamp(0, n - 1)
        beyond = (place - inside).to(x.dtype).view(-1, *[1] * i)
        low, high = (
            x.narrow(axis, 1, 1) - x.narrow(axis, 0, 1),
            x.narrow(axis, n - 1, 1) - x.narrow(axis, n - 2, 1),
        )
        x = x.index_select(axis, inside) + beyond.clamp(max=0) * low + beyond.clamp(min=0) * high
    return x.clone()


def _adaptive(x: Tensor, size: Any) -> Tensor:
    n = len(size)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1]
    out = pool(x, size)
    return torch.zeros_like(out) if math.prod(size) == 1 else out


def _mix(x: Tensor, shape: torch.Size) -> Tensor:
    """A linear layer over the last axis: every output is the even mean of the inputs."""
    return x.mean(-1, keepdim=True).expand(shape).contiguous()
