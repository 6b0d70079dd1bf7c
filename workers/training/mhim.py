"""Masked hard instance mining: a student that does not see the tiles its teacher finds easiest (MHIM-MIL v1 and v2).

W. Tang et al., "Multiple Instance Learning Framework with Masked Hard Instance Mining for Whole Slide Image Classification",
ICCV 2023, and "Multiple Instance Learning Framework with Masked Hard Instance Mining for Gigapixel Histopathology Image
Analysis", IJCV 2025; details as in the code published with them. Written anew. Where it departs: kept tiles stay in their
order (the code shuffles them when it recycles), equal votes of heads are broken by the mean score, and a bag of which nothing
would be left is not masked.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import SpecError
from schemas.training import MhimSpec
from workers.models.heads.abmil import AttentionHead
from workers.models.heads.dsmil import DsmilHead, Streams
from workers.models.heads.head import BagHead
from workers.models.heads.transmil import TransmilHead
from workers.training.losses import soft_cross_entropy
from workers.training.mil import cosine

HEADS, HEAD_WIDTH = 8, 64
"""Of the recycling cross-attention."""
RECYCLE_DROPOUT = 0.1
_ROUNDING = 1e-9
"""0.07 x 100 is 7 tiles, though not in binary."""


def tile_scores(head: BagHead, h: Tensor, edition: str) -> Tensor:
    """`(N, D)` -> `(H, N)`: by what MHIM ranks tiles; several rows vote.

    v1: attention (ABMIL, CLAM), or each head's attention of the class token in the first layer (TransMIL). v2: the largest
    class probability of what a tile adds, `max_c softmax_c(W_c . a_i h_i)`, of TransMIL of what it sends the class token in the
    first layer; evidence against a class is salient too. DSMIL, both: the largest of the tile's instance scores.
    """
    match head, edition:
        case DsmilHead(), _:
            return head.instances(h).max(1).values[None]
        case TransmilHead(), "v1":
            return head.head_attention(head.project(h))
        case TransmilHead(), _:
            logits = head.messages(head.project(h)) @ head.classifier.weight.T
        case AttentionHead(), "v1":
            return head.attention(h)
        case AttentionHead(), _:
            parts = head.parts(h)
            logits = parts.attention.T * (parts.values @ parts.weight.T)
        case _:
            msg = f"--mhim with {type(head).__name__}: expected abmil, abmil_gated, clam_sb, clam_mb, dsmil or transmil"
            raise SpecError(msg)
    return torch.softmax(logits, 1).max(1).values[None]


def masked(scores: Tensor, spec: MhimSpec, done: float, generator: torch.Generator) -> Tensor:
    """Which tiles the student does not see: the union of the random, the low and the high mask.

    Parameters
    ----------
    scores
        `(H, N)` of the teacher.
    done
        Share of the training that is over, for `decay_high`.
    generator
        Of the random choices; on the CPU.

    Returns
    -------
    Tensor
        `(N,)` bool, on the CPU. All False where the union is the whole bag.
    """
    scores = scores.detach().cpu()
    n = scores.shape[1]
    mask = torch.zeros(n, dtype=torch.bool)
    if spec.random:
        mask[torch.randperm(n, generator=generator)[: _count(n, spec.random)]] = True
    if spec.low:
        mask[_extreme(-scores, _count(n, spec.low))] = True
    high = cosine(spec.high, 0.0, done) if spec.decay_high else spec.high
    if high:
        wide = high / spec.high_random
        top = _extreme(scores, _count(n, min(wide, 1.0)))
        share = spec.high_random if wide <= 1 else high
        mask[top[torch.randperm(len(top), generator=generator)[: _count(len(top), share)]]] = True
    return torch.zeros_like(mask) if mask.all() else mask


def _count(n: int, share: float) -> int:
    return math.ceil(n * share - _ROUNDING)


def _extreme(scores: Tensor, count: int) -> Tensor:
    """`(count,)` tiles of the highest score; of several heads, those in the top of most of them."""
    if len(scores) > 1:
        votes = torch.zeros_like(scores).scatter_(1, scores.topk(count, 1).indices, 1.0).sum(0)
        order = scores.mean(0).argsort(descending=True, stable=True)
        return order[votes[order].argsort(descending=True, stable=True)[:count]]
    return scores[0].topk(count).indices


class Recycle(nn.Module):
    """Tiles that are compressed into a few tokens by cross-attention from queries shared by all bags.

    The queries learn no gradient: while training they follow the tokens, `q <- m q + (1 - m) token`.
    """

    queries: Tensor

    def __init__(self, width: int, tokens: int, momentum: float) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.momentum = momentum
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(RECYCLE_DROPOUT)
        bound = math.sqrt(6 / (3 * 16 * 16 + width))
        self.register_buffer("queries", torch.empty(tokens, width).uniform_(-bound, bound))

    def forward(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(tokens, M)`."""
        q = self.to_q(self.norm(self.queries.clone()))  # changed below, before the backward pass
        k, v = self.to_kv(self.norm(f)).chunk(2, 1)
        q, k, v = (t.view(len(t), HEADS, HEAD_WIDTH).transpose(0, 1) for t in (q, k, v))
        attention = self.dropout(torch.softmax(q @ k.transpose(1, 2) * HEAD_WIDTH**-0.5, -1))
        found: Tensor = self.dropout(self.to_out((attention @ v).transpose(0, 1).flatten(1)))
        if self.training:
            with torch.no_grad():
                self.queries.mul_(self.momentum).add_(found, alpha=1 - self.momentum)
        return found


class Mhim(nn.Module):
    """A student head, its teacher, and what recycles tiles; a `Learner`.

    Parameters
    ----------
    teacher
        Trained plainly; copied.
    student
        New; takes over the teacher's projection, nothing else.
    spec
        What is masked.
    """

    def __init__(self, teacher: BagHead, student: BagHead, spec: MhimSpec) -> None:
        super().__init__()
        self.head = student
        self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        student.projection.load_state_dict(teacher.projection.state_dict())
        self.recycle = Recycle(student.width, spec.tokens, spec.query_momentum) if spec.tokens else None
        self.spec = spec

    def step(self, h: Tensor, done: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        spec = self.spec
        with torch.no_grad():
            # the same dropout for the scores as for the bag feature: both are of one pass
            with torch.random.fork_rng(devices=[h.device] if h.device.type == "cuda" else []):
                scores = tile_scores(self.teacher, h, spec.edition)
            target = _bag_feature(self.teacher.pool(self.teacher.project(h)))
        f = self.head.project(h)
        f = f[~masked(scores, spec, done, generator).to(f.device)]
        if self.recycle is not None:
            kept = torch.zeros(len(f), dtype=torch.bool)
            kept[torch.randperm(len(f), generator=generator)[: int(len(f) * spec.keep + _ROUNDING)]] = True
            if not kept.all():
                kept = kept.to(f.device)
                f = torch.cat([f[kept], self.recycle(f[~kept])])
        pooled = self.head.pool(f)
        agreement = soft_cross_entropy(_bag_feature(pooled), target)
        return self.head.classify(pooled), spec.alpha * agreement

    @torch.no_grad()
    def stepped(self, done: float) -> None:
        """Move the teacher's parameters (not its buffers) towards the student's."""
        momentum = self.spec.momentum
        if self.spec.momentum_to_one:
            momentum = cosine(momentum, 1.0, done)
        for old, new in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            old.mul_(momentum).add_(new, alpha=1 - momentum)


def _bag_feature(pooled: Any) -> Tensor:
    """`(M,)`, or a row a class."""
    found: Tensor = pooled.bag if isinstance(pooled, Streams) else pooled
    return found
