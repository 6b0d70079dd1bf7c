"""TransMIL (Shao et al., NeurIPS 2021): two layers of Nystrom attention with a positional convolution between them.

The tiles' order counts twice: they are laid row by row on a square for the convolution, and the attention's residual
convolution runs along the sequence. Give them sorted by (row, column). One bag at a time: the start of the iterative
pseudo-inverse is scaled by a maximum over everything in it.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.models.heads.head import BagHead
from workers.models.names import Names

SIDE = 7
"""Least side of the square under `padding = 'grid'`."""


class Landmarks(NamedTuple):
    """What `NystromAttention` computes for all heads at once; `(heads, positions, d)`, zero rows in front."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_mean: Tensor
    """`(heads, landmarks, d)`."""
    k_mean: Tensor
    inverse: Tensor
    """`(heads, landmarks, landmarks)`, the pseudo-inverse of the landmarks' own attention."""


class NystromAttention(nn.Module):
    """Self-attention approximated through landmarks (Xiong et al., AAAI 2021): `softmax(q k') pinv softmax(q' k) v`.

    The sequence is filled up with zeros in FRONT to a multiple of the landmarks, and these take part in the softmax. A row of
    the approximate attention can be slightly negative and need not sum to 1. Heads are computed one by one: of 100,000
    tiles the two large matrices of one head are 100 MB each.

    Parameters
    ----------
    width
        M; divisible by `heads`.
    landmarks
        Means of neighbouring positions that stand for all of them.
    iterations
        Of the pseudo-inverse.
    kernel
        Positions the residual convolution of the values reaches over.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        landmarks: int,
        iterations: int = 6,
        kernel: int = 33,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.landmarks = landmarks
        self.iterations = iterations
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.softmax = nn.Softmax(-1)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.res_conv = nn.Conv2d(
            heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(n, M)` -> `(n, M)`."""
        s = self.split(x)
        residual: Tensor = self.res_conv(s.v[None])[0]
        mixed = []
        for head in range(self.heads):
            near: Tensor = self.softmax(s.q[head] @ s.k_mean[head].T)
            far: Tensor = self.softmax(s.q_mean[head] @ s.k[head].T)
            mixed.append(near @ (s.inverse[head] @ (far @ s.v[head])))
        out: Tensor = self.to_out((torch.stack(mixed) + residual).transpose(0, 1).flatten(1)[-len(x) :])
        return out

    def first_row(self, s: Landmarks, n: int) -> Tensor:
        """`(heads, n)`: approximate attention of the first of the `n` positions to each of them."""
        near: Tensor = self.softmax(s.q[:, -n, None] @ s.k_mean.transpose(1, 2))
        rows = []
        for row, q_mean, k in zip(near @ s.inverse, s.q_mean, s.k, strict=True):
            rows.append(row @ self.softmax(q_mean @ k.T))
        return torch.cat(rows)[:, -n:]

    def split(self, x: Tensor) -> Landmarks:
        """Queries, keys and values `(n, M)` makes, their landmarks and the pseudo-inverse."""
        each = math.ceil(len(x) / self.landmarks)
        x = nn.functional.pad(x, (0, 0, each * self.landmarks - len(x), 0))
        q, k, v = (t.reshape(len(x), self.heads, -1).transpose(0, 1) for t in self.to_qkv(x).chunk(3, dim=1))
        q = q * q.shape[-1] ** -0.5
        q_mean, k_mean = (t.reshape(self.heads, self.landmarks, each, -1).mean(2) for t in (q, k))
        between: Tensor = self.softmax(q_mean @ k_mean.transpose(1, 2))
        return Landmarks(q, k, v, q_mean, k_mean, pseudo_inverse(between, self.iterations))


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of `(heads, m, m)` by the third-order iteration of Razavi et al. (2014).

    The start is scaled by the largest row sum times the largest column sum over ALL heads, as published.
    """
    size = a.abs()
    z = a.transpose(1, 2) / (size.sum(2).max() * size.sum(1).max())
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z


class Layer(nn.Module):
    """`x + attention(norm(x))`."""

    def __init__(self, width: int, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = NystromAttention(width, heads, landmarks, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.attn(self.norm(x))
        return x + added


class Position(nn.Module):
    """Depthwise convolutions of 7, 5 and 3 over the tiles on a square, added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.proj1 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.proj2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """`(side * side, M)` -> the same."""
        grid = x.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # channels last: three times as fast
        out: Tensor = self.proj(grid) + grid + self.proj1(grid) + self.proj2(grid)
        return out[0].permute(1, 2, 0).flatten(0, 1)


class TransmilHead(BagHead):
    """Logits of a class token that attends to the tiles.

    Parameters
    ----------
    features, classes, hidden, activation, dropout
        See `BagHead`.
    heads
        Of the attention; `hidden` is divisible by it.
    landmarks
        0: half of `hidden`.
    padding
        `bag`: the first tiles are repeated to a full square before the first layer and stay in the attention, as
        published. `grid`: they are repeated around the positional convolution only, which also has zeros up to a square of
        7 x 7, as in MHIM-MIL.
    attention_dropout
        While training.
    """

    ordered = True
    published: ClassVar[Names] = (
        (r"(?:_fc1|patch_to_emb)\.0\.(weight|bias)", r"projection.0.\1"),
        (r"(?:online_encoder\.)?(cls_token|layer[12]\..+|norm\.(?:weight|bias))", r"\1"),
        (r"(?:online_encoder\.)?(?:pos_layer|pos_embedding)\.(.+)", r"position.\1"),
        (r"(?:_fc2|predictor)\.(weight|bias)", r"classifier.\1"),
    )

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 512,
        activation: str = "relu",
        dropout: float = 0.0,
        heads: int = 8,
        landmarks: int = 0,
        padding: Literal["bag", "grid"] = "bag",
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        if padding not in ("bag", "grid"):
            msg = f"padding {padding!r} is none of 'bag', 'grid'"
            raise ModelError(msg)
        if self.width % heads:
            msg = f"{self.width} numbers a tile cannot be shared by {heads} heads of attention; choose a divisor"
            raise ModelError(msg)
        self.padding = padding
        marks = landmarks or self.width // 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.width))
        self.layer1 = Layer(self.width, heads, marks, attention_dropout)
        self.position = Position(self.width)
        self.layer2 = Layer(self.width, heads, marks, attention_dropout)
        self.norm = nn.LayerNorm(self.width)
        self.classifier = nn.Linear(self.width, classes)

    def pool(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(M,)`, the class token."""
        x: Tensor = self.layer1(self._tokens(f))
        tiles = x[1:]
        n, side = len(tiles), _side(len(tiles))
        square = tiles[_repeated(n, side).to(tiles.device)]
        if self.padding == "grid" and side < SIDE:
            square = nn.functional.pad(square, (0, 0, 0, SIDE * SIDE - side * side))
            side = SIDE
        placed: Tensor = self.position(square, side)[:n]
        x = self.layer2(torch.cat([x[:1], placed]))
        pooled: Tensor = self.norm(x[0])
        return pooled

    def classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pooled)
        return logits

    def attention(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(1, N)`: the class token's approximate attention in the first layer, mean over heads."""
        return self.head_attention(self.project(h)).mean(0, keepdim=True)

    def head_attention(self, f: Tensor) -> Tensor:
        """`(N, M)` projected -> `(heads, N)`; what repeated tiles receive is the tile's."""
        return self._first(f)[0]

    def messages(self, f: Tensor) -> Tensor:
        """`(N, M)` projected -> `(N, M)`: what each tile sends the class token in the first layer, with the bias.

        The heads' attention times value, joined and put through the output layer: what MHIM-MIL v2 scores tiles by.
        """
        attention, s = self._first(f)
        sent: Tensor = attention[:, :, None] * s.v[:, -self._padded(len(f)) :][:, : len(f)]
        out: Tensor = self.layer1.attn.to_out(sent.transpose(0, 1).flatten(1))
        return out

    def _first(self, f: Tensor) -> tuple[Tensor, Landmarks]:
        tokens = self._tokens(f)
        attn = self.layer1.attn
        s = attn.split(self.layer1.norm(tokens))
        row = attn.first_row(s, len(tokens))[:, 1:]
        own = _repeated(len(f), _side(len(f)))[: row.shape[1]].to(row.device)
        return torch.zeros_like(row[:, : len(f)]).index_add(1, own, row), s

    def _padded(self, n: int) -> int:
        return _side(n) ** 2 if self.padding == "bag" else n

    def _tokens(self, f: Tensor) -> Tensor:
        """`(N, M)` -> class token and tiles `(1 + N', M)`."""
        if self.padding == "bag":
            f = f[_repeated(len(f), _side(len(f))).to(f.device)]
        return torch.cat([self.cls_token[0], f])


def _side(n: int) -> int:
    root = math.isqrt(n)
    return root if root * root == n else root + 1


def _repeated(n: int, side: int) -> Tensor:
    """`(side * side,)`: all `n` tiles, then the first ones again."""
    return torch.arange(side * side) % n
