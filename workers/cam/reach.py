"""Whether a transformer's layer can be explained: its output read the right way, and its patches read by what follows.

A head on the class token reads nothing of the patches once the last attention is done: their gradient is exactly zero there, and
every map of such a layer is blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.capture import HookedNet, Split, SplitNet, frozen, plain
from workers.cam.gradient import cancels
from workers.cam.tokens import Arrangement, looks_channels_last
from workers.cam.view import full

NAMED = 2
"""Layers named instead of one that does not work."""


def check_tokens(net: SplitNet, x: Tensor, split: Split) -> None:
    """Refuse a layer whose layout is doubtful, or whose patches nothing reads.

    Parameters
    ----------
    net
        The split network.
    x
        `(B, C_in, *S)` tiles.
    split
        The pass over `x`; its graph is kept.

    Raises
    ------
    ModelError
        The output parts the tile more evenly if read as `(B, *grid, K)`, and the card does not say how it lies; the gradient at
        the patches is exactly zero in all tiles: layers that would work are named.
    """
    lies = net.arrangement(x)
    shape = tuple(split.activations.shape)
    if lies.layout == "channels_first":
        if not net.tokens.layout and looks_channels_last(shape, x.shape[2:]):
            msg = (
                f"the layer gives shape {shape}: as (tiles, channels, *grid) it parts the tile unevenly, as (tiles, *grid, "
                "channels) evenly. Write in the card's [cam] layout = 'channels_last' (usual inside Swin), or "
                "layout = 'channels_first' if it is so after all"
            )
            raise ModelError(msg)
        return
    gradient = net.grad(mixed(split.scores), split.activations, retain=True)
    if bool((gradient != 0).any()):
        return
    names = working_layers(net, x, lies) if isinstance(net, HookedNet) else []
    advice = " or ".join(repr(n) for n in names[:NAMED]) or "a layer before the last attention"
    name = f"{net.layer!r} " if isinstance(net, HookedNet) else ""
    msg = (
        f"no score depends on the patch tokens of the layer {name}(their gradient is exactly zero): what follows reads only "
        f"the class token. Name a layer from which patches still reach it, such as {advice}"
    )
    raise ModelError(msg)


def working_layers(net: HookedNet, x: Tensor, lies: Arrangement) -> list[str]:
    """Layers that give tokens like the explained one, and whose patches have a gradient.

    The last to run comes first, but those where gradient times activation cancels come after all others.
    """
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                outputs.append((name, output))

        return hook

    with ExitStack() as stack:
        for name, module in net.module.named_modules():
            if name:
                stack.callback(module.register_forward_hook(keep(name)).remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(net.module))
        scores = net.readout.take(net.module(plain(x).requires_grad_()), len(x))
    shape = next((o.shape for name, o in outputs if name == net.layer.partition("#")[0]), None)
    alike = [(name, o) for name, o in outputs if o.shape == shape]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        mixed(scores).sum(), [o for _, o in alike], allow_unused=True
    )
    found: dict[bool, list[str]] = {False: [], True: []}
    for (name, output), gradient in reversed(list(zip(alike, gradients, strict=True))):
        if gradient is not None and bool((g := full(lies.encode(gradient)).flatten(2)).any()):
            a = full(lies.encode(output.detach())).flatten(2)
            found[bool(cancels(a, g).all())].append(name)
    return list(dict.fromkeys(found[False] + found[True]))


def mixed(scores: Tensor) -> Tensor:
    """`(B,)`: a fixed mixture of all scores, in which none cancels another (the sum of probabilities would not change)."""
    mixture = torch.randn(scores[0].numel(), generator=torch.Generator().manual_seed(0))
    flat = full(scores).flatten(1)
    return flat @ mixture.to(flat)
