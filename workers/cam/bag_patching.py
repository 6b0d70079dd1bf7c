"""What a bag's logit owes to each tile being as it is, and not as its counterpart in a control.

The true effect runs the head with one tile exchanged; an estimate from one backward pass is the gradient, or the
coefficient of relevance, times the difference (attribution patching; RelP: Jafari et al., 2025). An estimate can miss
a large effect where an activation is flat, hence `agreement` with the true one on a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.errors import ModelError
from workers.cam.bag import BagView
from workers.cam.bag_relevance import coefficients
from workers.cam.bag_sums import Partial
from workers.cam.relevance_rules import LinearRule


def patching(bag: BagView, control: Tensor, tiles: Sequence[int] | None = None) -> Tensor:
    """How far the targets fall when a tile gets the features of its control.

    Parameters
    ----------
    bag
        Head, features and targets.
    control
        `(N, D)`, a counterpart a tile; or `(1, D)`, the same for all.
    tiles
        Those to exchange, one after the other; None: all.

    Returns
    -------
    Tensor
        `(len(tiles), T)` float64 in units of the logit, positive where the tile speaks for the target more than its
        control does.
    """
    control = _like(bag, control)
    rows = torch.arange(len(bag)) if tiles is None else torch.as_tensor(tiles, dtype=torch.long)
    if bag.sums is not None:
        other = BagView(bag.head, control, bag.targets).sums
        assert other is not None
        whole = bag.sums.without_each.joined(
            Partial(other.energies, torch.ones_like(other.energies), other.evidence)
        )
        patched = (whole.mean + bag.sums.bias)[rows]
    else:
        patched = bag.forwards(
            torch.cat([bag.h[:i], control[i : i + 1], bag.h[i + 1 :]]) for i in rows.tolist()
        )
    return (bag.logits - patched) @ bag.wide.T


def estimated_patching(bag: BagView, control: Tensor, rule: LinearRule | None = None) -> Tensor:
    """`patching` of all tiles to first order, `(N, T)` float64: from the gradient, or under a rule of relevance."""
    way = bag.h.double() - _like(bag, control).double()
    slopes = [bag.gradient(t) for t in range(len(bag.targets))] if rule is None else coefficients(bag, rule)
    return torch.stack([(way * slope.double()).sum(1) for slope in slopes], dim=1)


def agreement(bag: BagView, control: Tensor, tiles: Sequence[int], rule: LinearRule | None = None) -> Tensor:
    """Pearson's correlation `(T,)` of the estimate with the true effect, over some tiles; NaN where one is constant."""
    true = patching(bag, control, tiles)
    guess = estimated_patching(bag, control, rule)[torch.as_tensor(tiles, dtype=torch.long)]
    both = torch.stack([true, guess])
    both = both - both.mean(1, keepdim=True)
    size = both.square().sum(1).sqrt()
    return both.prod(0).sum(0) / size.prod(0)


def _like(bag: BagView, control: Tensor) -> Tensor:
    if control.ndim != 2 or control.shape[1] != bag.h.shape[1] or len(control) not in (1, len(bag)):
        msg = (
            f"the control has features of shape {tuple(control.shape)}; expected {tuple(bag.h.shape)}, a counterpart a tile, "
            f"or (1, {bag.h.shape[1]}), the same for all"
        )
        raise ModelError(msg)
    return control.to(bag.h).expand(len(bag), -1)
