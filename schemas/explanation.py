"""What is asked of the CAM engine, and what a method or a layer is."""

from __future__ import annotations

from enum import IntFlag
from typing import Literal, Self

from pydantic import Field

from schemas.bag import InsideSpec
from schemas.frozen import Frozen

Need = Literal[
    "activations", "gradients", "tail", "input", "weights", "attention", "slide_reduce", "parts", "forwards", "head"
]  # fmt: skip
"""What a method asks of a network; of a bag head: `parts` (the logits as a sum over tiles), `attention`, `gradients`,
`forwards` (of other bags), `head` (its layers)."""
Unit = Literal["logit", "logit/cell", "score", "score/cell", "1"]
"""A method's table says `logit`; where the network's scores are no logits, its channels say `score`."""
Precision = Literal["fp32", "fast-fp32", "fast-bf16"]
"""The tiers there are; a tier changes the numbers, so it is part of what is hashed."""
AskedPrecision = Literal["fp32", "fast", "fast-fp32", "fast-bf16"]
"""`fast` is the fast tier of the processor at hand."""


class MapFlag(IntFlag):
    """What a tile's raw map must not be read as."""

    EMPTY = 1
    """No cell above 0: no positive evidence."""
    CONSTANT = 2
    """The same value in all of several cells."""
    NOT_FINITE = 4
    """Activations, scores or gradients are NaN or infinite; the whole map is NaN."""
    SINGLE_CELL = 8
    """The layer has one cell: the map says nothing of where."""
    DOUBTFUL = 16
    """Defined, but close to arbitrary; the method's docstring says when."""

    @property
    def label(self) -> str:
        """The flag in words."""
        return str(self.name).lower().replace("_", " ")


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


class Reduction(Frozen):
    """Arrays of a method that sums over all tiles of an image before it explains any; shapes are of one target."""

    collected: tuple[int, ...]
    """Of the sum, which adds up over tiles."""
    state: tuple[int, ...]
    """Of what the sum is solved for."""
    per_target: bool
    """False: the method knows no class, and one of each serves all targets."""


class SolvedState(Frozen):
    """What was solved for one target of such a method, in numbers."""

    method: str
    target: str
    """Empty where one state serves all targets."""
    tiles: int
    """How many tiles entered the sum."""
    planned: int
    explained: float
    """Share of the summed energy that lies in the direction found, 0 to 1."""
    doubtful: bool
    """The direction is close to arbitrary; the method says when."""

    @property
    def line(self) -> str:
        """One line for people."""
        name = f"{self.method}, {self.target}" if self.target else self.method
        made = f"all {self.planned}" if self.tiles == self.planned else f"{self.tiles} of {self.planned}"
        doubt = ": doubtful" if self.doubtful else ""
        return f"{name}: one direction, from {made} tiles, explains {self.explained:.0%} of the energy{doubt}"


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

    @classmethod
    def whole(cls, tile_px: tuple[int, ...]) -> Self:
        """One cell, the tile itself."""
        size = tuple(map(float, tile_px))
        centre = tuple(t / 2 for t in tile_px)
        return cls(shape=(1,) * len(size), cell_px=size, first_centre_px=centre, source="grid")


class CamSpec(Frozen):
    """What is explained and how; hashed into `tiles_id`."""

    methods: tuple[str, ...]
    """Of a bag: inside its tiles; there may be none."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Class names, `predicted`; `all` and indices are resolved to names before a run."""
    layer: str
    cell_centres: Literal["receptive_field", "grid"] = "receptive_field"
    bag_methods: tuple[str, ...] = ()
    """Of a bag: which attribute its decision to the tiles."""
    inside: InsideSpec = InsideSpec()
    precision: Precision = "fp32"
