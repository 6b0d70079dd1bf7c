"""The stitched heatmap: what is asked, its coverage codes, its channels."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

from pydantic import Field

from schemas.explanation import Unit
from schemas.frozen import Frozen


class Coverage(IntEnum):
    """Why a heatmap pixel has a value or none."""

    PENDING = 0
    EVALUATED = 1
    FAILED = 2
    BACKGROUND = 3
    LEFT_OUT = 4
    OUTSIDE = 5


COVERAGE_MERGE_ORDER = (
    Coverage.EVALUATED,
    Coverage.FAILED,
    Coverage.LEFT_OUT,
    Coverage.BACKGROUND,
    Coverage.PENDING,
    Coverage.OUTSIDE,
)
"""A coarser pixel takes the first of these that any of its children has."""


class TileStatus(IntEnum):
    """State of a tile in a stage's ledger."""

    PENDING = 0
    DONE = 1
    FAILED = 2
    LEFT_OUT = 3


class HeatmapSpec(Frozen):
    """How tile maps become a heatmap; hashed, with `tiles_id`, into `run_id`."""

    downsample: int | None = Field(default=None, ge=1)
    """Level-0 px a heatmap px; None: the largest power of two not above half a CAM cell."""
    importance: Literal["flat", "hann", "gaussian"] = "hann"
    peak: bool = True


class ChannelInfo(Frozen):
    """One heatmap channel: a target explained by a method."""

    method: str
    target: str
    target_index: int | None
    """None where it differs from tile to tile (`predicted`)."""
    unit: Unit
    signed: bool
    bag: bool = False
    """The score of the whole bag of tiles is explained, not each tile's own."""
    bag_method: str = ""
    """Of a channel with one value a tile: the bag method it is by. Maps inside the tiles have none."""
    encoder_unverified: bool = False
    """The features were taken as they are: there was no slide to see whose they are."""
    grid: tuple[int, ...]
    """Native CAM cells a tile, array order."""
    title: str = ""
    edition: str = ""
    """What the method is called, and which variant it is, in words."""

    @property
    def label(self) -> str:
        """What viewers show; a reconstruction, or what rests on unverified features, is never without its mark."""
        mark = " (reconstruction)" if "(reconstruction)" in self.title else ""
        mark += " (encoder unverified)" if self.encoder_unverified else ""
        return f"{self.method}:{self.target}{mark}"


class HeatmapGrid(Frozen):
    """The heatmap's own pixel grid, anchored at level-0 pixel 0; tuples in array order."""

    shape_l0: tuple[int, ...]
    downsample: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    """Shape of each pyramid level, finest first (ceil halves)."""
    chunk: tuple[int, ...]
    shards: tuple[tuple[int, ...], ...]
    """Shard shape of each level."""

    def blocks(self, level: int) -> tuple[int, ...]:
        """Number of blocks (shards) an axis of `level`."""
        return tuple(-(-n // s) for n, s in zip(self.levels[level], self.shards[level], strict=True))
