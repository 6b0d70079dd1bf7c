"""What a map hangs on: the class it is asked about, and small changes of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from skimage.metrics import structural_similarity
from skimage.transform import resize

SSIM_WINDOW = 7
"""Cells on a side of SSIM's window; less where a map has fewer."""


@dataclass(frozen=True)
class Measured:
    """A figure of each map."""

    values: NDArray[np.float64]
    """`(B,)`, NaN where the figure is not defined."""

    @property
    def mean(self) -> float:
        """Over what is finite; NaN if nothing is."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite.mean()) if finite.size else float("nan")

    @property
    def counted(self) -> int:
        return int(np.isfinite(self.values).sum())

    @property
    def left_out(self) -> int:
        return self.values.size - self.counted


@dataclass(frozen=True)
class Robustness:
    """How much of a map is left when its gradients are noised."""

    ssim: Measured
    mse: Measured
    """Of maps scaled so that the undisturbed one spans 0 to 1."""
    changed: int
    """Maps that are not bit-identical; 0 means that the noise never reached them: nothing was tested."""


def rank_correlation(first: NDArray[Any], second: NDArray[Any], shape: tuple[int, ...] = ()) -> Measured:
    """Spearman's correlation of pairs of maps, over all positions.

    Parameters
    ----------
    first, second
        `(B, *grid)` raw signed maps.
    shape
        Where given, maps are resized to it first, linearly along each axis, with the edges of cells on the edges of pixels.

    Returns
    -------
    Measured
        NaN where one of the two is constant or not finite: it has no order.
    """
    return Measured(
        np.array([_spearman(_sized(a, shape), _sized(b, shape)) for a, b in zip(first, second, strict=True)])
    )


def class_sensitivity(maps: NDArray[Any], scores: NDArray[Any], shape: tuple[int, ...] = ()) -> Measured:
    """Rank correlation of each tile's map for its highest and for its lowest class (Rebuffi et al., CVPR 2020).

    1: the map does not know which class was asked for. 0: the two are unrelated. Below 0: what speaks for one class
    speaks against the other; of one logit, whose classes are `+y` and `-y`, a method linear in `y` gives -1 by
    construction.

    Parameters
    ----------
    maps
        `(B, T, *grid)`, one for each class in order; of a one-logit network `-y`, then `+y`.
    scores
        `(B, C)`; C = T, or 1 for a one-logit network.
    shape
        The tile's size: maps are resized to it, as published.
    """
    b, t = maps.shape[:2]
    if t < 2 or scores.shape not in ((b, t), (b, 1)) or (scores.shape[1] == 1 and t != 2):
        msg = f"class_sensitivity: maps {maps.shape}, scores {scores.shape}; expected a map for each class"
        raise ValueError(msg)
    both = np.concatenate([-scores, scores], axis=1) if scores.shape[1] == 1 else scores
    rows = np.arange(b)
    return rank_correlation(maps[rows, both.argmax(1)], maps[rows, both.argmin(1)], shape)


def robustness(maps: NDArray[Any], noisy: NDArray[Any]) -> Robustness:
    """Likeness of maps with and without noise on the gradients.

    Parameters
    ----------
    maps, noisy
        `(B, *grid)` raw maps. Both of a pair are scaled by the range of the undisturbed one, so that figures of methods
        with other units can be compared.

    Returns
    -------
    Robustness
        SSIM with a uniform window, MSE; NaN where the undisturbed map is constant or either is not finite.
    """
    ssim, mse = np.full(len(maps), np.nan), np.full(len(maps), np.nan)
    for i, (a, b) in enumerate(zip(maps.astype(np.float64), noisy.astype(np.float64), strict=True)):
        low, high = a.min(), a.max()
        if not (np.isfinite(b).all() and low < high):  # false of NaN too
            continue
        a, b = (a - low) / (high - low), (b - low) / (high - low)
        side = min(*a.shape, SSIM_WINDOW)
        side -= 1 - side % 2
        if side > 1:
            ssim[i] = structural_similarity(a, b, win_size=side, data_range=1.0)  # type: ignore[no-untyped-call]
        mse[i] = np.mean((a - b) ** 2)
    same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(maps, noisy, strict=True)]
    return Robustness(Measured(ssim), Measured(mse), len(same) - sum(same))


def _sized(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    if not shape or values.shape == shape:
        return values
    sized = resize(values, shape, order=1, mode="edge", anti_aliasing=False)  # type: ignore[no-untyped-call]
    return np.asarray(sized, np.float64)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """NaN where there is no order; the warning-free way."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    ranks = [stats.rankdata(v.ravel()) for v in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
