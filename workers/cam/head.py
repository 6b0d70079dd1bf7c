"""A head of global average pooling and one linear layer: proven, not guessed; then no gradient needs to be computed.

Behind such a head the gradient of score `c` is `W[c] / Z` in every cell. Of an encoder that ends in pooling the scores are the
embedding, and `W` is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workers.cam.capture import SplitNet
from workers.cam.noise import bare
from workers.cam.readout import Scores
from workers.cam.view import full

PROOFS = 4
"""Random activations that the tail is tried on."""


@dataclass(frozen=True)
class LinearHead:
    """`scores = mean over cells(A) @ weight.T + bias`."""

    weight: Tensor
    """`(C, K)`, at least float32."""
    bias: Tensor
    """`(C,)`."""
    tolerance: float

    def speaks_for(self, a: Tensor, scores: Tensor) -> bool:
        """Whether it gives the scores `(B, C)` of activations `(B, K, Z)`, in every row that is finite.

        Part of the result, not of the proof: a batch in which it fails is differentiated, on whichever worker.
        """
        mean = a.mean(-1)
        finite = mean.isfinite().all(1) & scores.isfinite().all(1)
        error = (mean @ self.weight.T + self.bias - scores).abs()
        size = mean.abs() @ self.weight.abs().T + self.bias.abs()
        return bool((error <= self.tolerance * size)[finite].all())

    def gradient(self, target: Tensor, cells: int) -> Tensor:
        """`(n, C)` targets -> their gradient `(n, K)`, the same in each of `cells` cells."""
        return target.to(self.weight.dtype) @ self.weight / cells


_FOUND: WeakKeyDictionary[SplitNet, LinearHead | None] = WeakKeyDictionary()


def linear_head(net: SplitNet, x: Tensor) -> LinearHead | None:
    """The linear head of a network, or None where the tail is anything else.

    A weight of fitting shape counts only if, on random activations of both signs and several sizes, the true gradient is
    that weight and the scores are those of that weight plus a constant. Looked for once a network.

    Parameters
    ----------
    net
        The split network.
    x
        `(B, C_in, *S)`; one tile is used.
    """
    net = bare(net)
    if net not in _FOUND:
        _FOUND[net] = _prove(net, x[:1])
    return _FOUND[net]


def _prove(net: SplitNet, x: Tensor) -> LinearHead | None:
    if not isinstance(net.readout, Scores):
        return None  # what the tail gives is not yet the scores
    activations = net.trunk(x)
    if activations.ndim < 3:
        return None  # said in full where the layer is explained
    shape = (PROOFS, *activations.shape[1:])
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 1.0, 10.0, 0.1]).view(-1, *(1,) * (len(shape) - 1))
    with torch.inference_mode(False), torch.enable_grad():
        random = (torch.randn(shape, generator=generator) * size).to(activations)
        leaf = random.detach().clone().requires_grad_()
        scores = net.tail(leaf, x.expand(PROOFS, *x.shape[1:]))
        if not scores.requires_grad:
            return None  # nothing reaches the layer: said where the gradient is asked for
        mix = torch.randn(scores.shape, generator=generator).to(scores)
        gradient = full(net.grad((scores * mix).sum(1), leaf)).flatten(2)
    scores, mix = full(scores.detach()), full(mix)
    mean = full(random).flatten(2).mean(-1)
    tolerance = 1e-4 if activations.element_size() >= 4 else 2e-2
    for weight in _candidates(net.module, scores, activations.shape[1]):
        expected = (mix @ weight / gradient.shape[-1])[..., None]
        if not (gradient - expected).abs().amax() <= tolerance / 10 * expected.abs().amax():
            continue
        constant = scores - mean @ weight.T
        head = LinearHead(weight, constant[0], tolerance)
        if head.speaks_for(full(random).flatten(2), scores):
            return head
    return None


def _candidates(module: nn.Module, scores: Tensor, channels: int) -> list[Tensor]:
    """Parameters shaped like a head `(C, K)`, a 1x1 convolution's `(C, K, 1, ...)` included; the identity."""
    rows = scores.shape[1]
    identity = [torch.eye(rows).to(scores)] if rows == channels else []
    return identity + [
        full(p.detach()).reshape(rows, channels)
        for p in module.parameters()
        if p.ndim >= 2 and p.shape[:2] == (rows, channels) and p.numel() == rows * channels
    ]
