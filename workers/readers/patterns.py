"""The functions behind `procedural:` images: position and seed in, value out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Coordinates = Sequence[NDArray[np.float64]]
"""Pixel centres an axis in level-0 px, array order; the pixels are their grid."""


@dataclass(frozen=True)
class Pattern:
    """`values(centres) -> (C, *shape)` with what a reader has to say about it."""

    channels: int
    dtype: str
    background: float
    values: Callable[[Coordinates], NDArray[Any]]


def hash_unit(*keys: NDArray[np.int64] | int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) from integer keys (broadcast together): splitmix64's finaliser, chained."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = state + np.asarray(key, dtype=np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    unit: NDArray[np.float32] = (state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return unit


def coordinates(shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    """Channels are the pixel centre's own level-0 coordinates: x, y(, z)."""

    def values(centres: Coordinates) -> NDArray[np.float32]:
        grids = np.meshgrid(*(c.astype(np.float32) for c in centres), indexing="ij")
        return np.stack(grids[::-1])

    return Pattern(len(shape), "float32", 0.0, values)


def constant_slide(shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    """One tissue-like colour everywhere."""

    def values(centres: Coordinates) -> NDArray[np.uint8]:
        colour = np.array([200, 120, 160], dtype=np.uint8)
        return np.tile(colour[:, None, None], (1, len(centres[0]), len(centres[1])))

    return Pattern(3, "uint8", 255.0, values)


def constant_volume(shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    """100 everywhere."""

    def values(centres: Coordinates) -> NDArray[np.float32]:
        return np.full((1, *map(len, centres)), 100.0, dtype=np.float32)

    return Pattern(1, "float32", 0.0, values)


BLOB_CELL_PX = (64, 4096)
"""Smallest and largest cell of the lattice that blobs of tissue stand on."""
BLOB_RADIUS = (0.34, 0.46)
"""Radius of a blob in cells, uniform."""
BLOB_JITTER = 0.04
"""Largest offset of a blob's centre; radius + jitter stay within half a cell, so that a pixel asks one cell only."""
NUCLEUS_CELL_PX = 16
PINK = np.array([231, 176, 208], dtype=np.float32)
PURPLE = np.array([104, 66, 148], dtype=np.float32)
WHITE = 244.0


def he(shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    """H&E-like: round blobs of pink tissue with purple nuclei on near-white glass.

    About `tissue` of the area is blob (above one half: everything that is not a blob).
    """
    cell = min(max(min(shape) // 8, BLOB_CELL_PX[0]), BLOB_CELL_PX[1])
    low, high = BLOB_RADIUS
    filled = math.pi * (low * low + low * high + high * high) / 3
    inverted = tissue > 0.5
    share = (1 - tissue if inverted else tissue) / filled

    def is_tissue(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
        rows, at_y, in_y = _cells(y, cell)
        cols, at_x, in_x = _cells(x, cell)
        r, c = rows[:, None], cols[None, :]
        # A Weyl sequence rather than a coin a cell: few blobs still come to nearly the area asked for.
        turn = hash_unit(np.array([seed]), 1)
        present = np.mod(r * 0.7548776662466927 + c * 0.5698402909980532 + turn, 1.0) < share
        radius = np.where(present, (low + (high - low) * hash_unit(r, c, seed, 2)) * cell, 0).astype(
            np.float32
        )
        if not radius.any():
            return np.full((len(y), len(x)), inverted)
        cy = (0.5 + BLOB_JITTER * (2 * hash_unit(r, c, seed, 3) - 1)) * cell
        cx = (0.5 + BLOB_JITTER * (2 * hash_unit(r, c, seed, 4) - 1)) * cell
        if radius.size == 1:  # the common case: the whole read lies in one cell
            inside = (in_y - cy)[0, :, None] ** 2 + (in_x - cx)[0, None, :] ** 2 < radius**2
        else:
            pick = np.ix_(at_y, at_x)
            inside = (in_y[:, None] - cy[pick]) ** 2 + (in_x[None, :] - cx[pick]) ** 2 < radius[pick] ** 2
        result: NDArray[np.bool_] = inside != inverted
        return result

    def values(centres: Coordinates) -> NDArray[np.uint8]:
        y, x = centres
        out = np.full((3, len(y), len(x)), WHITE, dtype=np.uint8)
        mask = is_tissue(y, x)
        if not mask.any():
            return out
        rows, at_y, in_y = _cells(y, NUCLEUS_CELL_PX)
        cols, at_x, in_x = _cells(x, NUCLEUS_CELL_PX)
        r, c = rows[:, None], cols[None, :]
        radius = 3 + 3 * hash_unit(r, c, seed, 5)
        cy, cx = (5 + 6 * hash_unit(r, c, seed, k) for k in (6, 7))
        dark = 0.6 + 0.4 * hash_unit(r, c, seed, 8)
        pick = np.ix_(at_y, at_x)
        distance = np.hypot(in_y[:, None] - cy[pick], in_x[None, :] - cx[pick])
        nucleus = np.clip(radius[pick] - distance, 0, 1) * dark[pick]
        fibres = np.sin(y * 0.041).astype(np.float32)[:, None] + np.sin(x * 0.023).astype(np.float32)[None, :]
        for channel in range(3):
            stroma = PINK[channel] + 6 * fibres
            colour = stroma + nucleus * (PURPLE[channel] - stroma)
            out[channel] = np.where(mask, colour, WHITE)
        return out

    return Pattern(3, "uint8", 255.0, values)


def body(shape: tuple[int, ...], seed: int, tissue: float) -> Pattern:
    """A bright ellipsoid with bands and darker balls on a dark ground (0), values up to about 200."""
    centre = [n / 2 for n in shape]
    radii = [max(0.4 * n, 0.5) for n in shape]
    cell = max(4, min(shape) // 6)

    def values(centres: Coordinates) -> NDArray[np.float32]:
        axes = [c.astype(np.float32) for c in centres]
        z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
        r2 = sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radii, strict=True))
        bands = 10 * (np.sin(z * 0.19) + np.sin(y * 0.13) + np.sin(x * 0.11))
        keys = [_cells(c, cell) for c in centres]
        ids = [k[0].reshape([-1 if i == j else 1 for j in range(3)]) for i, k in enumerate(keys)]
        ball = (hash_unit(ids[0], ids[1], ids[2], seed) * 0.45 * cell)[np.ix_(*(k[1] for k in keys))]
        offsets = [
            k[2].reshape([-1 if i == j else 1 for j in range(3)]) - cell / 2 for i, k in enumerate(keys)
        ]
        distance = np.sqrt(offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2)
        inside = 150 + bands - 60 * np.clip(ball - distance, 0, 1)
        return np.where(r2 < 1, inside, 0).astype(np.float32)[None]

    return Pattern(1, "float32", 0.0, values)


def _cells(
    position: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Distinct cells along an axis, each position's index into them, and its offset within its cell."""
    cell = np.floor_divide(position, size).astype(np.int64)
    distinct, index = np.unique(cell, return_inverse=True)
    return distinct, index, (position - cell * size).astype(np.float32)


Maker = Callable[[tuple[int, ...], int, float], Pattern]
PATTERNS: dict[str, dict[str, Maker]] = {
    "slide": {"he": he, "coordinates": coordinates, "constant": constant_slide},
    "volume": {"body": body, "coordinates": coordinates, "constant": constant_volume},
}
