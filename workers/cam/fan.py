"""Many activations of few tiles through the tail: the trunk runs once a tile, not once a row of activations.

Methods that try a change a channel need the tail of many activations of one tile. Where nothing by-passes the layer they
can enter at the layer, `n` rows for `B` tiles. Where a skip connection goes round it, the rows would meet `B` rows of
something else: shapes then do not fit, or a wrong row is read. So it is proven, once a network, or the tiles are repeated.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workers.cam.capture import SplitNet
from workers.cam.noise import bare

ROWS = (1, 0, 0, 1, 0)
"""Which of two tiles each row of the proof belongs to: unequal numbers, neither sorted nor interleaved, another one first."""


def tail_of_many(net: SplitNet, activations: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Scores `(n, C)`, as `SplitNet.tail` gives them, of `n` activations of the tiles of `x`.

    Parameters
    ----------
    net
        The split network.
    activations
        `(n, K, *grid)`.
    x
        `(B, C_in, *S)`.
    rows
        `(n,)` int64, which tile each row belongs to.
    """
    if not fans_out(net, x):
        return net.tail(activations, x[rows])
    used = torch.zeros(len(x), dtype=torch.bool, device=rows.device)
    used[rows] = True
    return net.tail(activations, x[used.nonzero()[:, 0]], (used.cumsum(0) - 1)[rows])


_FOUND: WeakKeyDictionary[SplitNet, bool] = WeakKeyDictionary()


def fans_out(net: SplitNet, x: Tensor) -> bool:
    """Whether activations may enter at the layer without their tiles: tried on random ones, once a network.

    Parameters
    ----------
    net
        The split network.
    x
        `(B, C_in, *S)`; only its shape and type count.
    """
    net = bare(net)
    if net not in _FOUND:
        _FOUND[net] = _prove(net, x)
    return _FOUND[net]


def _prove(net: SplitNet, x: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(2, *x.shape[1:], generator=generator).to(x)
    rows = torch.tensor(ROWS, device=x.device)
    like = net.trunk(tiles)
    activations = torch.randn(len(ROWS), *like.shape[1:], generator=generator).to(like)
    with torch.no_grad():
        expected = net.tail(activations, tiles[rows]).detach()
        try:
            found = net.tail(activations, tiles, rows).detach()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False  # rows of the layer meet rows of the input: whatever that network's code says of it
    tolerance = 1e-4 if expected.element_size() >= 4 else 2e-2
    scale = float(expected.abs().amax())
    return found.shape == expected.shape and bool(((found - expected).abs() <= tolerance * scale).all())
