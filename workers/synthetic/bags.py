"""Toy bags of tile features whose right answer is known: which tiles speak for a class, and which against it.

A tile shows one of ten symbols. Its feature is the symbol's own direction (ten orthonormal ones, the same for every seed of
bags) times `STRENGTH`, plus unit Gaussian noise. The rules by which symbols make a bag's class are those of the xMIL paper's
digit bags (Hense et al., "xMIL: Insightful Explanations for Multiple Instance Learning", NeurIPS 2024), on features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYMBOLS = 10
STRENGTH = 8.0
"""Length of a symbol's direction, in standard deviations of the noise."""
FEATURES = 32
TILES = (20, 60)
"""Least and most tiles of a bag."""
_WORLD = 20
"""Seed of the directions: bags of any seed show the same world, so that a head can be tested on bags of another seed."""


@dataclass(frozen=True)
class ToyBag:
    """A bag, its class, and what each tile says of each class."""

    features: NDArray[np.float32]
    """`(N, D)`."""
    label: int
    evidence: NDArray[np.int8]
    """`(N, C)`: 1 where the tile speaks for the class, -1 against it, 0 neither."""
    kind: NDArray[np.uint8]
    """`(N,)`: the symbol; of `hard_bags` and `block_slides` one of their constants."""
    position: NDArray[np.int64]
    """`(N, 2)` row and column of the tile, all distinct, in row-major order."""


def _presence(symbols: NDArray[np.int64]) -> tuple[int, NDArray[np.int8]]:
    """Class 1 where there is a 9: the assumption of multiple instance learning."""
    nine = (symbols == 9).astype(np.int8)
    return int(nine.any()), np.stack([-nine, nine], 1)


def _majority(symbols: NDArray[np.int64]) -> tuple[int, NDArray[np.int8]]:
    """Class 1 where 4, 6 and 8 outnumber 5, 7 and 9, else class 0: evidence of both signs."""
    sign = np.isin(symbols, (4, 6, 8)).astype(np.int8) - np.isin(symbols, (5, 7, 9)).astype(np.int8)
    return int(sign.sum() > 0), np.stack([-sign, sign], 1)


def _four(symbols: NDArray[np.int64]) -> tuple[int, NDArray[np.int8]]:
    """Class 0: neither 8 nor 9; 1: 8 alone; 2: 9 alone; 3: both."""
    eight, nine = ((symbols == s).astype(np.int8) for s in (8, 9))
    evidence = np.stack([-eight - nine, eight - nine, nine - eight, eight + nine], 1)
    return int(eight.any()) + 2 * int(nine.any()), evidence


def _pairs(symbols: NDArray[np.int64]) -> tuple[int, NDArray[np.int8]]:
    """Class 1 where two neighbours among 0 to 4 are both there; both are evidence, neither alone is."""
    there = np.isin(np.arange(5), symbols)
    partnered = there & (np.append(there[1:], False) | np.append(False, there[:-1]))
    found = np.isin(symbols, np.flatnonzero(partnered)).astype(np.int8)
    return int(found.any()), np.stack([-found, found], 1)


_RULES: dict[str, tuple[int, Callable[[NDArray[np.int64]], tuple[int, NDArray[np.int8]]]]] = {
    "presence": (2, _presence),
    "signed": (2, _majority),
    "four": (4, _four),
    "pairs": (2, _pairs),
}
RULES = tuple(_RULES)
"""What can make a bag's class; see the functions above."""


def toy_bags(rule: str, count: int, *, seed: int, tiles: tuple[int, int] = TILES) -> tuple[ToyBag, ...]:
    """`count` bags by one of `RULES`, classes in turn: bag i is of class i modulo the number of classes.

    The number of tiles is uniform. `signed`: one tile in four is evidence, at random shares of the two signs. Of the others, what
    decides the class is at most one tile in ten, and at least one. No number of tiles or mean length tells the classes apart.
    """
    classes, judge = _RULES[rule]
    directions = _directions(SYMBOLS)
    bags = []
    for i in range(count):
        generator = np.random.default_rng([seed, i])
        n = int(generator.integers(tiles[0], tiles[1] + 1))
        symbols = _symbols(rule, i % classes, n, generator)
        label, evidence = judge(symbols)
        if label != i % classes:
            msg = f"rule {rule!r} made a bag of class {label}, not {i % classes}"
            raise AssertionError(msg)
        noise = generator.standard_normal((n, FEATURES))
        bags.append(_bag(STRENGTH * directions[symbols] + noise, label, evidence, symbols, generator))
    return tuple(bags)


def _symbols(rule: str, label: int, n: int, generator: np.random.Generator) -> NDArray[np.int64]:
    few = max(1, int(generator.integers(1, max(2, n // 10 + 1))))
    background = {"presence": range(9), "signed": range(4), "four": range(8), "pairs": range(5, 10)}[rule]
    symbols = generator.choice(np.array(background), size=n)
    match rule:
        case "presence":
            chosen = [9] * (few * label)
        case "signed":
            marked = max(1, n // 4)
            more = int(generator.integers(marked // 2 + 1, marked + 1))
            signs = [label] * more + [1 - label] * (marked - more)
            chosen = [int(generator.choice((4, 6, 8) if sign else (5, 7, 9))) for sign in signs]
        case "four":
            chosen = [8] * (few * (label & 1)) + [9] * (few * (label >> 1))
        case _:
            first = int(generator.integers(4))
            apart = [(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)][int(generator.integers(6))]
            chosen = list((first, first + 1) if label else apart) * few
    symbols[generator.permutation(n)[: len(chosen)]] = chosen[:n]
    return symbols


REST, EASY, HARD = 0, 1, 2
"""`kind` of a tile of `hard_bags`."""
EASY_SHARE, HARD_SHARE = 0.02, 0.06
EASY_STRENGTH, HARD_STRENGTH, REST_STRENGTH = 6.0, 3.0, 4.0
SHARED = 0.5
"""Cosine between the directions of easy and of hard positives."""


def hard_bags(count: int, *, seed: int, tiles: tuple[int, int] = (150, 250)) -> tuple[ToyBag, ...]:
    """Positive bags with a few easy and more hard positive tiles; odd bags are positive.

    Stated beforehand, for hard-instance mining to be judged by: of a positive bag 2 % of the tiles (at least one) are *easy*,
    `EASY_STRENGTH` standard deviations along one direction; 6 % (at least three) are *hard*, half as strong, along another
    direction at 60 degrees to it. The rest, and all tiles of negative bags, show the other symbols (`REST_STRENGTH`). An easy tile
    alone tells the class of a training bag: a plain head need not learn what a hard one looks like.
    """
    directions = _directions(SYMBOLS)
    easy = directions[9]
    hard = SHARED * directions[9] + np.sqrt(1 - SHARED**2) * directions[8]
    bags = []
    for i in range(count):
        generator = np.random.default_rng([seed, i])
        n = int(generator.integers(tiles[0], tiles[1] + 1))
        kind = np.full(n, REST, np.uint8)
        if i % 2:
            counts = max(1, round(EASY_SHARE * n)), max(3, round(HARD_SHARE * n))
            where = generator.permutation(n)
            kind[where[: counts[0]]] = EASY
            kind[where[counts[0] : sum(counts)]] = HARD
        mean = REST_STRENGTH * directions[generator.integers(8, size=n)]
        mean[kind == EASY] = EASY_STRENGTH * easy
        mean[kind == HARD] = HARD_STRENGTH * hard
        positive = (kind != REST).astype(np.int8)
        features = mean + generator.standard_normal((n, FEATURES))
        bags.append(_bag(features, i % 2, np.stack([-positive, positive], 1), kind, generator))
    return tuple(bags)


BACKGROUND, NULL, SIGNAL = 0, 1, 2
"""`kind` of a tile of `block_slides`."""


def block_slides(
    count: int,
    *,
    seed: int,
    grid: tuple[int, int] = (12, 10),
    signal: int = 6,
    null: int = 6,
    fixed: bool = False,
) -> tuple[ToyBag, ...]:
    """Grids of tiles with `signal` tiles of the class's texture and `null` ones as salient that say nothing; two classes.

    Parameters
    ----------
    grid
        Rows and columns.
    signal, null
        Tiles of each kind.
    fixed
        Signal in the upper half only, null tiles in the lower one; else anywhere.
    """
    directions = _directions(SYMBOLS)
    rows, columns = grid
    cells = rows * columns
    bags = []
    for i in range(count):
        generator = np.random.default_rng([seed, i])
        upper = generator.permutation(rows // 2 * columns)
        lower = generator.permutation(np.arange(rows // 2 * columns, cells))
        where = generator.permutation(cells)
        kind = np.full(cells, BACKGROUND, np.uint8)
        kind[upper[:signal] if fixed else where[:signal]] = SIGNAL
        kind[lower[:null] if fixed else where[signal : signal + null]] = NULL
        label = i % 2
        mean = STRENGTH / 2 * directions[generator.integers(4, size=cells)]
        mean[kind == SIGNAL] = STRENGTH * directions[8 + label]
        mean[kind == NULL] = STRENGTH * directions[7]
        sign = (kind == SIGNAL).astype(np.int8)
        evidence = np.stack([sign, -sign], 1) * (1 - 2 * label)
        features = (mean + generator.standard_normal((cells, FEATURES))).astype(np.float32)
        position = np.stack(np.divmod(np.arange(cells), columns), 1)
        bags.append(ToyBag(features, label, evidence.astype(np.int8), kind, position))
    return tuple(bags)


def _directions(count: int) -> NDArray[np.float64]:
    """`(count, FEATURES)` orthonormal rows."""
    square = np.random.default_rng(_WORLD).standard_normal((FEATURES, FEATURES))
    return np.linalg.qr(square)[0][:count]


def _bag(
    features: NDArray[np.float64],
    label: int,
    evidence: NDArray[np.int8],
    kind: NDArray[Any],
    generator: np.random.Generator,
) -> ToyBag:
    """The tiles on distinct cells of a grid that has room for one and a half times as many."""
    n = len(features)
    side = int(np.ceil(np.sqrt(1.5 * n)))
    cells = np.sort(generator.permutation(side * side)[:n])
    position = np.stack(np.divmod(cells, side), 1).astype(np.int64)
    return ToyBag(features.astype(np.float32), label, evidence, kind.astype(np.uint8), position)
