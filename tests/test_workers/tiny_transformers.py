"""Small transformers with random weights: hand-written ones whose every step can be repeated in NumPy, and MONAI's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_workers.tiny_networks import CONV

GRIDS = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}
PATCH = 4

Attend = Literal["softmax", "sdpa", "mha", "mha_weights"]


class Attention(nn.Module):
    """Self-attention, written in one of the ways that networks write it."""

    def __init__(self, dim: int, heads: int, how: Attend) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how.startswith("mha"):
            out: Tensor = self.mha(x, x, x, need_weights=self.how == "mha_weights")[0]
            return out
        b, n, d = x.shape
        qkv = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.how == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT / (d / self.heads) ** 0.5).softmax(-1) @ v
        return self.mha.out_proj(mixed.transpose(1, 2).reshape(b, n, d))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, how: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, how)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TinyViT(nn.Module):
    """A ViT with class and register tokens; `pool='mean'` reads the patches, 'class' the first token."""

    def __init__(
        self, ndim: int = 2, *, prefix: int = 3, pool: str = "class", how: Attend = "softmax", depth: int = 3,
        dim: int = 8, heads: int = 2, classes: int = 3, position: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pool, self.prefix = pool, prefix
        self.embed = CONV[ndim - 1](2, dim, PATCH, PATCH)
        self.extra = nn.Parameter(torch.randn(1, prefix, dim))
        cells = int(torch.tensor(GRIDS[ndim]).prod())
        self.position = nn.Parameter(torch.randn(1, cells, dim) * position)
        self.blocks = nn.ModuleList(Block(dim, heads, how) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).mT + self.position
        t = torch.cat([self.extra.expand(len(t), -1, -1), t], 1)
        for block in self.blocks:
            t = block(t)
        t = self.norm(t)
        read = t[:, 0] if self.pool == "class" else t[:, self.prefix :].mean(1)
        return self.fc(read)  # type: ignore[no-any-return]


def tiny_vit(ndim: int = 2, seed: int = 0, **args: Any) -> TinyViT:
    torch.manual_seed(seed)
    net = TinyViT(ndim, **args)
    for p in net.parameters():
        # torch's initialisation makes attention almost even, which would hide mistakes
        nn.init.normal_(p, 0, 0.5)
    return net.eval()


def vit_tiles(ndim: int = 2, batch: int = 3, seed: int = 1) -> Tensor:
    size = [PATCH * n for n in GRIDS[ndim]]
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(seed))


def monai_vit(ndim: int = 2, **args: Any) -> nn.Module:
    from monai.networks.nets.vit import ViT

    torch.manual_seed(0)
    return ViT(
        in_channels=2, img_size=VIT_TILES[ndim], patch_size=8, hidden_size=16, mlp_dim=24, num_layers=2,
        num_heads=2, classification=True, num_classes=3, spatial_dims=ndim, post_activation="", **args,
    ).eval()  # fmt: skip


VIT_TILES = {2: (24, 40), 3: (16, 24, 24)}


class SwinClassifier(nn.Module):
    """MONAI's Swin encoder, pooled."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        self.swin = SwinTransformer(
            in_chans=2, embed_dim=6, window_size=(2,) * ndim, patch_size=(2,) * ndim, depths=(2, 2, 2, 2),
            num_heads=(2, 2, 2, 2), spatial_dims=ndim,
        )  # fmt: skip
        self.fc = nn.Linear(96, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.swin(x)[-1]
        return self.fc(last.flatten(2).mean(2))  # type: ignore[no-any-return]


def swin(ndim: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return SwinClassifier(ndim).eval()
