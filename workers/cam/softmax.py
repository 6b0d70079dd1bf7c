"""The attention matrices of a pass, caught where they are made: at the softmax, whatever module it stands in.

`Attending` is a torch function mode: `softmax` over pairs of tokens is seen as it is, `scaled_dot_product_attention` (which
never shows its matrix) is computed step by step, and so is torch's own `MultiheadAttention`. No module is changed, and no
name of one needs to be known. Compiled, scripted and exported networks, and attention by other kernels, stay unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from schemas.errors import ModelError
from workers.cam.capture import SplitNet, frozen, plain
from workers.cam.noise import eager

ELEMENTS_AT_ONCE = 2**26
"""Attention values, over all blocks, heads and tiles, that are held together (0.25 GiB in float32)."""

Use = Callable[[Tensor], Tensor]
"""Attention `(B, heads, queries, keys)` -> what the network goes on with."""

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


class Attending(TorchFunctionMode):
    """Inside, every attention matrix of a pass over `batch` tiles goes through `use`.

    Raises (inside)
    ---------------
    ModelError
        The first axis is not the tiles: attention over windows (Swin).
    """

    def __init__(self, batch: int, use: Use) -> None:
        super().__init__()
        self._batch = batch
        self._use = use

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func in _SOFTMAX:
            out = func(*args, **kwargs)
            dim = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
            over_keys = dim in (-1, out.ndim - 1)
            square = out.ndim > 2 and out.shape[-1] == out.shape[-2] > 1
            return self._through(out) if over_keys and (square or out.ndim == 4) else out
        return func(*args, **kwargs)

    def _through(self, probabilities: Tensor, heads: int | None = None) -> Tensor:
        """`use` on `(B, heads, N, M)`, whether the heads have an axis of their own, share the first, or are one."""
        shape = probabilities.shape
        if heads is not None:
            shaped = probabilities.reshape(-1, heads, *shape[-2:])
        else:
            shaped = probabilities[:, None] if probabilities.ndim == 3 else probabilities
        if shaped.ndim != 4 or len(shaped) != self._batch:
            msg = (
                f"attention of shape {tuple(shape)} for {self._batch} tiles is not one matrix a tile and head: attention "
                "over windows (Swin) has no matrix over all tokens, so that rollout, relevance, LeGrad and DOEI are not "
                "defined for it; use a CAM method such as 'gradcam' or 'hirescam' at a layer of this network"
            )
            raise ModelError(msg)
        return self._use(shaped).reshape(shape)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` with its matrix in the open."""
        if dropout_p > 0:
            msg = "attention dropout is at work although the network is in eval mode; its maps would differ from run to run"
            raise ModelError(msg)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -torch.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
        return self._through(logits.softmax(-1)) @ value

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """Torch's own function, with two names in it bound to ours: inside it a mode sees nothing any more."""
        heads = kwargs["num_heads"] if "num_heads" in kwargs else args[4]
        names = {
            **vars(F),
            "softmax": lambda x, dim: self._through(F.softmax(x, dim), heads),
            "scaled_dot_product_attention": self._attend,
        }
        own = F.multi_head_attention_forward
        copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        return copy(*args, **kwargs)


@dataclass(frozen=True)
class Attention:
    """What one pass over one tile shows of a network's attention."""

    sizes: tuple[tuple[int, ...], ...]
    """`(heads, queries, keys)` of each attention, in order."""
    blocks: tuple[str, ...]
    """Around each attention the outermost module that holds no other one and gives `(B, N, D)`; '' where there is none."""

    @property
    def tokens(self) -> int:
        """N, patches and others."""
        return self.sizes[0][-1]

    def chunks(self, batch: int) -> Iterator[Tensor]:
        """Rows of a batch that are held together."""
        rows = max(1, ELEMENTS_AT_ONCE // sum(map(math.prod, self.sizes)))
        yield from torch.split(torch.arange(batch), rows)

    def block_modules(self, module: nn.Module) -> list[nn.Module]:
        """The blocks; ModelError where some attention has none, or shares it with another."""
        if "" in self.blocks or len(set(self.blocks)) < len(self.blocks):
            found = ", ".join(repr(b) for b in self.blocks)
            msg = (
                f"{type(module).__name__} attends {len(self.blocks)} times, but not each time in a block of its own that gives "
                f"(tiles, tokens, channels) (found {found}); use 'rollout' or 'attention_relevance', which need no blocks"
            )
            raise ModelError(msg)
        return [module.get_submodule(name) for name in self.blocks]


_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Attention]] = WeakKeyDictionary()


def attention_of(net: SplitNet, x: Tensor) -> Attention:
    """What attention a network computes for input like `x` `(B, C_in, *S)`; found once by a pass over one tile.

    Raises
    ------
    ModelError
        None that can be seen; over windows; pooled or crossed (queries that are no tokens); not of the same tokens throughout.
    """
    if eager(net) is None:
        msg = "attention cannot be seen inside an exported or scripted network; give it as adapter 'monai' or 'factory'"
        raise ModelError(msg)
    known = _FOUND.setdefault(net.module, {})
    if (key := tuple(x.shape[1:])) not in known:
        known[key] = _look(net.module, x[:1])
    return known[key]


def _look(module: nn.Module, x: Tensor) -> Attention:
    open_calls: list[tuple[int, str]] = []
    stacks: list[tuple[tuple[int, str], ...]] = []
    sizes: list[tuple[int, ...]] = []
    outputs: dict[int, tuple[int, ...]] = {}
    count = iter(range(10**9))

    def entered(name: str) -> Callable[..., None]:
        return lambda *_: open_calls.append((next(count), name))

    def left(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        call, _ = open_calls.pop()
        outputs[call] = tuple(first.shape) if isinstance(first, Tensor) else ()

    def see(probabilities: Tensor) -> Tensor:
        stacks.append(tuple(open_calls))
        sizes.append(tuple(probabilities.shape[1:]))
        return probabilities

    with ExitStack() as stack:
        for name, m in module.named_modules():
            for handle in (m.register_forward_pre_hook(entered(name)), m.register_forward_hook(left)):
                stack.callback(handle.remove)
        stack.enter_context(frozen(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(Attending(len(x), see))
        module(plain(x))
    _check(module, sizes)
    holding = [call for s in stacks for call, _ in s]
    blocks = []
    for s in stacks:
        own = [
            name
            for call, name in s
            if name
            and holding.count(call) == 1
            and outputs[call][:2] == (len(x), sizes[0][-1])
            and len(outputs[call]) == 3
        ]
        blocks.append(own[0] if own else "")
    return Attention(tuple(sizes), tuple(blocks))


def _check(module: nn.Module, sizes: Sequence[tuple[int, ...]]) -> None:
    name = type(module).__name__
    if not sizes:
        msg = (
            f"{name} computes no attention that can be seen (a softmax over pairs of tokens, or scaled_dot_product_attention "
            "in eager mode); use a CAM method such as 'gradcam' or 'hirescam'"
        )
        raise ModelError(msg)
    if any(q != k for _, q, k in sizes):
        q, k = next((q, k) for _, q, k in sizes if q != k)
        msg = (
            f"{name} has attention of {q} queries over {k} tokens (pooling by attention, or cross-attention); attention "
            "methods need self-attention throughout: use a CAM method such as 'gradcam' or 'hirescam'"
        )
        raise ModelError(msg)
    if len({k for *_, k in sizes}) > 1:
        found = ", ".join(dict.fromkeys(str(k) for *_, k in sizes))
        msg = (
            f"{name} attends over different numbers of tokens from block to block ({found}): its blocks share no tokens along "
            "which attention could be followed; use a CAM method such as 'gradcam' or 'hirescam'"
        )
        raise ModelError(msg)


@contextmanager
def recorded(batch: int) -> Iterator[list[Tensor]]:
    """Filled by a pass inside with its attention matrices `(B, heads, N, N)`, attached to what follows, not to what led there."""
    kept: list[Tensor] = []

    def keep(probabilities: Tensor) -> Tensor:
        # The first is a leaf: nothing before it requires a gradient. The rest hang on it.
        if not probabilities.requires_grad:
            probabilities = probabilities.detach().requires_grad_()
        kept.append(probabilities)
        return probabilities

    with Attending(batch, keep):
        yield kept
