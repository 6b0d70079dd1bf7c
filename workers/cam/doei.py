"""DOEI (reconstruction): a transformer's patches are re-weighted by how confident attention and class map agree on them.

Only what the method is for was published in a form that could be read: patch tokens and class attention are amplified where
confident and suppressed where not, progressively over the blocks; colour, embedding and self-attention jointly decide what is
confident; nothing is learned. The equations here are this project's own, and every number is an option.

For blocks `l = 1..L`, with attention averaged over heads, patches `n`, the target's class map `CAM` of the unchanged pass:

- `conf(n) = minmax over n of (attention from the tokens read to n) * max(CAM(n), 0)`;
- `W = w_rgb exp(-|rgb_n - rgb_m|^2 / 2 s^2) + w_emb max(cos(t_n, t_m), 0) + w_att (P_nm + P_mn) / 2`, weights of sum 1, rows
  normalised; `conf~ = W conf`;
- `r = 1 + lam_l` where `conf~` reaches its upper quantile, `1 - lam_l` where it stays within its lower one, else 1, with
  `lam_l = lam l / L`; the attention of the tokens read is multiplied by `r` and normalised again, the block's patch tokens are
  multiplied by `r`;
- the map is `max(CAM', 0)` of the changed pass, averaged twice over what each patch attends to in the last blocks.

The tokens read are found, not assumed (`workers.cam.attention`): with a class token a class, they are that class's own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from workers.cam.attention import attended, patches, read_rows
from workers.cam.capture import HookedNet, Split, swap_first
from workers.cam.method import Options, row
from workers.cam.noise import eager, of_tiles
from workers.cam.softmax import Attending, attention_of
from workers.cam.view import View, full


class DoeiOptions(Options):
    """Every number of the reconstruction."""

    lam: float = Field(0.5, ge=0, le=1)
    """How far patches are re-weighted in the last block."""
    high: float = Field(0.8, ge=0, le=1)
    low: float = Field(0.3, ge=0, le=1)
    """Quantiles at or above, and at or below, which patches are confident, and not."""
    rgb: float = Field(1, ge=0)
    emb: float = Field(1, ge=0)
    att: float = Field(1, ge=0)
    """Weights of colour, embedding and attention in what is alike, before they are scaled to sum 1."""
    sigma: float = Field(0.5, gt=0)
    """Distance of mean colours, in the network's input units, at which they are hardly alike any more."""
    blocks: int = Field(3, ge=1)
    """Last blocks whose attention refines the map."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.low > self.high:
            msg = f"low = {self.low} must not be above high = {self.high}"
            raise ValueError(msg)
        if self.rgb + self.emb + self.att == 0:
            msg = "of rgb, emb and att at least one must be above 0"
            raise ValueError(msg)
        return self


def confidence(attention: Tensor, cam: Tensor) -> Tensor:
    """Attention to the patches times the positive class map, both `(B, Z)`, from 0 to 1 in each tile; 0 where constant."""
    both = attention * cam.relu()
    low, high = both.aminmax(dim=1, keepdim=True)
    return (both - low) / torch.where(high > low, high - low, 1)


def affinity(rgb: Tensor, tokens: Tensor, attention: Tensor, options: DoeiOptions) -> Tensor:
    """How alike patches are, `(B, Z, Z)`, rows of sum 1.

    Parameters
    ----------
    rgb
        `(B, Z, C_in)` mean colour of each patch.
    tokens
        `(B, Z, D)` patch tokens that enter the block.
    attention
        `(B, Z, Z)` patch to patch, mean over heads.
    """
    unit = F.normalize(tokens, dim=-1)
    colour = (
        -torch.cdist(rgb, rgb, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * options.sigma**2)
    ).exp()
    parts = (
        options.rgb * colour,
        options.emb * (unit @ unit.mT).relu(),
        options.att * (attention + attention.mT) / 2,
    )
    alike = sum(parts, start=torch.zeros_like(attention))
    return alike / alike.sum(-1, keepdim=True).clamp_min(torch.finfo(alike.dtype).tiny)


def rating(conf: Tensor, lam: float, options: DoeiOptions) -> Tensor:
    """Factor of each patch from its confidence `(B, Z)`: `1 + lam`, 1 or `1 - lam`; 1 where all are equally confident."""
    high, low = (conf.quantile(q, dim=1, keepdim=True) for q in (options.high, options.low))
    sign = (conf >= high).to(conf) - (conf <= low).to(conf)
    return 1 + lam * sign


class Decoupling:
    """One changed pass: what is done at each attention and each block."""

    def __init__(
        self, depth: int, where: slice, read: Tensor, cam: Tensor, rgb: Tensor, options: DoeiOptions
    ) -> None:
        self._depth, self._where, self._options = depth, where, options
        self._read, self._cam, self._rgb = read, cam, rgb
        self._tokens = read.new_empty(0)
        self.ratings: list[Tensor] = []
        """`(B, Z)` a block."""
        self.attention: list[Tensor] = []
        """`(B, Z, Z)` a block, patch to patch, as the network went on with it."""

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a block: keep the tokens it is given."""
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        self._tokens = full(first.detach())

    def attend(self, probabilities: Tensor) -> Tensor:
        """At its attention `(B, heads, N, N)`: rate the patches, and look at them accordingly."""
        mean = full(probabilities.detach()).mean(1)
        to_patches = torch.einsum("bi,bij->bj", self._read, mean)[:, self._where]
        alike = affinity(
            self._rgb, self._tokens[:, self._where], mean[:, self._where, self._where], self._options
        )
        conf = torch.einsum("bnm,bm->bn", alike, confidence(to_patches, self._cam))
        rated = rating(conf, self._options.lam * (len(self.ratings) + 1) / self._depth, self._options)
        self.ratings.append(rated)
        factor = torch.ones_like(self._read)
        factor[:, self._where] = rated
        weighted = probabilities * factor[:, None, None].to(probabilities)
        weighted = weighted / weighted.sum(-1, keepdim=True)
        # rows that nothing changes keep their bits
        changed = (self._read > 0)[:, None, :, None] & (rated != 1).any(1)[:, None, None, None]
        used = torch.where(changed, weighted, probabilities)
        self.attention.append(full(used.detach()).mean(1)[:, self._where, self._where])
        return used

    def leave(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        """After the block: its patch tokens by their rating."""

        def rated(tokens: Tensor) -> Tensor:
            patch = tokens[:, self._where] * self.ratings[-1][..., None].to(tokens)
            return torch.cat([tokens[:, : self._where.start], patch], dim=1)

        return swap_first(output, rated, type(module).__name__)


def changed_pass(
    net: HookedNet, x: Tensor, where: slice, read: Tensor, cam: Tensor, options: DoeiOptions
) -> tuple[Split, Decoupling]:
    """The network run on `x` with its patches re-weighted.

    Parameters
    ----------
    where
        The patches among the tokens.
    read
        `(B, N)` weights of the tokens read.
    cam
        `(B, Z)` the target's class map of the unchanged pass.
    """
    attention = attention_of(net, x)
    blocks = attention.block_modules(net.module)
    pools: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    rgb = full(pools[x.ndim - 3](x, net.arrangement(x).grid)).flatten(2).mT
    state = Decoupling(len(blocks), where, read, cam, rgb, options)
    with ExitStack() as stack:
        for block in blocks:
            for handle in (
                block.register_forward_pre_hook(state.enter, with_kwargs=True),
                block.register_forward_hook(state.leave),
            ):
                stack.callback(handle.remove)
        stack.enter_context(Attending(len(x), state.attend))
        return net.forward(x), state


def doei(view: View, options: DoeiOptions) -> tuple[Tensor, None]:
    """DOEI (reconstruction); the module says how."""
    attention = attention_of(view.net, view.x)
    where = patches(view, attention)
    net = eager(view.net)
    assert net is not None  # or `attention_of` has refused it
    before = (view.g * view.a).sum(1)
    found = []
    for rows in attention.chunks(len(view.x)):
        rows = rows.to(view.x.device)
        _, gradients = attended(view, rows, view.target)
        x = view.x[rows]
        split, state = changed_pass(net, x, where, read_rows(gradients[-1]), before[rows], options)
        with torch.enable_grad():
            y = view.y(split.scores, rows)
        g = full(of_tiles(view.net, rows).grad(y, split.activations)).flatten(2)
        cam = (g * full(split.activations.detach()).flatten(2)).sum(1).relu()
        mean = torch.stack(state.attention[-options.blocks :]).mean(0)
        mean = mean / mean.sum(-1, keepdim=True)
        found.append(torch.einsum("bnm,bmk,bk->bn", mean, mean, cam))
    return torch.cat(found), None


METHODS = (
    row(
        "doei", "DOEI (reconstruction)", doei, "1",
        "after Zhu et al., DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps, "
        "arXiv:2502.15885, 2025", signed=False,
        edition="reconstruction: every equation and number is this project's own, not the paper's; before scaling by its maximum",
        needs=("activations", "gradients", "attention"), options=DoeiOptions(),
    ),
)  # fmt: skip
