"""How well a map finds what is known to be there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def auroc(score: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting one half.

    Parameters
    ----------
    score
        `(N,)` finite values; only their order counts. Pick the evaluated pixels (coverage 1) first.
    positive
        `(N,)` bool truth.

    Returns
    -------
    0 to 1, by ranks (Mann-Whitney U); NaN where one of the two classes is absent.

    Raises
    ------
    ValueError
        Shapes differ, or a score is not finite: nobody looked there, so it has no rank.
    """
    if score.ndim != 1 or score.shape != positive.shape:
        msg = f"auroc: score {score.shape} and positive {positive.shape}; expected two vectors of one length"
        raise ValueError(msg)
    if not np.isfinite(score).all():
        msg = (
            f"auroc: {int((~np.isfinite(score)).sum())} of {score.size} scores are not finite; leave them out"
        )
        raise ValueError(msg)
    truth = positive.astype(np.bool_)
    positives = int(truth.sum())
    negatives = truth.size - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_sum = float(stats.rankdata(score)[truth].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
