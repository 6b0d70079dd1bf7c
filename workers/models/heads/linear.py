"""Linear heads fitted without a training loop: naive Bayes in closed form from counts that merge, logistic regression.

The pair that "Revisiting Discriminative vs. Generative Classifiers" (Zheng et al., ICML 2023) compares. Features are scaled
to [0, 1] by the training data's range; the heads that come out read features as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from schemas.errors import ModelError
from workers.models.heads.pooling import MeanHead

Floats = NDArray[np.float64]

SMOOTHING = 1e-9
"""Added to each class's variance."""
LEAST_VARIANCE = 1e-8
"""Of the scaled feature, pooled over classes; a feature that varies less is left out, its weight would explode."""


@dataclass(frozen=True)
class Moments:
    """What naive Bayes needs to know of samples of each class; a few hundred kilobytes for any number of samples."""

    count: NDArray[np.int64]
    """`(C,)` samples."""
    mean: Floats
    """`(C, D)`; 0 where there is no sample."""
    spread: Floats
    """`(C, D)` sum of squared differences from the mean."""
    low: Floats
    """`(D,)` least value of each feature, over classes."""
    high: Floats
    """`(D,)`."""

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of samples together, by the pooled-variance formula: no rounding by large means."""
        count = self.count + other.count
        share = (other.count / np.maximum(count, 1))[:, None]
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + share * apart,
            spread=self.spread + other.spread + self.count[:, None] * share * apart**2,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
        )


def moments(x: Tensor | NDArray[np.floating], y: NDArray[np.integer], classes: int) -> Moments:
    """Moments of samples `x` `(n, D)` with class indices `y` `(n,)`; parts computed apart are added.

    Raises
    ------
    ModelError
        Values that are not finite, or no class of that index.
    """
    values, labels = _samples(x, y, classes)
    none = np.full(values.shape[1], np.inf)
    found = Moments(
        np.zeros(classes, np.int64),
        np.zeros((classes, values.shape[1])),
        np.zeros((classes, values.shape[1])),
        values.min(0, initial=np.inf) if len(values) else none,
        values.max(0, initial=-np.inf) if len(values) else -none,
    )
    for c in range(classes):
        rows = values[labels == c]
        if len(rows):
            found.count[c] = len(rows)
            found.mean[c] = rows.mean(0)
            found.spread[c] = ((rows - found.mean[c]) ** 2).sum(0)
    return found


def merged(parts: list[Moments]) -> Moments:
    """The sum; the same whatever the order, up to rounding."""
    return reduce(lambda a, b: a + b, parts)


@dataclass(frozen=True)
class LinearFit:
    """`scores = x @ weight.T + bias`, in the features' own units."""

    weight: Floats
    """`(C, D)`; 0 for a feature that was left out."""
    bias: Floats
    """`(C,)`."""
    dropped: tuple[int, ...]
    """Features left out because they hardly vary; to be reported."""

    def head(self) -> MeanHead:
        """The bag head `linear`: the scores of the mean tile, in float32 and eval mode."""
        classes, features = self.weight.shape
        head = MeanHead(features, classes)
        with torch.no_grad():
            head.classifier.weight.copy_(torch.from_numpy(self.weight))
            head.classifier.bias.copy_(torch.from_numpy(self.bias))
        return head.eval()


@dataclass(frozen=True)
class NaiveBayes(LinearFit):
    """Diagonal Gaussians with the variance shared by all classes; the scores are log p(x, c) but for a term without c."""

    mean: Floats = field(repr=False)
    """`(C, D)` of the features as they are."""
    variance: Floats = field(repr=False)
    """`(D,)` shared; infinite for a feature that was left out."""
    prior: Floats = field(repr=False)
    """`(C,)`."""

    def log_odds(self, x: Floats, c: int, other: int) -> Floats:
        """`(n, D)` -> what each feature adds to the log-odds of class `c` against `other`, `(n, D)`.

        With `log(prior[c] / prior[other])` they sum to the log-odds exactly.
        """
        middle = (self.mean[c] + self.mean[other]) / 2
        shares: Floats = (self.mean[c] - self.mean[other]) / self.variance * (x - middle)
        return shares


def naive_bayes(found: Moments) -> NaiveBayes:
    """The closed-form fit; priors are the classes' shares.

    Raises
    ------
    ModelError
        A class without samples, or no feature that varies.
    """
    _check_classes(found.count)
    extent, kept = _extent(found.low, found.high)
    prior = found.count / found.count.sum()
    own = found.spread / found.count[:, None] / extent**2
    pooled = prior @ own
    kept &= pooled >= LEAST_VARIANCE
    _check_kept(kept)
    scaled = np.where(kept, prior @ (own + SMOOTHING), np.inf)
    variance = scaled * extent**2
    middle = prior @ found.mean
    # means are taken from the middle of all samples: the squares of large features would cost the bias its digits
    away = found.mean - middle
    weight = away / variance
    bias = np.log(prior) - 0.5 * (away * weight).sum(1) - weight @ middle
    return NaiveBayes(weight, bias, _dropped(kept), mean=found.mean, variance=variance, prior=prior)


def logistic(
    x: Tensor | NDArray[np.floating],
    y: NDArray[np.integer],
    classes: int,
    *,
    strength: float = 1.0,
    iterations: int = 1000,
) -> LinearFit:
    """Multinomial logistic regression by L-BFGS: `|W|^2 / 2 + strength * sum of the losses`, biases not penalised.

    Parameters
    ----------
    x
        `(n, D)`.
    y
        `(n,)` class indices.
    strength
        The inverse of the L2 penalty's weight, on scaled features.
    iterations
        At most.

    Raises
    ------
    ModelError
        A class without samples, values that are not finite, no feature that varies, or no convergence.
    """
    values, labels = _samples(x, y, classes)
    _check_classes(np.bincount(labels, minlength=classes))
    low = values.min(0)
    extent, kept = _extent(low, values.max(0))
    kept &= (values / extent).var(0) >= LEAST_VARIANCE
    _check_kept(kept)
    scaled = ((values - low) / extent)[:, kept]
    columns = scaled.shape[1]
    wanted = np.eye(classes)[labels]

    def loss(flat: Floats) -> tuple[float, Floats]:
        weight, bias = flat[: classes * columns].reshape(classes, columns), flat[classes * columns :]
        scores = scaled @ weight.T + bias
        logs = scores - logsumexp(scores, axis=1, keepdims=True)
        wrong = strength * (np.exp(logs) - wanted)
        value = 0.5 * (weight**2).sum() - strength * (logs * wanted).sum()
        return float(value), np.concatenate([(weight + wrong.T @ scaled).ravel(), wrong.sum(0)])

    start = np.zeros(classes * (columns + 1))
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-6, "ftol": 1e-14}
    )
    # a line search that can gain nothing more is no success to scipy, though the end is reached
    if not found.success and np.abs(found.jac).max() > 1e-6 * strength * len(values):
        msg = (
            f"logistic regression of {len(values)} samples did not converge in {found.nit} iterations; allow more, or a "
            f"lower strength than {strength:g}"
        )
        raise ModelError(msg)
    weight = np.zeros((classes, values.shape[1]))
    weight[:, kept] = found.x[: classes * columns].reshape(classes, columns) / extent[kept]
    return LinearFit(weight, found.x[classes * columns :] - weight @ low, _dropped(kept))


def _samples(
    x: Tensor | NDArray[np.floating], y: NDArray[np.integer], classes: int
) -> tuple[Floats, NDArray[np.integer]]:
    values = np.asarray(x, np.float64)
    labels = np.asarray(y)
    if values.ndim != 2 or labels.shape != (len(values),):
        msg = f"samples have shape {values.shape} and labels {labels.shape}; expected (n, D) and (n,)"
        raise ModelError(msg)
    if not np.isfinite(values).all():
        msg = f"{int((~np.isfinite(values)).any(1).sum())} of {len(values)} samples hold values that are not finite; leave them out"
        raise ModelError(msg)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        msg = f"labels run from {labels.min()} to {labels.max()}; expected indices of {classes} classes"
        raise ModelError(msg)
    return values, labels


def _check_classes(count: NDArray[np.integer]) -> None:
    if not count.all():
        missing = ", ".join(str(c) for c in np.flatnonzero(count == 0))
        msg = f"no sample of class {missing}; every class needs at least one"
        raise ModelError(msg)


def _check_kept(kept: NDArray[np.bool_]) -> None:
    if not kept.any():
        msg = f"none of {len(kept)} features varies; nothing can be fitted"
        raise ModelError(msg)


def _extent(low: Floats, high: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    kept = high > low
    return np.where(kept, high - low, 1.0), kept


def _dropped(kept: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(~kept))
