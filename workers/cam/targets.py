"""Which score is explained: names resolved once, then one linear function of the scores a target.

Written
-------
`NAME` or `INDEX`
    One score: a class, a regression output, a reference vector, a position of a sequence.
`A~B`
    A contrast: what speaks for A rather than B, `y_A - y_B`.
`minus~A`
    `-y_A`: what lowers a regression output, what speaks against a class. A map of its own, since most methods treat positive
    and negative evidence differently.
`predicted`
    Each tile's own class.
`sum`
    Of a sequence: all its symbols together.
`all`
    Every single score.

No class may be called `minus`, `predicted` or `all`, or have a `~` in its name (`schemas.model.OutputSpec`).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.model import BETWEEN, MINUS, OutputSpec

ALL_LIMIT = 8
"""Without a default target, a model of at most so many classes has all of them explained."""


@dataclass(frozen=True)
class ResolvedTarget:
    """A linear function of a network's scores: one of them, or a few with weights.

    Attributes
    ----------
    name
        As it can be asked for again.
    index
        The class it speaks for; None for `predicted`, which differs from row to row; -1 where it is no single one.
    single_logit
        The network has one logit `y` for two classes: class 1 is explained by `y`, class 0 by `-y`.
    terms
        (column, weight) of the scores it adds; empty: the column `index` alone.
    """

    name: str
    index: int | None
    single_logit: bool = False
    terms: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class TileTarget:
    """A linear function of the scores that differs from tile to tile.

    Of an encoder whose scores are its embedding, with `workers.cam.bag.bag_gradient` as weights: the bag's own number, so
    that the maps of all tiles are in its unit and comparable.
    """

    name: str
    weights: Tensor
    """`(B, C)`, a row a tile of the batch."""
    index: int = -1
    """The class of the bag it speaks for; -1 where it is no single one."""


Target = ResolvedTarget | TileTarget


def resolve(names: Sequence[str], output: OutputSpec, n_outputs: int) -> tuple[ResolvedTarget, ...]:
    """Resolve target names against what the network puts out.

    Parameters
    ----------
    names
        As in the module's table. Empty: the card's `default_target`, else all where there are at most 8.
    output
        The card's `[output]`.
    n_outputs
        Columns of the network's scores.

    Returns
    -------
    tuple of ResolvedTarget
        Each target once, in the order asked.

    Raises
    ------
    SpecError
        A name or index that there is not; nothing asked and too many to take all.
    ModelError
        The card's classes do not fit the number of outputs.
    """
    classes = _classes(output, n_outputs)
    single = output.kind == "logit"
    if not names:
        if not output.default_target and len(classes) > ALL_LIMIT:
            msg = (
                f"no target is named, the model card has no default_target, and {len(classes)} {output.each} are more "
                f"than {ALL_LIMIT}: name those to explain, or 'all'"
            )
            raise SpecError(msg)
        names = (output.default_target or "all",)
    found: dict[ResolvedTarget, None] = {}
    for name in names:
        if name == "all":
            # A card that names only the positive class of a single logit means that one by "all".
            listed = [c for c in classes if not single or len(output.classes) == 2 or c[1] == 1]
            found.update({ResolvedTarget(n, i, single): None for n, i in listed})
        elif name == "predicted":
            if output.kind not in ("logits", "logit"):
                msg = (
                    f"target 'predicted' asks for a class, but the card's output kind is {output.kind!r}; "
                    f"name one of the {output.each}"
                )
                raise SpecError(msg)
            found[ResolvedTarget("predicted", None, single)] = None
        elif name == "sum" and output.kind == "sequence":
            found[ResolvedTarget("sum", -1, terms=tuple((i, 1.0) for _, i in classes))] = None
        elif BETWEEN in name:
            found[_difference(name, output, classes)] = None
        else:
            found[ResolvedTarget(*_find(name, output, classes), single)] = None
    return tuple(found)


def score_names(output: OutputSpec, n_outputs: int) -> tuple[str, ...]:
    """The name of each column of the scores; of a single logit, that of its positive class."""
    names = class_names(output, n_outputs)
    return names[1:] if output.kind == "logit" else names


def class_names(output: OutputSpec, n_outputs: int) -> tuple[str, ...]:
    """The name of every score that can be explained, by its index; of a single logit, those of both classes."""
    return tuple(name for name, _ in _classes(output, n_outputs))


def predicted_name(scores: Tensor, output: OutputSpec) -> str:
    """The class that the scores `(C,)` predict, by name; empty where they are no classes."""
    if output.kind not in ("logits", "logit"):
        return ""
    (target,) = resolve(("predicted",), output, len(scores))
    index = int(_index(scores[None], target))
    # By its place: asked for as a target, an index may be another class's name.
    return class_names(output, len(scores))[index]


def _classes(output: OutputSpec, n_outputs: int) -> list[tuple[str, int]]:
    """Name and index of every score that can be explained."""
    if output.kind == "logit":
        if n_outputs != 1:
            msg = f"output kind 'logit' means one score a tile; the network gives {n_outputs}"
            raise ModelError(msg)
        match output.classes:
            case ():
                named = ("0", "1")
            case (positive,):
                named = (f"not {positive}", positive)
            case _:
                named = (output.classes[0], output.classes[1])
        return list(zip(named, (0, 1), strict=True))
    if output.classes and len(output.classes) != n_outputs:
        msg = (
            f"the card names {len(output.classes)} classes ({', '.join(output.classes[:10])}), the network gives "
            f"{n_outputs} scores a tile; correct [output] classes or the network's arguments"
        )
        raise ModelError(msg)
    prefix = "symbol " if output.kind == "sequence" else ""
    return [(n, i) for i, n in enumerate(output.classes or [f"{prefix}{i}" for i in range(n_outputs)])]


def _difference(name: str, output: OutputSpec, classes: list[tuple[str, int]]) -> ResolvedTarget:
    """`A~B` or `minus~A`."""
    first, _, second = name.partition(BETWEEN)
    if first == MINUS:
        bare, index = _find(second, output, classes)
        # one logit against the positive class is that for the negative one
        terms = ((0, 1.0 - 2 * index),) if output.kind == "logit" else ((index, -1.0),)
        return ResolvedTarget(f"{MINUS}{BETWEEN}{bare}", index, terms=terms)
    if output.kind == "logit":
        msg = (
            f"--target {name}: a single logit is the contrast of its two classes already; ask for one of them"
        )
        raise SpecError(msg)
    (a, plus), (b, minus) = (_find(part, output, classes) for part in (first, second))
    if plus == minus:
        msg = f"--target {name}: a contrast needs two different {output.each}"
        raise SpecError(msg)
    return ResolvedTarget(f"{a}{BETWEEN}{b}", plus, terms=((plus, 1.0), (minus, -1.0)))


def _find(name: str, output: OutputSpec, classes: list[tuple[str, int]]) -> tuple[str, int]:
    for known, index in classes:
        if name == known:
            return known, index
    if name.isdecimal() and int(name) < len(classes):
        return classes[int(name)]
    known_names = [n for n, _ in classes]
    near = difflib.get_close_matches(name, known_names, n=3) or known_names[:10]
    words = {"logits": ", 'predicted'", "logit": ", 'predicted'", "sequence": ", 'sum'"}.get(output.kind, "")
    msg = (
        f"--target {name}: no class of this model; expected a name ({', '.join(near)}), an index below "
        f"{len(classes)}{words}, 'all', a contrast A{BETWEEN}B, or {MINUS}{BETWEEN}A"
    )
    raise SpecError(msg)


def functionals(
    scores: Tensor, targets: Sequence[Target], symbols: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Each target as a linear function of the scores, and the class it explains.

    Parameters
    ----------
    scores
        `(B, C)` before any softmax, without a graph.
    targets
        T targets.
    symbols
        `(B, C)` what each score stands for, where that differs from tile to tile.

    Returns
    -------
    weights
        T tensors `(1, C)`, or `(B, C)` where rows differ: the scalar to explain is `(scores * weights).sum(1)`.
    index
        `(B, T)` int32: class, or symbol; -1 where a target is no single one.

    Raises
    ------
    ModelError
        A tile's own weights are not as many as its scores.
    """
    index = torch.stack([_index(scores, t) for t in targets], dim=1)
    weights = []
    for i, target in enumerate(targets):
        if isinstance(target, TileTarget):
            if target.weights.shape != scores.shape:
                msg = (
                    f"target {target.name!r} has weights of shape {tuple(target.weights.shape)}; expected "
                    f"{tuple(scores.shape)}, as many as the network has scores for these tiles"
                )
                raise ModelError(msg)
            weights.append(target.weights.to(scores))
            continue
        of = index[:1, i] if target.index is not None else index[:, i]
        weight = scores.new_zeros(len(of), scores.shape[1])
        if target.terms:
            columns, factors = zip(*target.terms, strict=True)
            weight[:, list(columns)] = scores.new_tensor(factors)
        elif target.single_logit:
            weight[:, 0] = 2 * of - 1
        else:
            weight.scatter_(1, of[:, None], 1)
        weights.append(weight)
    if symbols is not None:
        index = torch.where(index < 0, index, symbols.gather(1, index.clamp_min(0)))
    return weights, index.to(torch.int32)


def _index(scores: Tensor, target: Target) -> Tensor:
    if target.index is not None:
        return torch.full((len(scores),), target.index, dtype=torch.long, device=scores.device)
    assert isinstance(target, ResolvedTarget)
    return (scores[:, 0] > 0).long() if target.single_logit else scores.argmax(1)
