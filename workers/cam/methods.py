"""The table of CAM methods: every family's rows, by name."""

from __future__ import annotations

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
    lrp,
    meta,
    normgrad,
    path,
    score,
    smooth,
)
from workers.cam.method import Method, find

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
        lrp,
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
    return find(METHODS, name, "`gigacam methods` lists every method")
