"""Bag heads by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from schemas.errors import ModelError
from workers.models.heads.abmil import AttentionHead
from workers.models.heads.additive import AdditiveHead
from workers.models.heads.clam import ClamMB, ClamSB
from workers.models.heads.dsmil import DsmilHead
from workers.models.heads.head import BagHead
from workers.models.heads.pooling import MaxHead, MeanHead
from workers.models.heads.transmil import TransmilHead

HEADS: dict[str, Callable[..., BagHead]] = {
    "mean": MeanHead,
    "max": MaxHead,
    "abmil": AttentionHead,
    "abmil_gated": partial(AttentionHead, gated=True),
    "clam_sb": ClamSB,
    "clam_mb": ClamMB,
    "dsmil": DsmilHead,
    "transmil": TransmilHead,
    "additive": AdditiveHead,
    "linear": partial(MeanHead, hidden=0),
}
"""`head(features, classes, **args)`. `linear` is what `workers.models.heads.linear` fits: the mean, and no hidden layer."""


def build_head(name: str, features: int, classes: int, args: Mapping[str, Any] | None = None) -> BagHead:
    """A new head with random weights, in train mode.

    Raises
    ------
    ModelError
        No head of this name, or arguments that it does not take.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(name, HEADS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        msg = f"bag head {name!r} is none of {', '.join(HEADS)}{hint}"
        raise ModelError(msg)
    build = HEADS[name]
    settled = {"features", "classes", *(build.keywords if isinstance(build, partial) else ())}
    known = [p for p in inspect.signature(build).parameters if p not in settled]
    strange = [a for a in args or {} if a not in known]
    if strange:
        msg = (
            f"bag head {name!r} takes no argument {', '.join(strange)}; it takes {', '.join(known) or 'none'}"
        )
        raise ModelError(msg)
    try:
        return build(features, classes, **(args or {}))
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        msg = f"bag head {name!r} cannot be built with args = {dict(args or {})}: {error}"
        raise ModelError(msg) from error
