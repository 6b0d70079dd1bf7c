"""The image encoder of Segment Anything (Kirillov et al., ICCV 2023), a ViT of windows after ViTDet (Li et al., ECCV 2022).

Written to load the published weights: its parameters bear their names. The neck, which serves the mask decoder, is left out:
what is explained is the map of patches, and the embedding is its mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError


class SamEncoder(nn.Module):
    """`(B, channels, H, W)` -> `(B, dim)`, the mean over patches. Its layer `features` gives `(B, dim, H / patch, W / patch)`.

    Parameters
    ----------
    dim, depth, heads
        Width, blocks and heads; those of ViT-B.
    patch
        Pixels a patch and axis; tiles are multiples of it.
    window
        Patches an axis of the windows that attention stays in.
    everywhere
        Blocks that attend over the whole tile.
    trained_px
        Side of the images it was trained on. Positions are resampled to other tiles: as far as the tile is from this, so far
        is the network from what was published.
    positions
        Whether it has an embedding of absolute positions.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        *,
        channels: int = 3,
        patch: int = 16,
        window: int = 14,
        everywhere: Sequence[int] = (2, 5, 8, 11),
        trained_px: int = 1024,
        positions: bool = True,
    ) -> None:
        super().__init__()
        self.patch = patch
        side = trained_px // patch
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, dim)) if positions else None
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.blocks = nn.ModuleList(
            Block(dim, heads, 0 if i in everywhere else window, side if i in everywhere else window)
            for i in range(depth)
        )
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if any(n % self.patch for n in x.shape[2:]):
            msg = f"tiles of {' x '.join(map(str, x.shape[2:]))} px cannot be cut into patches of {self.patch} px; make [input] tile a multiple"
            raise ModelError(msg)
        t: Tensor = self.patch_embed["proj"](x).movedim(1, -1)
        if self.pos_embed is not None:
            t = t + _resampled(self.pos_embed, t.shape[1:3])
        for block in self.blocks:
            t = block(t)
        maps: Tensor = self.features(t.movedim(-1, 1))
        return maps.mean((2, 3))


class Block(nn.Module):
    """Attention in windows (0: over the whole tile) of up to `reach` patches an axis, then a perceptron."""

    def __init__(self, dim: int, heads: int, window: int, reach: int) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reach)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(dim, 4 * dim), "lin2": nn.Linear(4 * dim, dim)})

    def forward(self, t: Tensor) -> Tensor:
        """`(B, h, w, dim)`, the same."""
        normed = self.norm1(t)
        t = t + (_in_windows(self.attn, normed, self.window) if self.window else self.attn(normed))
        out: Tensor = t + self.mlp["lin2"](F.gelu(self.mlp["lin1"](self.norm2(t))))
        return out


class Attention(nn.Module):
    """Self-attention with relative positions, an axis at a time."""

    def __init__(self, dim: int, heads: int, reach: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * reach - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * reach - 1, dim // heads))

    def forward(self, t: Tensor) -> Tensor:
        """`(B, h, w, dim)`, the same."""
        grid = t.shape[1:3]
        q, k, v = self.qkv(t).flatten(1, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        there = q.unflatten(2, grid)
        rows = torch.einsum("bnhwd,hkd->bnhwk", there, _offsets(self.rel_pos_h, grid[0]))
        columns = torch.einsum("bnhwd,wkd->bnhwk", there, _offsets(self.rel_pos_w, grid[1]))
        where = (rows[..., :, None] + columns[..., None, :]).flatten(-2).flatten(2, 3)
        attention = (q @ k.mT * k.shape[-1] ** -0.5 + where).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2).unflatten(1, grid))
        return out


def _in_windows(attention: nn.Module, t: Tensor, window: int) -> Tensor:
    """Attention over `(B, h, w, D)` cut into windows, filled up with zeros at the far edges."""
    h, w = t.shape[1:3]
    padded = F.pad(t, (0, 0, 0, -w % window, 0, -h % window))
    rows, columns = padded.shape[1] // window, padded.shape[2] // window
    cut = padded.reshape(len(t), rows, window, columns, window, -1).transpose(2, 3)
    out: Tensor = attention(cut.flatten(0, 2)).reshape(cut.shape)
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]


def _offsets(table: Tensor, n: int) -> Tensor:
    """`(n, n, d)`: row `i - j + n - 1` of a table of 2 n - 1 offsets, to which it is resampled."""
    if len(table) != 2 * n - 1:
        table = F.interpolate(table.T[None], size=2 * n - 1, mode="linear")[0].T
    at = torch.arange(n, device=table.device)
    return table[at[:, None] - at + n - 1]


def _resampled(positions: Tensor, grid: Sequence[int]) -> Tensor:
    """`(1, H, W, D)` positions at another grid `(1, h, w, D)`."""
    if positions.shape[1:3] == tuple(grid):
        return positions
    found = F.interpolate(positions.movedim(-1, 1), size=tuple(grid), mode="bilinear", antialias=True)
    return found.movedim(1, -1)
