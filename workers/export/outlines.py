"""Regions of a mask and their outlines along pixel edges. Numerics only: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Ring = NDArray[np.int64]
"""`(n, 2)` corners `(y, x)` in pixel edges, the first not repeated."""


@dataclass(frozen=True)
class Region:
    """A 4-connected region of a mask."""

    pixels: int
    mean: float
    extreme: float
    """Value of largest magnitude."""
    extreme_at: tuple[int, int]
    """Pixel of it."""
    outer: Ring
    holes: tuple[Ring, ...]


def regions(mask: NDArray[np.bool_], values: NDArray[np.float32], most: int) -> tuple[int, Iterator[Region]]:
    """The regions of a mask, strongest first.

    Parameters
    ----------
    mask
        `(H, W)`.
    values
        `(H, W)`, finite where the mask is True.
    most
        How many at most.

    Returns
    -------
    int
        How many there are.
    iterator
        The `most` of largest extreme magnitude; ties by place.
    """
    labels, count = ndimage.label(mask)
    if not count:
        return 0, iter(())
    magnitude = np.zeros(count, np.float32)
    np.maximum.at(magnitude, labels[mask] - 1, np.abs(values[mask]))
    boxes = ndimage.find_objects(labels)
    order = np.argsort(-magnitude, kind="stable")[:most]
    return count, (_region(labels, values, int(i), boxes[i]) for i in order)


def _region(
    labels: NDArray[np.int32], values: NDArray[np.float32], index: int, box: tuple[slice, slice]
) -> Region:
    inside = labels[box] == index + 1
    found = values[box][inside]
    at = int(np.argmax(np.abs(found)))
    start = np.array([box[0].start, box[1].start])
    outer, *holes = (ring + start for ring in rings(inside))
    y, x = (np.argwhere(inside)[at] + start).tolist()
    return Region(
        pixels=int(found.size),
        mean=float(found.mean(dtype=np.float64)),
        extreme=float(found[at]),
        extreme_at=(y, x),
        outer=outer,
        holes=tuple(holes),
    )


def rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """Outlines of a 4-connected region: the outer one first, then its holes.

    Corners only. Where two pixels of the region meet at a corner alone, the outline keeps to the background's side, so that no ring
    touches itself: a hole that meets the outside (or another hole) at a corner touches its ring in that one point, which
    simple features allow.

    Parameters
    ----------
    mask
        `(H, W)` of one region.

    Returns
    -------
    list of NDArray
        The outer ring runs with positive, holes with negative area in `(x, y)` as numbers.
    """
    # A corner of the outline has an arm up or down and an arm left or right; each pixel-edge corner has none, one or two.
    p = np.pad(mask, 1)
    nw, ne, sw, se = p[:-1, :-1], p[:-1, 1:], p[1:, :-1], p[1:, 1:]
    odd = nw ^ ne ^ sw ^ se
    crossed = ~odd & (nw == se) & (nw != ne)
    y, x, south, east = [], [], [], []
    # The quadrant that differs from the three others; of a crossing both quadrants of background.
    for quadrant, down, right in ((nw, False, False), (ne, False, True), (sw, True, False), (se, True, True)):
        total = nw.astype(np.int8) + ne + sw + se
        alone = odd & (quadrant == (total == 1))
        rows, columns = np.nonzero(alone | (crossed & ~quadrant))
        y.append(rows)
        x.append(columns)
        south.append(np.full(len(rows), down))
        east.append(np.full(len(rows), right))
    ys, xs, souths, easts = (np.concatenate(part) for part in (y, x, south, east))
    # Along a row, every right arm meets the next left arm; along a column, every down arm the next up arm.
    beside, below = (_partners(np.lexsort(keys)) for keys in ((easts, xs, ys), (souths, ys, xs)))
    found = []
    todo = np.ones(len(ys), bool)
    next_beside, next_below = beside.tolist(), below.tolist()
    for first in range(len(ys)):
        if not todo[first]:
            continue
        path, at = [], first
        while True:
            path.append(at)
            at = next_beside[at]
            path.append(at)
            at = next_below[at]
            if at == first:
                break
        todo[path] = False
        found.append(np.stack([ys[path], xs[path]], axis=1).astype(np.int64))
    found.sort(key=lambda ring: -abs(area(ring)))
    return [ring if (area(ring) > 0) == (n == 0) else ring[::-1] for n, ring in enumerate(found)]


def _partners(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Who is paired with whom, in a sorted order of pairs."""
    partner = np.empty(len(order), np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def area(ring: NDArray[np.number]) -> float:
    """Signed area of a ring `(n, 2)` of `(y, x)`."""
    y, x = ring[:, 0].astype(np.float64), ring[:, 1].astype(np.float64)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)
