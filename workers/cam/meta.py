"""Meta-saliency (Rebuffi et al., CVPR 2020, section 3.5): a map where one step of learning from the tile has been taken.

`theta' = theta - lr * d loss / d theta`, plain SGD over all parameters in eval mode, then any method at `theta'`. First order:
the step itself is not differentiated. A tile at a time, since each tile moves the weights its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from workers.cam.capture import FOLDED, frozen
from workers.cam.method import Doubt, Raw, row
from workers.cam.noise import eager, of_tiles
from workers.cam.normgrad import REBUFFI, NormGradOptions, of_view
from workers.cam.readout import Reading
from workers.cam.view import Batch, View, full


class MetaOptions(NormGradOptions):
    """NormGrad after a step of learning."""

    lr: float = Field(default=0.0025, ge=0, allow_inf_nan=False)
    """Step; the default is that of the authors' experiments, their function's is 1e-4."""
    adversarial: bool = False
    """Step uphill: unlearn the tile."""


@contextmanager
def stepped(module: nn.Module, steps: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters moved by `steps` inside; outside the very tensors that were there, also after an exception.

    Buffers are not touched: the network is in eval mode. Not for concurrent calls on one module.
    """
    found = {p: p.data for p in module.parameters()}
    try:
        for p, step in steps.items():
            p.data = found[p] + step
        yield
    finally:
        for p, data in found.items():
            p.data = data


def loss(view: View, scores: Tensor) -> Tensor:
    """`(B,)` cross-entropy of each tile with its target.

    Of a class among several that of the softmax; of any other functional `y` of the scores (the one logit of two classes,
    a contrast of two) `log(1 + exp(-y))`, the cross-entropy of the two.
    """
    target = view.target
    one_class = (target == 1).sum(1).eq(1) & (target != 0).sum(1).eq(1)
    if target.shape[1] > 1 and bool(one_class.all()):
        return F.cross_entropy(view.reading(scores), target.argmax(1), reduction="none")
    return F.softplus(-view.y(scores))


def gradients(view: View) -> dict[nn.Parameter, Tensor]:
    """Gradient of the loss, summed over the tiles of a view, by the parameters it depends on; those frozen included."""
    net = eager(view.net)
    if net is None:
        msg = "meta-saliency needs the eager network, whose weights it moves, not one cut in two; use method 'normgrad'"
        raise ModelError(msg)
    if any(p.element_size() < 4 for p in net.module.parameters()) or any(
        hasattr(m, FOLDED) for m in net.module.modules()
    ):
        msg = "meta-saliency takes a step from the weights as they were trained: run it in precision fp32, not 'fast'"
        raise ModelError(msg)
    with frozen(net.module):
        parameters = [p for p in net.module.parameters() if p.is_floating_point()]
        try:
            for p in parameters:
                p.requires_grad_(True)
            total = loss(view, net.readout.take(net.module(view.x.clone()), len(view.x))).sum()
            if not (parameters and total.requires_grad):
                msg = "meta-saliency needs scores that depend on parameters; none does (all run under the network's own no_grad)"
                raise ModelError(msg)
            found: Sequence[Tensor | None] = torch.autograd.grad(total, parameters, allow_unused=True)
        finally:
            for p in parameters:
                p.requires_grad_(False)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def after_step(
    view: View, raw: Raw, options: Any, lr: float, *, adversarial: bool = False
) -> tuple[Tensor, Doubt]:
    """Any method after a step of learning from each tile.

    Parameters
    ----------
    view
        The tiles, as the network saw them before.
    raw, options
        The method: a function of the view it is given, without anything known of the network from before.
    lr
        Step; 0 gives the plain map.
    adversarial
        Step uphill.

    Returns
    -------
    map, doubtful
        As the method gives them.
    """
    maps, doubts = [], []
    for b in range(len(view.x)):
        one = _tile(view, b)
        sign = lr if adversarial else -lr
        with stepped(view.net.module, {p: sign * g for p, g in gradients(one).items()}):
            found, doubt = raw(_tile(view, b), options)
            maps.append(found.detach())
            doubts.append(torch.zeros(1, dtype=torch.bool, device=found.device) if doubt is None else doubt)
    return torch.cat(maps), torch.cat(doubts)


def _tile(view: View, b: int) -> View:
    """One tile of a view, run through the network as it is now."""
    x, seeds = view.x[b : b + 1], view.seeds[b : b + 1]
    net = of_tiles(view.net, torch.tensor([b]))
    split = net.forward(x)
    batch = Batch(net, x, split, seeds)
    # A region or a symbol stays what it was before the step: the target does not move.
    batch.reading = Reading(
        lambda output, _: view.reading(output, torch.full((len(output),), b, device=x.device))
    )
    batch.scores = batch.reading(full(split.scores.detach()))
    return View(batch, view.target[b : b + 1])


def order(view: View, raw: Raw, options: Any, lr: float) -> Tensor:
    """`(B,)` correlation of the maps before and after a step: how much of a map is of the first order.

    Low: the step matters to the map. Pearson's, NaN where a map is constant.
    """
    return correlation(raw(view, options)[0], after_step(view, raw, options, lr)[0])


def sign(view: View, raw: Raw, options: Any, lr: float) -> Tensor:
    """`(B,)` correlation of the maps after a step downhill and one uphill: whether a method tells learning from unlearning."""
    down = after_step(view, raw, options, lr)[0]
    return correlation(down, after_step(view, raw, options, lr, adversarial=True)[0])


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation `(B,)` of the rows of two batches of maps, NaN where one is constant."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    flat = (a.amax(1) == a.amin(1)) | (b.amax(1) == b.amin(1))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    found = F.cosine_similarity(a, b, dim=1, eps=0.0)
    return torch.where(flat, torch.nan, found)


def _normgrad(view: View, options: MetaOptions) -> tuple[Tensor, Doubt]:
    return after_step(view, of_view, options, options.lr, adversarial=options.adversarial)


METHODS = (
    row(
        "normgrad_meta", "NormGrad, meta-saliency", _normgrad, "1", REBUFFI, signed=False,
        edition="NormGrad after one SGD step on the tile's cross-entropy, all weights, eval mode; one tile at a time",
        needs=("activations", "gradients", "weights", "input"), options=MetaOptions(),
    ),
)  # fmt: skip
