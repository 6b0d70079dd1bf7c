"""The table of bag methods: what each tile gave to the logits of its bag.

Each row is one function of a `BagView` that gives `(N, T)`, a column a target. Attention and probabilities are unsigned: they
say where a head looked, not what for. All others are in the unit of the bag's logit, positive for the target and
negative against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from schemas.errors import ModelError
from schemas.explanation import MethodInfo, Need, Unit
from workers.cam.bag import BagView
from workers.cam.bag_relevance import LrpOptions, lrp
from workers.cam.method import Options, configured, find

Facts = dict[str, Tensor]
"""Numbers that a method says of the whole bag, `(T,)` each."""

Run = Callable[[BagView, Any], tuple[Tensor, Facts]]
"""(bag and targets, options) -> `(N, T)`, NaN where a tile has no value; facts."""


@dataclass(frozen=True)
class Attributed:
    """What one method gives of one bag."""

    relevance: Tensor
    """`(N, T)` float32, in the method's unit."""
    facts: dict[str, tuple[float, ...]]
    """Of the whole bag, a number a target."""


@dataclass(frozen=True)
class BagMethod:
    """One row of the table."""

    info: MethodInfo
    run: Run
    options: Options = field(default_factory=Options)

    def with_options(self, given: dict[str, str]) -> BagMethod:
        """Set some options; the name then says so, the same way whatever the order they came in."""
        info, options = configured(self.info, self.options, given)
        return replace(self, info=info, options=options)

    def check(self, head: Any) -> None:
        """ModelError, before any work, where the head lacks what this method needs."""
        ways = {"parts": ("parts",), "attention": ("attention", "parts"), "instances": ("instances", "parts")}
        name = self.info.name.partition("+")[0]
        needed = ways["instances"] if name == "instance_probability" else ways.get(self.info.needs[0], ())
        if needed and not any(hasattr(head, n) for n in needed):
            able = [
                n for n, row in BAG_METHODS.items() if row.info.needs[0] in ("gradients", "forwards", "head")
            ]
            msg = (
                f"bag method {name!r} needs a head with {' or '.join(f'{n}()' for n in needed)}, which "
                f"{type(head).__name__} has not: its logits are no such sum over tiles. Use {', '.join(able)}"
            )
            raise ModelError(msg)


def attribute(bag: BagView, methods: Sequence[str]) -> dict[str, Attributed]:
    """Attribute a bag's logits to its tiles by several methods.

    Parameters
    ----------
    bag
        Head, features and targets.
    methods
        Names of `BAG_METHODS`, options included (`lrp+rule=epsilon`).

    Returns
    -------
    dict of Attributed
        By method. The same numbers whichever other methods are asked for.

    Raises
    ------
    SpecError
        An unknown method or option.
    ModelError
        The head lacks what a method needs; said before any is run.
    """
    rows = {name: bag_method(name) for name in methods}
    for row in rows.values():
        row.check(bag.head)
    found = {}
    # slopes first: they read the bag once for all
    for name, row in sorted(rows.items(), key=lambda item: "gradients" not in item[1].info.needs):
        relevance, facts = row.run(bag, row.options)
        found[name] = Attributed(relevance.float(), {k: tuple(v.tolist()) for k, v in facts.items()})
    return {name: found[name] for name in rows}


def bag_method(name: str) -> BagMethod:
    """The row of `name` or `name+option=value+...`; SpecError, with near names, if there is none."""
    return find(BAG_METHODS, name, f"bag methods are {', '.join(BAG_METHODS)}")


def attention(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """How much each tile counts (Ilse et al., ICML 2018); each column sums to 1 where the head's attention does.

    A head with an attention a class gives that of the target's class, of a contrast the mean over its classes.
    """
    share = bag.wide.abs() / bag.wide.abs().sum(1, keepdim=True)
    if bag.sums is not None:
        return bag.sums.attention @ share.T, {}
    if hasattr(bag.head, "attention"):
        found = bag.quietly(bag.head.attention).double().T
    else:
        assert bag.parts is not None
        found = bag.parts.attention.double().T
    return (found @ share.T if found.shape[1] > 1 else found.expand(-1, len(share))), {}


def shares(bag: BagView) -> Tensor:
    """`(N, C)` float64: what each tile adds to each logit."""
    if bag.sums is not None:
        return bag.sums.attention * bag.sums.evidence
    assert bag.parts is not None
    p = bag.parts
    return p.attention.T.double() * (p.values @ p.weight.T).double()


def contribution(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """`e_ic = a_i (v_i . w_c)`: exact, its sum is the logit without the bias; attention is no variable here.

    Facts: `bias`, the bias of the target.
    """
    bias = bag.sums.bias if bag.sums is not None else bag.parts.bias.double() if bag.parts else None
    assert bias is not None
    return shares(bag) @ bag.wide.T, {"bias": bag.wide @ bias}


def instance_probability(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """The class probability that a tile's own logits stand for (MHIM-MIL v2 takes its maximum over classes).

    The tile's own logits are its contributions where the head has parts, without the bias; else those of its instance
    classifier (DSMIL).
    """
    if bag.has_parts:
        return probabilities(shares(bag), bag.wide), {}
    return probabilities(bag.quietly(bag.head.instances).double(), bag.wide), {}


def probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability `(..., T)` of targets `(T, C)` given logits `(..., C)`.

    Of one class among several its softmax; of a contrast, and of a single logit, the logistic function of the target.
    """
    either = (logits @ targets.T).sigmoid()
    one = (targets == 1).any(1) & ((targets != 0).sum(1) == 1)
    if targets.shape[1] == 1:
        return either
    return torch.where(one, logits.softmax(-1) @ targets.T, either)


def gradient_input(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """`h_i . dy/dh_i`, attention and all (Shrikumar et al., 2016)."""
    return bag.slope(), {}


class PathOptions(Options):
    """Where the path begins, and in how many points it is walked."""

    baseline: Literal["zero", "mean"] = "zero"
    """No feature at all; or every tile like the bag's mean."""
    steps: int = Field(default=32, ge=1, le=1024)


def integrated_gradients(bag: BagView, options: PathOptions) -> tuple[Tensor, Facts]:
    """`(h_i - b) .` the gradient's mean on the line from the baseline (Sundararajan et al., ICML 2017); Gauss-Legendre.

    Facts: `gap`, what the tiles' sum lacks of `y(h) - y(baseline)`; many steps bring it to 0.
    """
    base = torch.zeros(1, bag.h.shape[1], dtype=bag.dtype, device=bag.device)
    if options.baseline == "mean":
        base = bag.h.mean(0, keepdim=True, dtype=torch.float64).to(base)
    points, weights = np.polynomial.legendre.leggauss(options.steps)
    found = torch.zeros(len(bag), len(bag.wide), dtype=torch.float64, device=bag.device)
    for point, weight in zip(points, weights, strict=True):
        found += weight / 2 * bag.slope((1 + point) / 2, base)
    rise = bag.wide @ (bag.logits - bag.forward(base.expand(len(bag), -1)))
    return found, {"gap": rise - found.sum(0)}


def keep_one(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """The target of a bag of this tile alone."""
    if bag.sums is not None:
        return (bag.sums.evidence + bag.sums.bias) @ bag.wide.T, {}
    return bag.forwards(h[None] for h in bag.h) @ bag.wide.T, {}


def drop_one(bag: BagView, _: Any) -> tuple[Tensor, Facts]:
    """How far the target falls when this tile is taken out; NaN where it is the only one."""
    if bag.sums is not None:
        without = bag.sums.without_each.mean + bag.sums.bias
    elif len(bag) == 1:
        without = bag.logits * math.nan
    else:
        without = bag.forwards(torch.cat([bag.h[:i], bag.h[i + 1 :]]) for i in range(len(bag)))
    return (bag.logits - without) @ bag.wide.T, {}


def _row(
    name: str, title: str, run: Run, unit: Unit, needs: Need, citation: str, *, edition: str = "",
    signed: bool = True, class_specific: bool = True, options: Options | None = None,
) -> BagMethod:  # fmt: skip
    options = options or Options()
    info = MethodInfo(
        name=name, title=title, needs=(needs,), unit=unit, signed=signed, class_specific=class_specific,
        citation=citation, edition=edition, options=options.text(every=True),
    )  # fmt: skip
    return BagMethod(info, run, options)


ROWS = (
    _row(
        "attention", "Attention", attention, "1", "attention", "Ilse et al., Attention-based Deep MIL, ICML 2018",
        edition="unsigned: no evidence for a class", signed=False, class_specific=False,
    ),
    _row(
        "instance_probability", "Instance probability", instance_probability, "1", "parts",
        "Tang et al., Multiple Instance Learning Framework with Masked Hard Instance Mining, IJCV 2025",
        edition="per class; unsigned", signed=False,
    ),
    _row(
        "contribution", "Contribution", contribution, "logit", "parts",
        "Javed et al., Additive MIL, NeurIPS 2022", edition="attention times a tile's own logit; sums to the logit minus its bias",
    ),
    _row(
        "gradient_input", "Gradient x input", gradient_input, "logit", "gradients",
        "Shrikumar et al., Not Just a Black Box, arXiv:1605.01713", edition="through attention too",
    ),
    _row(
        "integrated_gradients", "Integrated gradients", integrated_gradients, "logit", "gradients",
        "Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017",
        edition="Gauss-Legendre points", options=PathOptions(),
    ),
    _row(
        "lrp", "LRP", lrp, "logit", "head", "Hense et al., xMIL, NeurIPS 2024",
        edition="attention constant; RelP's rules for norms, activations and products; biases take their share",
        options=LrpOptions(),
    ),
    _row(
        "keep_one", "Keep one", keep_one, "logit", "forwards", "Early et al., Model Agnostic Interpretability for MIL, ICLR 2022",
        edition="the logit of a bag of this tile alone",
    ),
    _row(
        "drop_one", "Drop one", drop_one, "logit", "forwards", "Early et al., Model Agnostic Interpretability for MIL, ICLR 2022",
        edition="logit with this tile minus logit without",
    ),
)  # fmt: skip

BAG_METHODS: dict[str, BagMethod] = {row.info.name: row for row in ROWS}
"""Every bag method by name."""
