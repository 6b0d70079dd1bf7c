"""Methods that need the whole image: sums over its tiles, solved once, and the state that explaining then uses.

`collect` adds up over tiles, in whichever batches they come; `solve` turns the sum over all of them into a state a
target; `workers.cam.explain.explain` takes the states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import Reduction
from workers.cam.capture import SplitNet
from workers.cam.method import Method, Slide, Solved
from workers.cam.methods import method
from workers.cam.targets import ResolvedTarget, functionals
from workers.cam.view import Batch, View


def slide_method(name: str) -> tuple[Method, Slide]:
    """A method's row and its parts for the whole image; SpecError where it needs none."""
    row = method(name)
    if row.slide is None:
        msg = f"method {name!r} explains each tile by itself: there is nothing to sum over the image"
        raise SpecError(msg)
    return row, row.slide


def reductions(net: SplitNet, x: Tensor, methods: Sequence[str]) -> dict[str, Reduction]:
    """By method, of those of `methods` that need the whole image: the arrays they sum and solve.

    Parameters
    ----------
    net
        The network, split at the layer to explain.
    x
        `(B, C_in, *S)`, any tile; only its shape counts.
    methods
        Names of `workers.cam.methods.METHODS`, options included.
    """
    rows = {name: method(name) for name in methods}
    found = {}
    channels = net.trunk(x).shape[1] if any(r.slide for r in rows.values()) else 0
    for name, row in rows.items():
        if row.slide is not None:
            collected, state = row.slide.shapes(channels)
            found[name] = Reduction(collected=collected, state=state, per_target=row.info.class_specific)
    return found


def collect(
    net: SplitNet,
    x: Tensor,
    targets: Sequence[ResolvedTarget],
    methods: Sequence[str],
    rows: Sequence[int],
    seeds: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a batch adds to the sums over its image.

    Parameters
    ----------
    net
        The network, split at the layer to explain.
    x
        `(B, C_in, *S)`, as the network expects it.
    targets
        T targets, from `workers.cam.targets.resolve`.
    methods
        Names of methods that need the whole image, options included.
    rows
        Tiles of the batch that count, in the order in which they are added. Of these, one whose activations,
        scores or gradients are not finite is left out: explaining it will fail.
    seeds
        `(B,)` int64, as in `explain`.

    Returns
    -------
    dict
        By method: float64 `(T, *sum)`, or `(1, *sum)` where the method knows no class, on the device of `x`.
    """
    known = {name: slide_method(name) for name in methods}
    differentiable = any("gradients" in row.info.needs for row, _ in known.values())
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x.detach()
        seeds = torch.arange(len(x)) if seeds is None else seeds.cpu()
        batch = Batch(net, x, net.forward(x, differentiable=differentiable), seeds)
        weights, _ = functionals(batch.scores, targets, batch.reading.symbols)
        views = [View(batch, w, retain=t + 1 < len(weights)) for t, w in enumerate(weights)]
        sound = batch.sound.tolist()
        rows = [r for r in rows if sound[r]]
        sums = {}
        for name, (row, slide) in known.items():
            parts = []
            for view in views if row.info.class_specific else views[:1]:
                kept = rows
                if "gradients" in row.info.needs:
                    finite = view.steady.tolist()
                    kept = [r for r in rows if finite[r]]
                parts.append(slide.collect(view, kept, row.options))
            sums[name] = torch.stack(parts)
        return sums


def solve(name: str, sums: Tensor) -> tuple[Solved, ...]:
    """Solve a method's sums `(T or 1, *sum)` over a whole image, one target after the other."""
    row, slide = slide_method(name)
    return tuple(slide.solve(total, row.options) for total in sums)
