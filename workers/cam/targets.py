"""Which score is explained: names resolved once, then one gather a batch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.model import OutputSpec

ALL_LIMIT = 8
"""Without a default target, a model of at most so many classes has all of them explained."""


@dataclass(frozen=True)
class ResolvedTarget:
    """One class, or the predicted one, of a network's output.

    Attributes
    ----------
    name
        The class's name, or `predicted`.
    index
        The class; None for `predicted`, which differs from row to row.
    single_logit
        The network has one logit `y` for two classes: class 1 is explained by `y`, class 0 by `-y`.
    """

    name: str
    index: int | None
    single_logit: bool = False


def resolve(names: Sequence[str], output: OutputSpec, n_outputs: int) -> tuple[ResolvedTarget, ...]:
    """Resolve target names against what the network puts out.

    Parameters
    ----------
    names
        Class names, decimal class indices, `predicted`, `all`. Empty: the card's `default_target`, else all classes
        where there are at most 8.
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
        A name or index that is no class; nothing asked and too many classes to take all.
    ModelError
        The card's classes do not fit the number of outputs.
    """
    classes = _classes(output, n_outputs)
    single = output.kind == "logit"
    if not names:
        if not output.default_target and len(classes) > ALL_LIMIT:
            msg = (
                f"no target is named, the model card has no default_target, and {len(classes)} classes are more than "
                f"{ALL_LIMIT}: name the classes to explain, or 'predicted', or 'all'"
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
            if output.kind == "regression":
                msg = "target 'predicted' asks for a class, but the card's output kind is 'regression'; name an output"
                raise SpecError(msg)
            found[ResolvedTarget("predicted", None, single)] = None
        else:
            found[ResolvedTarget(*_find(name, classes), single)] = None
    return tuple(found)


def _classes(output: OutputSpec, n_outputs: int) -> list[tuple[str, int]]:
    """Name and index of everything that can be explained."""
    if output.kind in ("embedding", "mask"):
        msg = f"output kind {output.kind!r} has no class scores to explain; expected logits, logit or regression"
        raise SpecError(msg)
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
    return [(n, i) for i, n in enumerate(output.classes or [str(i) for i in range(n_outputs)])]


def _find(name: str, classes: list[tuple[str, int]]) -> tuple[str, int]:
    for known, index in classes:
        if name == known:
            return known, index
    if name.isdecimal() and int(name) < len(classes):
        return classes[int(name)]
    known_names = [n for n, _ in classes]
    near = difflib.get_close_matches(name, known_names, n=3) or known_names[:10]
    msg = (
        f"--target {name}: no class of this model; expected a name ({', '.join(near)}), an index below "
        f"{len(classes)}, 'predicted' or 'all'"
    )
    raise SpecError(msg)


def functionals(scores: Tensor, targets: Sequence[ResolvedTarget]) -> tuple[list[Tensor], Tensor]:
    """Each target as a linear function of the scores, and the class it explains.

    Parameters
    ----------
    scores
        `(B, C)` before any softmax, without a graph.
    targets
        T resolved targets.

    Returns
    -------
    weights
        T tensors `(1, C)`, or `(B, C)` where rows differ: the scalar to explain is `(scores * weights).sum(1)`.
    index
        `(B, T)` int32 class indices.
    """
    index = torch.stack([_index(scores, t) for t in targets], dim=1)
    weights = []
    for i, target in enumerate(targets):
        of = index[:1, i] if target.index is not None else index[:, i]
        weight = scores.new_zeros(len(of), scores.shape[1])
        if target.single_logit:
            weight[:, 0] = 2 * of - 1
        else:
            weight.scatter_(1, of[:, None], 1)
        weights.append(weight)
    return weights, index.to(torch.int32)


def _index(scores: Tensor, target: ResolvedTarget) -> Tensor:
    if target.index is not None:
        return torch.full((len(scores),), target.index, dtype=torch.long, device=scores.device)
    return (scores[:, 0] > 0).long() if target.single_logit else scores.argmax(1)
