"""How the raw values of a finished heatmap are spread, and how many px have one: one pass, a shard at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import Coverage
from workers.stitching.grid import all_blocks, block_box
from workers.store.heatmap import HeatmapStore


@dataclass
class Spread:
    """Of one channel, over all evaluated px of level 0."""

    edges: NDArray[np.float64]
    """`(bins + 1,)`."""
    counts: NDArray[np.int64] = field(init=False)
    """`(bins,)`; what lies beyond the edges is counted in the outermost bins."""
    number: int = 0
    total: float = 0.0
    above: int = 0
    """How many are above zero."""
    below: int = 0
    low: float = np.inf
    high: float = -np.inf

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else float("nan")

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the finite ones of `values`."""
        found = values[np.isfinite(values)].astype(np.float64)
        if not found.size:
            return
        self.counts += np.histogram(found.clip(self.edges[0], self.edges[-1]), self.edges)[0]
        self.number += found.size
        self.total += float(found.sum())
        self.above += int((found > 0).sum())
        self.below += int((found < 0).sum())
        self.low, self.high = min(self.low, float(found.min())), max(self.high, float(found.max()))


def spreads(
    heatmap: HeatmapStore, edges: Sequence[NDArray[np.float64]]
) -> tuple[tuple[Spread, ...], dict[str, dict[Coverage, int]]]:
    """Count raw values and coverage codes over level 0.

    Parameters
    ----------
    edges
        Bin edges of each channel, ascending.

    Returns
    -------
    spreads
        One a channel.
    coverage
        By label (`coverage`, `inside`): how many px carry each code that occurs.
    """
    grid, info = heatmap.grid, heatmap.info
    found = tuple(Spread(np.asarray(e, np.float64)) for e in edges)
    codes = {label: np.zeros(len(Coverage), np.int64) for label in info.labels}
    for block in all_blocks(grid, 0):
        start, stop = block_box(grid, 0, block).tolist()
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        evaluated = {}
        for label, counts in codes.items():
            here = np.bincount(np.asarray(heatmap.label(label, 0)[region]).ravel(), minlength=len(Coverage))
            counts += here
            evaluated[label] = bool(here[Coverage.EVALUATED])
        for c, (channel, spread) in enumerate(zip(info.channels, found, strict=True)):
            if evaluated[info.label_of(channel)]:  # most of a slide is glass: nothing is read there
                spread.add(np.asarray(heatmap.image(0)[(c, *region)]))
    return found, {
        label: {code: int(counts[code]) for code in Coverage if counts[code]}
        for label, counts in codes.items()
    }
