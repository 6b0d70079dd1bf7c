"""How well a classifier's scores tell slides apart, with intervals from resampling patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.metrics.localisation import auroc

LEVEL = 0.95
"""Share of the resampled values that an interval covers."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its percentile bootstrap interval."""

    value: float
    low: float
    high: float
    """NaN where fewer than half of the resamples have the figure at all."""
    resamples: int
    """That have it: one without both classes has no AUROC."""


def auprc(score: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve as average precision: sum over thresholds of (gain of recall) x precision.

    Parameters
    ----------
    score
        `(N,)` finite values; tied ones cross the threshold together.
    positive
        `(N,)` bool truth.

    Returns
    -------
    0 to 1, for scores without meaning about the share of positives; NaN where there is no positive.

    Raises
    ------
    ValueError
        Shapes differ, or a score is not finite.
    """
    if score.ndim != 1 or score.shape != positive.shape or not np.isfinite(score).all():
        msg = f"auprc: score {score.shape} and positive {positive.shape}; expected two vectors of one length, finite"
        raise ValueError(msg)
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    hits = np.cumsum(positive[order], dtype=np.int64)[last]
    precision = hits / (last + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


def accuracy(probability: NDArray[Any], label: NDArray[np.int64]) -> float:
    """Share of `(N, C)` rows whose highest class is the label; the first one of tied classes."""
    return float((probability.argmax(1) == label).mean())


def balanced_accuracy(probability: NDArray[Any], label: NDArray[np.int64]) -> float:
    """Mean over classes of the share found; NaN where a class has no case."""
    hit = probability.argmax(1) == label
    shares = [hit[label == c].mean() if (label == c).any() else np.nan for c in range(probability.shape[1])]
    return float(np.mean(shares))


def _one_against_rest(
    area: Callable[[NDArray[Any], NDArray[np.bool_]], float],
) -> Callable[[NDArray[Any], NDArray[np.int64]], float]:
    """Of two classes the second against the first; of more, the mean over each against the rest."""

    def measure(probability: NDArray[Any], label: NDArray[np.int64]) -> float:
        classes = probability.shape[1]
        chosen = [1] if classes == 2 else range(classes)
        return float(np.mean([area(probability[:, c], label == c) for c in chosen]))

    return measure


METRICS: dict[str, Callable[[NDArray[Any], NDArray[np.int64]], float]] = {
    "auroc": _one_against_rest(auroc),
    "auprc": _one_against_rest(auprc),
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
}
"""`(N, C)` probabilities and `(N,)` classes -> one figure."""


def evaluate_classifier(
    probability: NDArray[Any],
    label: NDArray[np.int64],
    patient: NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every metric over slides, with 95 % percentile intervals from resampling *patients* with replacement.

    Slides of one patient are not independent; an interval from resampled slides would be too narrow.

    Parameters
    ----------
    probability
        `(N, C)`, C of at least 2.
    label
        `(N,)` 0 to C - 1.
    patient
        `(N,)` whose slide it is.
    resamples, seed
        Of the bootstrap.

    Raises
    ------
    ValueError
        The shapes do not fit each other.
    """
    n = len(label)
    if probability.ndim != 2 or probability.shape[1] < 2 or {len(probability), len(patient)} != {n} or not n:
        msg = f"probability {probability.shape}, label {label.shape}, patient {patient.shape}; expected (N, C >= 2), (N,), (N,)"
        raise ValueError(msg)
    _, whose = np.unique(patient, return_inverse=True)
    slides = [np.flatnonzero(whose == p) for p in range(whose.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(resamples):
        rows = np.concatenate([slides[p] for p in generator.integers(len(slides), size=len(slides))])
        for name, metric in METRICS.items():
            drawn[name].append(metric(probability[rows], label[rows]))
    found = {}
    for name, metric in METRICS.items():
        finite = np.array(drawn[name])[np.isfinite(drawn[name])]
        enough = finite.size > 0 and 2 * finite.size >= resamples
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        low, high = np.quantile(finite, tails) if enough else (np.nan, np.nan)
        found[name] = Estimate(metric(probability, label), float(low), float(high), finite.size)
    return found
