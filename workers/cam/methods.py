"""The table of CAM methods: every family's rows, by name."""

from __future__ import annotations

import difflib

from schemas.errors import SpecError
from workers.cam import (
    ablation,
    attention,
    cfcam,
    doei,
    eigen,
    eigen_slide,
    fem,
    finer,
    fullgrad,
    gradient,
    guided,
    kernel,
    layers,
    meta,
    normgrad,
    path,
    score,
    smooth,
)
from workers.cam.method import Method

METHODS: dict[str, Method] = {
    row.info.name: row
    for family in (
        gradient,
        smooth,
        path,
        finer,
        guided,
        fullgrad,
        eigen,
        eigen_slide,
        normgrad,
        layers,
        meta,
        cfcam,
        fem,
        kernel,
        score,
        ablation,
        attention,
        doei,
    )
    for row in family.METHODS
}
"""Every method by name. `signed` False: never negative on non-negative activations (a ReLU layer)."""


def method(name: str) -> Method:
    """The row of `name` or `name+option=value+...`; SpecError, with near names, if there is none."""
    bare, *given = name.split("+")
    if bare not in METHODS:
        near = difflib.get_close_matches(bare, METHODS, n=3)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        msg = f"{name}: unknown; {meant}`gigacam methods` lists every method"
        raise SpecError(msg)
    pairs = [option.partition("=") for option in given]
    if not all(key and mark and value for key, mark, value in pairs):
        msg = f"{name}: options are written name+key=value+key=value"
        raise SpecError(msg)
    return METHODS[bare].with_options({key: value for key, _, value in pairs})
