"""Boxes: half-open, integer, in array order, each saying its frame."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from schemas.frozen import Frozen

Frame = Literal["l0", "lv", "hm"]
"""l0: level-0 pixels; lv: pixels of the level read; hm: heatmap pixels."""


class Box(Frozen):
    """A half-open box `[start, stop)` in array order `(y, x)` or `(z, y, x)`."""

    frame: Frame
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if len(self.start) != len(self.stop) or not 2 <= len(self.start) <= 3:
            msg = f"a box has 2 or 3 axes, the same for start and stop; found {self.start} and {self.stop}"
            raise ValueError(msg)
        if any(b <= a for a, b in zip(self.start, self.stop, strict=True)):
            msg = f"a box needs stop > start on every axis; found {self.start} and {self.stop}"
            raise ValueError(msg)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def intersects(self, other: Box) -> bool:
        """Whether the two boxes of one frame share a pixel."""
        if self.frame != other.frame:
            msg = f"boxes of frames {self.frame!r} and {other.frame!r} cannot be compared"
            raise ValueError(msg)
        return all(
            a < d and c < b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )
