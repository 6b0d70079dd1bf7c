"""Noise on gradients, for asking how much of a map hangs on them: it enters before any method sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.cam.capture import HookedNet, Split, SplitNet
from workers.cam.readout import Readout
from workers.cam.tokens import Arrangement, TokenLayout


class NoisyNet:
    """A split network whose gradients carry Gaussian noise; everything else is the network's own.

    Every gradient asked of it, at whichever activations, is perturbed: a measure of robustness whose noise lands in a
    tensor that no method uses says nothing.

    Parameters
    ----------
    net
        The network.
    relative
        Standard deviation of the noise, as a share of the standard deviation of each tile's own gradient.
    seeds
        `(B,)` int64, a seed a tile. Row `r` of a gradient of `n * B` rows is noised by the seed of tile `r % B`, by `r // B`
        and by the number of the call, so that repeated gradients are noised independently.
    """

    def __init__(self, net: SplitNet, relative: float, seeds: Tensor) -> None:
        self.net = net
        self._relative = relative
        self._seeds = seeds
        self.calls = 0

    @property
    def module(self) -> nn.Module:
        return self.net.module

    @property
    def readout(self) -> Readout:
        return self.net.readout

    @property
    def tokens(self) -> TokenLayout:
        return self.net.tokens

    def arrangement(self, x: Tensor) -> Arrangement:
        return self.net.arrangement(x)

    def trunk(self, x: Tensor) -> Tensor:
        return self.net.trunk(x)

    def tail(self, activations: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.net.tail(activations, x, rows)

    def forward(self, x: Tensor, *, differentiable: bool = True) -> Split:
        return self.net.forward(x, differentiable=differentiable)

    def end_to_end(self, x: Tensor) -> Tensor:
        return self.net.end_to_end(x)

    def grad(self, y: Tensor, activations: Tensor, retain: bool = False) -> Tensor:
        g = self.net.grad(y, activations, retain)
        std = g.detach().flatten(1).float().std(1, correction=0)
        noise = torch.stack([self._row(r, g.shape[1:]) for r in range(len(g))]).to(g)
        self.calls += 1
        return g + noise * (self._relative * std).to(g).view(-1, *(1,) * (g.ndim - 1))

    def of_tiles(self, rows: Tensor) -> NoisyNet:
        """The same for tiles `rows` `(n,)` of its batch, as if their next gradient were taken with those of all."""
        found = NoisyNet(self.net, self._relative, self._seeds[rows.cpu()])
        found.calls = self.calls
        return found

    def _row(self, row: int, shape: torch.Size) -> Tensor:
        turn, tile = divmod(row, len(self._seeds))
        seed = (int(self._seeds[tile]) * 1_000_003 + turn) * 1_000_003 + self.calls
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))


def bare(net: SplitNet) -> SplitNet:
    """The network without noise, if there is any."""
    return net.net if isinstance(net, NoisyNet) else net


def eager(net: SplitNet) -> HookedNet | None:
    """The eager network of a split one, whatever noise is put on its gradients; None for a cut network."""
    inner = bare(net)
    return inner if isinstance(inner, HookedNet) else None


def of_tiles(net: SplitNet, rows: Tensor) -> SplitNet:
    """A network for tiles `rows` `(n,)` of its batch alone: whatever noise there is goes with the tile."""
    return net.of_tiles(rows) if isinstance(net, NoisyNet) else net
