"""A bag of tiles under one head: which of them are explained inside, and what came of the bag."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from schemas.errors import SpecError
from schemas.frozen import Frozen


class InsideSpec(Frozen):
    """Which tiles of a bag are explained inside; hashed into `tiles_id`."""

    top: float = Field(default=1.0, ge=0, le=1)
    """Share of the bag: the tiles of largest relevance, by magnitude."""
    sample: float = Field(default=0.0, ge=0, le=1)
    """Share of the bag besides: drawn at random from the rest, to audit the choice."""
    attention: Literal["through", "constant"] = "through"
    """Whether a tile's share of the slide's score counts how the attention would turn: `through` is the gradient of the score,
    all of it; `constant` that of what the tiles contribute under the attention they have."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Unset, `attention` is left out: earlier results were identified without it."""
        found: dict[str, Any] = dump(self)
        if self.attention == "through":
            del found["attention"]
        return found

    @classmethod
    def parse(cls, text: str) -> Self:
        """`all`, `none`, `0.1` or `0.1+0.02`: the top share, and a random sample of the rest; any may end in `,constant`."""
        text, comma, attention = text.partition(",")
        if comma:
            if attention != "constant":
                msg = f"--inside {text},{attention}: after the comma expected constant, which holds the attention constant"
                raise SpecError(msg)
            return cls.parse(text).model_copy(update={"attention": "constant"})
        if text in ("all", "none"):
            return cls(top=float(text == "all"))
        number = r"(0(?:\.\d+)?|\.\d+|1(?:\.0*)?)"
        found = re.fullmatch(rf"{number}(?:\+{number})?", text)
        if found is None:
            msg = f"--inside {text}: expected all, none, a share of the bag such as 0.1, or 0.1+0.02 with a random sample"
            raise SpecError(msg)
        return cls(top=float(found[1]), sample=float(found[2] or 0))

    def __str__(self) -> str:
        """As `parse` reads it."""
        held = ",constant" if self.attention == "constant" else ""
        if not self.sample:
            return {1.0: "all", 0.0: "none"}.get(self.top, f"{self.top:g}") + held
        return f"{self.top:g}+{self.sample:g}{held}"

    @property
    def every(self) -> bool:
        """Whether no tile is left out."""
        return self.top == 1

    @property
    def some(self) -> bool:
        """Whether any tile is explained inside."""
        return self.top > 0 or self.sample > 0


class AttributeTask(Frozen):
    """Run the head on a whole bag, and attribute its decision to the tiles."""

    @property
    def key(self) -> str:
        return "bag"


class BagReport(Frozen):
    """The bag that was predicted, which is the one explained."""

    classes: tuple[str, ...]
    logits: tuple[float, ...]
    """Of the head, one a class, before any softmax."""
    predicted: str
    """Class of the bag; empty where the outputs are no classes."""
    target_index: tuple[int, ...]
    """The class that each target explains; -1 where it is no single one."""
    tiles: int
    """How many tiles are in the bag, in the order of the plan."""
    planned: int
    inside: int
    """How many of them are explained inside for their relevance."""
    sampled: int
    """How many besides, drawn at random."""
    facts: dict[str, dict[str, tuple[float, ...]]] = Field(default_factory=dict)
    """By bag method, what it says of the whole bag, a number a target: `bias`, `cls`, `gap`..."""
    encoder: str
    """How the features are known to be this encoder's."""

    @property
    def line(self) -> str:
        """One line for people."""
        scores = ", ".join(
            f"{name} {value:.4g}" for name, value in zip(self.classes, self.logits, strict=True)
        )
        made = f"all {self.planned}" if self.tiles == self.planned else f"{self.tiles} of {self.planned}"
        said = f"{self.predicted}: " if self.predicted else ""
        return f"bag of {made} tiles: {said}{scores}"
