"""One pass over a batch that serves any number of targets and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from workers.cam.capture import SplitNet
from workers.cam.head import LinearHead, linear_head
from workers.cam.method import Doubt, Method, Solved, Weigh
from workers.cam.methods import method
from workers.cam.noise import NoisyNet
from workers.cam.targets import Target, functionals
from workers.cam.view import Batch, View

TARGETS_AT_ONCE = 64
"""Targets whose channel weights `(B, T, K)` are held together."""
ROUNDING = 1e-6
"""Share of a map's largest value within which its cells are the same; float32 leaves about an eighth of it."""


@dataclass(frozen=True)
class Explained:
    """What one batch gives."""

    scores: Tensor
    """`(B, C)` float32, before any softmax."""
    target_index: Tensor
    """`(B, T)` int32: the class each map explains, or the symbol of a sequence; -1 where it is no single one."""
    maps: dict[str, Tensor]
    """By method: `(B, T, *grid)` float32 (float64 of a network in float64), raw and signed, in the method's unit."""
    flags: dict[str, Tensor]
    """By method: `(B, T)` uint8, bits of `MapFlag`."""


def explain(
    net: SplitNet,
    x: Tensor,
    targets: Sequence[Target],
    methods: Sequence[str],
    seeds: Tensor | None = None,
    gradient_noise: float = 0.0,
    states: Mapping[str, Sequence[Solved]] | None = None,
) -> Explained:
    """Explain a batch by several methods at once.

    One pass through the trunk and at most one gradient of the tail a target, shared by all methods; none where the tail is
    proven to be pooling and a linear layer and the methods can use that. Equal input of equal batch shape gives
    equal bits, whichever other methods are asked for.

    Parameters
    ----------
    net
        The network, split at the layer to explain.
    x
        `(B, C_in, *S)`, as the network expects it.
    targets
        T targets, from `workers.cam.targets.resolve`; or with weights of each tile's own (`TileTarget`).
    methods
        Names of `workers.cam.methods.METHODS`, options included.
    seeds
        `(B,)` int64 for methods that use noise; None: 0, 1, 2...
    gradient_noise
        Above 0: noise is added to every gradient before a method sees it, its standard deviation that share of the
        gradient's own, a function of each tile's seed; to measure robustness. The true gradient is then taken even
        where the tail is a linear head. Methods that need no gradient, or one at attention
        matrices alone, are not touched.
    states
        Of the methods that need the whole image, from `workers.cam.reduce.solve`: one a target, or one for all.

    Returns
    -------
    Explained
        Scores, target indices, maps and flags on the device of `x`, without a graph.

    Raises
    ------
    SpecError
        An unknown method or option, or no target; a method of the whole image without its state.
    ModelError
        The layer cannot be explained (not on the path, no spatial axes), or not by that method.
    """
    rows = {name: method(name) for name in methods}
    if not targets:
        msg = "nothing to explain: no target is given"
        raise SpecError(msg)
    # Whatever mode the caller is in: an inference tensor could not be saved for a gradient.
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x.detach()
        seeds = _seeds(x, seeds)
        if not (gradient_noise and rows):
            return _explain(net, x, targets, rows, seeds, states or {})
        alone = []  # one at a time: a method's noise does not hang on what the others asked before
        for name, row in rows.items():
            asked = NoisyNet(net, gradient_noise, seeds) if "gradients" in row.info.needs else net
            alone.append(_explain(asked, x, targets, {name: row}, seeds, states or {}))
        maps = {name: found for part in alone for name, found in part.maps.items()}
        flags = {name: found for part in alone for name, found in part.flags.items()}
        return replace(alone[0], maps=maps, flags=flags)


def _explain(
    net: SplitNet,
    x: Tensor,
    targets: Sequence[Target],
    rows: dict[str, Method],
    seeds: Tensor,
    states: Mapping[str, Sequence[Solved]],
) -> Explained:
    weighs = any(r.weigh for r in rows.values()) and not isinstance(net, NoisyNet)
    head = linear_head(net, x) if weighs else None
    rest = [r for r in rows.values() if "gradients" in r.info.needs and not (head and r.weigh)]
    batch = Batch(net, x, net.forward(x, differentiable=bool(rest)), seeds)
    if head is not None and not head.speaks_for(batch.a, batch.scores):
        head = None
        batch = Batch(net, x, net.forward(x), batch.seeds)
    by_weight = {n: r.weigh for n, r in rows.items() if r.weigh is not None and head is not None}
    weights, index = functionals(batch.scores, targets, batch.reading.symbols)
    again = any("tail" in r.info.needs for r in rows.values())
    views = [View(batch, w, retain=again or t + 1 < len(weights)) for t, w in enumerate(weights)]

    maps, flags = {}, {}
    for name, row in rows.items():
        if head is not None and name in by_weight:
            raw, doubtful = _weighted_channels(batch.a, head, weights, by_weight[name])
            raw = raw.reshape(*raw.shape[:2], *batch.grid)
        else:
            raw, doubtful = _each_target(row, views, states.get(name, ()))
        sound = batch.sound[:, None]
        valid = sound & raw.isfinite().flatten(2).all(-1)
        if row.info.class_specific and "gradients" in row.info.needs and name not in by_weight:
            valid = valid & torch.stack([v.steady for v in views], dim=1)
            # Contrast in the map of a target that the layer does not move comes from the method, not from the target.
            blind = torch.stack([v.blind for v in views], dim=1)
            doubtful = doubtful | (blind & (raw.flatten(2) != 0).any(-1))
        raw = raw.to(batch.a.dtype)
        maps[name] = torch.where(valid.view(*valid.shape, *(1,) * len(raw.shape[2:])), raw, torch.nan)
        flags[name] = _flags(raw.flatten(2), valid, doubtful)
    return Explained(batch.scores.float(), index, maps, flags)


def _seeds(x: Tensor, seeds: Tensor | None) -> Tensor:
    return torch.arange(len(x)) if seeds is None else seeds.cpu()


def _each_target(row: Method, views: Sequence[View], states: Sequence[Solved]) -> tuple[Tensor, Tensor]:
    """Maps `(B, T, *grid)` and doubt `(B, T)`, a target after the other."""
    done: list[tuple[Tensor, Doubt]] = []
    for t, view in enumerate(views):
        if done and not row.info.class_specific:
            done.append(done[0])
        elif row.slide is not None and states:
            raw = row.slide.project(view, states[t].state.to(view.a.device), row.options)
            done.append((raw, torch.full_like(raw[:, 0], states[t].doubtful, dtype=torch.bool)))
        else:
            done.append(row.raw(view, row.options))
    raw = torch.stack([m.detach() for m, _ in done], dim=1)
    doubtful = torch.stack(
        [raw.new_zeros(len(raw), dtype=torch.bool) if d is None else d for _, d in done], 1
    )
    return raw if row.place else raw.reshape(*raw.shape[:2], *views[0].grid), doubtful


def _weighted_channels(
    a: Tensor, head: LinearHead, targets: Sequence[Tensor], weigh: Weigh
) -> tuple[Tensor, Tensor]:
    """Maps `(B, T, Z)` and doubt `(B, T)` of all targets at once, from the head's weights."""
    raws, doubts = [], []
    for first in range(0, len(targets), TARGETS_AT_ONCE):
        some = targets[first : first + TARGETS_AT_ONCE]
        n = max(len(t) for t in some)
        g = torch.stack([head.gradient(t, a.shape[-1]).expand(n, -1) for t in some], dim=1)
        weights, doubtful = weigh(a, g)
        if len(weights) == 1:
            raws.append(torch.einsum("tk,bkz->btz", weights[0], a))
        else:
            raws.append(torch.matmul(weights, a))
        none = torch.zeros(len(a), len(some), dtype=torch.bool, device=a.device)
        doubts.append(none if doubtful is None else none | doubtful)
    return torch.cat(raws, dim=1), torch.cat(doubts, dim=1)


def _flags(raw: Tensor, valid: Tensor, doubtful: Tensor) -> Tensor:
    """Flags `(B, T)` of raw maps `(B, T, Z)`."""
    low, high = raw.aminmax(dim=-1)
    single = torch.full_like(valid, raw.shape[-1] == 1)
    flags = torch.zeros_like(valid, dtype=torch.uint8)
    for flag, where in (
        (MapFlag.EMPTY, valid & (high <= 0)),
        (MapFlag.CONSTANT, valid & (high - low <= ROUNDING * torch.maximum(low.abs(), high.abs())) & ~single),
        (MapFlag.NOT_FINITE, ~valid),
        (MapFlag.SINGLE_CELL, single),
        (MapFlag.DOUBTFUL, valid & doubtful),
    ):
        flags |= where.to(torch.uint8) * int(flag)
    return flags
