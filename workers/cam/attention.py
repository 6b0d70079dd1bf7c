"""Methods that explain a transformer by its attention: rollout, gradient-weighted relevance, LeGrad.

All follow the network's own attention matrices, every block of them, wherever the explained layer is; that layer only says which
grid the patches form. Patches are the last Z of N tokens, class and register tokens come before them. Which tokens the scores are
read from is not assumed, but found: they are the query rows of the last attention that get a gradient. For a head on the class
token that is its row alone, for a head on pooled tokens all that are pooled; over several rows the mean is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.capture import frozen, plain, swap_first
from workers.cam.method import Options, row
from workers.cam.reach import mixed
from workers.cam.softmax import Attention, attention_of, recorded
from workers.cam.tokens import MOST_PREFIX
from workers.cam.view import View, full


def carried(rows: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """`rows @ (I + E_L) ... (I + E_1) - rows`: what each token gives to the rows read, itself left out.

    Parameters
    ----------
    rows
        `(B, N)` weights of the tokens that are read.
    steps
        `E_1` to `E_L`, each `(B, N, N)`.
    """
    found = rows
    for step in reversed(steps):
        found = found + torch.einsum("bi,bij->bj", found, step)
    return found - rows


def rolled_out(rows: Tensor, attention: Sequence[Tensor]) -> Tensor:
    """`rows` `(B, N)` times the product of `A + I`, rows normalised, over blocks `(B, N, N)`, the last one first."""
    found = rows
    for a in reversed(attention):
        mixed = a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        found = torch.einsum("bi,bij->bj", found, mixed / mixed.sum(-1, keepdim=True))
    return found


def patches(view: View, attention: Attention) -> slice:
    """Where the patches are among the tokens."""
    cells = math.prod(view.grid)
    prefix = attention.tokens - cells
    if not 0 <= prefix <= MOST_PREFIX:
        msg = (
            f"attention is over {attention.tokens} tokens, the explained layer has {' x '.join(map(str, view.grid))} = {cells} "
            "cells: it is not the grid of the patches; explain a layer of the transformer's blocks"
        )
        raise ModelError(msg)
    return slice(prefix, None)


def read_rows(gradient: Tensor) -> Tensor:
    """Weights `(B, N)` of the tokens read, from the gradient `(B, heads, N, N)` at the last attention: equal, sum 1."""
    read = (gradient != 0).any(-1).any(1).to(gradient)
    return read / read.sum(1, keepdim=True).clamp_min(1)


def attended(view: View, rows: Tensor, target: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of every block and the gradients of the target at them, `(n, heads, N, N)` each, for some rows of the batch.

    `target` None: of a fixed mixture of all scores, which says what is read, whatever the class.
    """
    x = view.x[rows.to(view.x.device)]
    with torch.inference_mode(False), torch.enable_grad(), frozen(view.net.module):
        with recorded(len(x)) as maps:
            output = view.net.readout.take(view.net.module(plain(x)), len(x))
        y = mixed(output) if target is None else view.y(output, rows.to(view.x.device))
        gradients: Sequence[Tensor | None] = [None] * len(maps)
        if y.requires_grad:
            gradients = torch.autograd.grad(y.sum(), maps, allow_unused=True)
    if gradients[-1] is None:
        msg = "the scores do not depend on the last attention of the network; attention says nothing of them"
        raise ModelError(msg)
    filled = [torch.zeros_like(m) if g is None else g for m, g in zip(maps, gradients, strict=True)]
    return [full(m.detach()) for m in maps], [full(g) for g in filled]


def rollout(view: View, _: Options) -> tuple[Tensor, None]:
    """Attention rollout (Abnar & Zuidema, ACL 2020): mean over heads, plus the identity, multiplied up; no class."""
    attention = attention_of(view.net, view.x)
    where = patches(view, attention)
    found = []
    for rows in attention.chunks(len(view.x)):
        maps, gradients = attended(view, rows, None)
        found.append(rolled_out(read_rows(gradients[-1]), [m.mean(1) for m in maps])[:, where])
    return torch.cat(found), None


def attention_relevance(view: View, _: Options) -> tuple[Tensor, None]:
    """Gradient-weighted attention relevance (Chefer, Gur & Wolf, ICCV 2021).

    `R <- R + E R` from `R = I`, with `E` the mean over heads of `max(A * dy/dA, 0)`.
    """
    attention = attention_of(view.net, view.x)
    where = patches(view, attention)
    found = []
    for rows in attention.chunks(len(view.x)):
        maps, gradients = attended(view, rows, view.target)
        steps = [(m * g).relu().mean(1) for m, g in zip(maps, gradients, strict=True)]
        found.append(carried(read_rows(gradients[-1]), steps)[:, where])
    return torch.cat(found), None


class LeGradOptions(Options):
    """How LeGrad reads the blocks."""

    layers: int = Field(0, ge=0)
    """Blocks from the end that are used; 0: all."""
    pool: Literal["mean", "head"] = "mean"
    """The tokens of a block are read as their mean (the authors' code), or as the network reads those of its last block."""


def legrad(view: View, options: LeGradOptions) -> tuple[Tensor, None]:
    """LeGrad (Bousselham et al., ICCV 2025): the gradient at each block's attention is itself the explanation.

    Each block's output is read by the network's own head, as if it were the last one's; that score's gradient at that block's
    attention, its positive part averaged over heads and queries, is averaged over blocks. One pass: all blocks' outputs go
    through the head as one batch, and nothing flows back from block to block.
    """
    net = view.net
    attention = attention_of(net, view.x)
    where = patches(view, attention)
    blocks = attention.block_modules(net.module)
    used = len(blocks) if options.layers == 0 else min(options.layers, len(blocks))
    found = []
    for rows in attention.chunks(len(view.x)):
        x = view.x[rows.to(view.x.device)]
        outputs: list[Tensor] = []

        def through(tokens: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(tokens)
            if len(outputs) < len(blocks):
                return tokens.detach()
            read = torch.cat(outputs[-used:])
            return read.mean(1, keepdim=True).expand_as(read) if options.pool == "mean" else read

        with ExitStack() as stack:
            for block in blocks:
                handle = block.register_forward_hook(
                    lambda m, _, out, through=through: swap_first(out, through, type(m).__name__)
                )
                stack.callback(handle.remove)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen(net.module))
            with recorded(len(x)) as maps:
                output = net.readout.take(net.module(plain(x)), used * len(x))
            y = view.y(output, rows.to(view.x.device).repeat(used))
            gradients = torch.autograd.grad(y.sum(), maps[-used:])
        positive = [full(g).relu().mean((1, 2)) for g in gradients]
        found.append(torch.stack(positive).mean(0)[:, where])
    return torch.cat(found), None


METHODS = (
    row(
        "rollout", "Attention rollout", rollout, "1",
        "Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020", signed=False,
        edition="mean over heads, identity added, rows normalised; the tokens read by the head, averaged where several",
        needs=("attention",), class_specific=False,
    ),
    row(
        "attention_relevance", "Attention relevance", attention_relevance, "1",
        "Chefer, Gur & Wolf, Generic Attention-model Explainability, ICCV 2021", signed=False,
        edition="gradient-weighted attention, without the identity; the tokens read by the head, averaged where several",
        needs=("attention",),
    ),
    row(
        "legrad", "LeGrad", legrad, "1",
        "Bousselham, Boggust, Chaybouti, Strobelt & Kuehne, LeGrad, ICCV 2025", signed=False,
        edition="before the min-max scaling; blocks averaged",
        needs=("attention",), options=LeGradOptions(),
    ),
)  # fmt: skip
