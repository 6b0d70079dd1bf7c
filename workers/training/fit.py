"""A small training loop: presence of classes in tiles, by binary cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""A batch in the network's own scale, `(B, C, *S)`, and the source of chance -> the batch changed."""


def fit(
    net: nn.Module,
    x: NDArray[Any],
    y: NDArray[np.float32],
    *,
    mask: NDArray[np.bool_] | None = None,
    prepare: Callable[[NDArray[Any]], torch.Tensor],
    augment: Augment,
    seed: int,
    steps: int = 150,
    batch: int = 16,
    learning_rate: float = 3e-3,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train `net` in place with AdamW (weight decay 1e-3) and OneCycle (20 % warm-up); leave it in `eval`.

    Parameters
    ----------
    net
        `(B, C, *S)` -> `(B, K)` logits.
    x
        `(N, C, *S)` pixels as a reader gives them.
    y
        `(N, K)` 0 or 1.
    mask
        `(N, K)` False where an answer does not count; all count if None.
    prepare
        From a batch of raw pixels to the network's input.
    augment
        See `turn_and_jitter_tiles` and `turn_and_jitter_volumes`.
    seed
        Order and augmentation. The weights of `net` are the caller's.
    steps, batch
        Mini-batches, and samples in each; every sample is seen before any is seen again.
    progress
        Called with (steps done, steps in all).

    Returns
    -------
    The loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = np.ones(y.shape, np.bool_) if mask is None else mask
    optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.2)
    losses: list[float] = []
    waiting: list[int] = []
    net.train()
    for step in range(steps):
        while len(waiting) < batch:
            waiting += torch.randperm(len(x), generator=generator).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        images = prepare(x[chosen])
        # contiguous: convolutions of permuted batches have crashed in backward
        logits = net(augment(images, generator).contiguous())
        weight = torch.from_numpy(counts[chosen]).float()
        every = nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(y[chosen]), reduction="none"
        )
        loss = (every * weight).sum() / weight.sum().clamp(min=1.0)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps)
    net.eval()
    return losses


def turn_and_jitter_tiles(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of `(B, C, y, x)` turned by 180 degrees, gain and offset jittered by channel.

    Mirrors and quarter turns are left out: they would make a direction of +45 degrees one of -45.
    """
    turned = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return _jitter(torch.where(turned, images.flip(2, 3), images), generator, 0.1)


def turn_and_jitter_volumes(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`(B, C, z, y, x)` with cubic tiles: axes permuted (one order a batch), flipped, gain and offset jittered."""
    order = torch.randperm(3, generator=generator).tolist()
    images = images.permute(0, 1, *(axis + 2 for axis in order))
    for axis in (2, 3, 4):
        flipped = torch.rand(len(images), 1, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flipped, images.flip(axis), images)
    return _jitter(images, generator, 0.05)


def _jitter(images: torch.Tensor, generator: torch.Generator, amount: float) -> torch.Tensor:
    shape = (*images.shape[:2], *(1 for _ in images.shape[2:]))
    gain = 1.0 + amount * torch.randn(shape, generator=generator)
    offset = amount * torch.randn(shape, generator=generator)
    return images * gain + offset
