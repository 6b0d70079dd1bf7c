"""Names in published checkpoints, and what they are here: nothing is renamed or left out but by a rule that is listed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from schemas.errors import ModelError

Names = tuple[tuple[str, str | None], ...]
"""Patterns of whole keys of published checkpoints, without `module.`, and what they are in the network; None: not part of
the prediction, left out."""


def renamed(state: Mapping[str, Tensor], published: Names, owner: str) -> dict[str, Tensor]:
    """A published state dict under the names of `owner`; what no rule knows keeps its own, less `module.` anywhere.

    Raises
    ------
    ModelError
        Two entries that mean the same.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _named(key, published)
        if name is None:
            continue
        if name in found:
            msg = f"the checkpoint has {name!r} of {owner} twice, the second time as {key!r}; expected once"
            raise ModelError(msg)
        found[name] = value
    return found


def _named(key: str, published: Names) -> str | None:
    plain = re.sub(r"(^|\.)(?:module\.)+", r"\1", key)
    for pattern, name in published:
        if match := re.fullmatch(pattern, plain):
            return name and match.expand(name)
    return plain


def without(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """A state dict less the entries that begin with one of `prefixes`.

    Raises
    ------
    ModelError
        A prefix that no entry has.
    """
    if idle := [p for p in prefixes if not any(key.startswith(p) for key in state)]:
        shown = ", ".join(sorted({key.partition(".")[0] for key in state}))
        msg = f"[network] leave_out = {list(prefixes)}: no entry of the checkpoint begins with {', '.join(idle)}; they begin with {shown}"
        raise ModelError(msg)
    return {key: value for key, value in state.items() if not key.startswith(tuple(prefixes))}
