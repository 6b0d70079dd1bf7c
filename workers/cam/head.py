"""The linear head that CAM needs, proven rather than guessed."""

from __future__ import annotations

from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.capture import SplitNet


def head_gradient(net: SplitNet, g: Tensor, column: Tensor, sign: Tensor, n_outputs: int) -> Tensor:
    """Rows of the network's linear head as the gradient that global average pooling makes of them.

    Behind GAP and a linear layer `W` the gradient of score `c` is `W[c] / Z` in every cell. A weight that has the shape
    of such a head is accepted only if the true gradient says so, for every tile of every batch.

    Parameters
    ----------
    net
        The split network.
    g
        `(B, K, Z)` true gradient.
    column, sign
        `(B,)` row of the head for each tile, and its sign.
    n_outputs
        C, columns of the scores.

    Returns
    -------
    Tensor
        `(B, K, 1)`, the same for all cells.

    Raises
    ------
    ModelError
        The layer is not followed by global average pooling and a linear layer.
    """
    cells = g.shape[-1]
    tolerance = 1e-5 if g.element_size() >= 4 else 2e-2
    for weight in _candidates(net.module, n_outputs, g.shape[1]):
        expected = (weight.to(g.dtype)[column] * sign[:, None].to(g.dtype) / cells)[..., None]
        finite = g.isfinite().flatten(1).all(1)
        error = (g - expected)[finite].abs()
        if not error.numel() or float(error.amax()) <= tolerance * float(expected.abs().amax()):
            return expected
    msg = (
        "method 'cam' needs a layer followed directly by global average pooling and one linear layer; the gradient at "
        "the layer explained is not such a layer's weights. Explain the last activation before pooling, or use method "
        "'gradcam' or 'hirescam', which need neither"
    )
    raise ModelError(msg)


def _candidates(module: nn.Module, rows: int, channels: int) -> list[Tensor]:
    """Parameters shaped like a head `(C, K)`, a 1x1 convolution's `(C, K, 1, ...)` included."""
    return [
        p.detach().reshape(rows, channels)
        for p in module.parameters()
        if p.ndim >= 2 and p.shape[:2] == (rows, channels) and p.numel() == rows * channels
    ]
