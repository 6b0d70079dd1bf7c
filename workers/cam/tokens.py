"""Tokens as feature maps: what a transformer's layer gives is laid out as `(B, D, *grid)`, and put back the way it was.

Every CAM method then sees patch tokens as the cells of a map. Class and register tokens come before the patches in all
networks known; they are no place in the tile, by-pass the map as constants, and are put back in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from schemas.errors import ModelError

Layout = Literal["channels_first", "channels_last", "tokens"]

MOST_PREFIX = 9
"""Class and register tokens that are assumed at most (1 + 8) where a card does not say how many there are."""


class Arrangement(NamedTuple):
    """How one layer's output lies."""

    layout: Layout
    prefix: int
    """Tokens before the patches."""
    grid: tuple[int, ...]

    def encode(self, output: Tensor) -> Tensor:
        """`(B, prefix + Z, D)`, `(B, *grid, D)` or `(B, D, *grid)` -> `(B, D, *grid)`, a view."""
        match self.layout:
            case "tokens":
                patches = output[:, self.prefix :].mT
                return patches.reshape(*patches.shape[:2], *self.grid)
            case "channels_last":
                return output.movedim(-1, 1)
            case _:
                return output

    def decode(self, activations: Tensor, output: Tensor) -> Tensor:
        """Activations `(B, D, *grid)` in the layout of `output`, from whose rows come class and register tokens."""
        match self.layout:
            case "tokens":
                return torch.cat([output[:, : self.prefix], activations.flatten(2).mT], dim=1)
            case "channels_last":
                return activations.movedim(1, -1)
            case _:
                return activations


@dataclass(frozen=True)
class TokenLayout:
    """What is said of a layer's layout; what is not said is inferred where only one reading is possible."""

    layout: Layout | Literal[""] = ""
    prefix_tokens: int | None = None
    grid: tuple[int, ...] = ()

    def fit(self, shape: Sequence[int], tile: Sequence[int], layer: str) -> Arrangement:
        """Arrangement of an output of `shape` for tiles of `tile` px.

        Raises
        ------
        ModelError
            The output contradicts what is said, or has several readings; the message says what to write.
        """
        sequence = self.layout == "tokens" or (not self.layout and len(shape) == 3 and len(tile) > 1)
        if not sequence:
            layout = self.layout or "channels_first"
            return Arrangement(layout, 0, tuple(shape[1:-1] if layout == "channels_last" else shape[2:]))
        if len(shape) != 3:
            msg = (
                f"layer {layer!r} gives shape {tuple(shape)}; layout 'tokens' expects (tiles, tokens, channels). Correct "
                "[cam] layout, or leave it out"
            )
            raise ModelError(msg)
        readings = self._readings(shape[1], tile)
        if len(readings) == 1:
            prefix, grid = readings[0]
            return Arrangement("tokens", prefix, grid)
        size = " x ".join(map(str, tile))
        shown = "; or ".join(
            f"{' x '.join(map(str, g))} patches after {p} class or register tokens" for p, g in readings
        )
        found = f"which can be read as {shown}" if readings else self._contradiction()
        msg = (
            f"layer {layer!r} gives {shape[1]} tokens for a tile of {size} px, {found}. Write in the card's [cam]: "
            f"prefix_tokens = <class and register tokens>, token_grid = [<patches an axis, {len(tile)} numbers>], "
            f"so that prefix_tokens + their product = {shape[1]}"
        )
        raise ModelError(msg)

    def _contradiction(self) -> str:
        said = []
        if self.prefix_tokens is not None:
            said.append(f"prefix_tokens = {self.prefix_tokens}")
        if self.grid:
            said.append(f"token_grid = {list(self.grid)}")
        if said:
            return f"which does not go with {' and '.join(said)}"
        return f"which is no grid of square patches and up to {MOST_PREFIX} class and register tokens"

    def _readings(self, tokens: int, tile: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        if self.grid:
            grids = [self.grid] if len(self.grid) == len(tile) else []
        else:
            patches = range(1, min(tile) + 1)
            grids = [tuple(t // p for t in tile) for p in patches if all(t % p == 0 for t in tile)]
            grids = [g for g in grids if math.prod(g) > 1]
        found = [(tokens - math.prod(g), g) for g in grids]
        if self.prefix_tokens is not None:
            return [(p, g) for p, g in found if p == self.prefix_tokens]
        return [(p, g) for p, g in found if 0 <= p <= MOST_PREFIX]


def looks_channels_last(shape: Sequence[int], tile: Sequence[int]) -> bool:
    """Whether `(B, a, b, c)` parts the tile more evenly as `(B, *grid, D)` than as `(B, D, *grid)`."""
    return len(shape) == len(tile) + 2 and _evenness(tile, shape[1:-1]) > _evenness(tile, shape[2:])


def _evenness(tile: Sequence[int], grid: Sequence[int]) -> int:
    if any(t % n for t, n in zip(tile, grid, strict=True)):
        return 0
    return 2 if len({t // n for t, n in zip(tile, grid, strict=True)}) == 1 else 1


AS_FOUND = TokenLayout()
"""Feature maps as they are; a sequence of tokens where only one grid is possible."""
