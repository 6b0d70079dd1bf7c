"""What is asked of the CAM engine, and what a method or a layer is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.frozen import Frozen

Need = Literal["activations", "gradients", "tail", "input", "weights", "attention", "slide_reduce"]
Unit = Literal["logit", "logit/cell", "1"]
Precision = Literal["fp32"]
"""The tiers there are; a tier changes the numbers, so it is part of what is hashed."""


class MethodInfo(Frozen):
    """One row of the method table, without its callable."""

    name: str
    title: str
    needs: tuple[Need, ...]
    unit: Unit
    signed: bool
    class_specific: bool
    citation: str
    edition: str = ""
    options: dict[str, str] = Field(default_factory=dict)
    """Settings it takes, with their defaults as text; asked for as `name+key=value`."""


class CellGeometry(Frozen):
    """Where a layer's cells lie in the network's input, in model px, array order.

    Pixel `i` spans `[i, i + 1)`, so that its centre is `i + 0.5`; cell `k` is centred at
    `first_centre_px + k * cell_px`.
    """

    shape: tuple[int, ...]
    """Cells an axis for the card's tile size."""
    cell_px: tuple[float, ...]
    first_centre_px: tuple[float, ...]
    source: Literal["receptive_field", "grid"]
    """Measured through the network, or a regular grid over the tile."""


class CamSpec(Frozen):
    """What is explained and how; hashed into `tiles_id`."""

    methods: tuple[str, ...] = Field(min_length=1)
    targets: tuple[str, ...] = Field(min_length=1)
    """Class names, `predicted`; `all` and indices are resolved to names before a run."""
    layer: str
    cell_centres: Literal["receptive_field", "grid"] = "receptive_field"
    bag_methods: tuple[str, ...] = ()
    precision: Precision = "fp32"
