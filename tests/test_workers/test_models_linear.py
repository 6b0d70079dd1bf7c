"""Naive Bayes and logistic heads: the closed form by hand, parts that merge, the true densities, complete explanations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import norm

from schemas.errors import ModelError
from workers.models.heads.linear import SMOOTHING, Floats, logistic, merged, moments, naive_bayes

CLASSES = 3


def samples(n: int = 300, features: int = 5, shift: float = 0.0) -> tuple[Floats, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.concatenate([np.arange(CLASSES), rng.choice(CLASSES, n - CLASSES, p=[0.2, 0.5, 0.3])])
    centres = rng.normal(size=(CLASSES, features))
    return shift + (centres[y] + rng.normal(size=(n, features))) * np.geomspace(0.1, 30, features), y


def test_two_classes_one_feature_by_hand() -> None:
    x = np.array([[-1.0], [1.0], [0.0], [2.0]])
    fit = naive_bayes(moments(x, np.array([0, 0, 1, 1]), 2))
    # means 0 and 1, variance 1, equal priors; the smoothing is in units of the range, 3
    assert fit.weight[1, 0] - fit.weight[0, 0] == pytest.approx(1, abs=1e-7)
    assert fit.bias[1] - fit.bias[0] == pytest.approx(-0.5, abs=1e-7)
    scores = 0.5 * fit.weight[:, 0] + fit.bias
    assert scores[0] == pytest.approx(scores[1], abs=1e-9), "the boundary is at .5"


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_posteriors_are_those_of_the_densities(shift: float) -> None:
    x, y = samples(shift=shift)
    fit = naive_bayes(moments(x, y, CLASSES))
    share = np.bincount(y) / len(y)
    extent = np.ptp(x, axis=0)
    own = np.stack([x[y == c].var(0) + SMOOTHING * extent**2 for c in range(CLASSES)])
    spread = np.sqrt(share @ own)
    joint = np.stack(
        [np.log(share[c]) + norm.logpdf(x, x[y == c].mean(0), spread).sum(1) for c in range(CLASSES)], axis=1
    )
    np.testing.assert_allclose(
        log_softmax(x @ fit.weight.T + fit.bias, axis=1), log_softmax(joint, axis=1), rtol=0, atol=1e-7
    )
    np.testing.assert_allclose(fit.prior @ fit.weight, 0, atol=1e-9)  # nothing that all classes share
    assert fit.dropped == ()


def test_parts_merge_to_the_whole_in_any_order() -> None:
    x, y = samples(shift=1e3)
    whole = moments(x, y, CLASSES)
    cuts = np.split(np.arange(300), [1, 2, 40, 40, 260])  # one sample, and none
    parts = [moments(x[i], y[i], CLASSES) for i in cuts]
    for order in (parts, parts[::-1]):
        found = merged(order)
        for name in ("count", "low", "high"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        for name in ("mean", "spread"):
            np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-10)
        np.testing.assert_allclose(
            naive_bayes(found).weight, naive_bayes(whole).weight, rtol=1e-8, atol=1e-12
        )


def test_what_features_add_is_the_log_odds() -> None:
    x, y = samples()
    fit = naive_bayes(moments(x, y, CLASSES))
    shares = fit.log_odds(x, 2, 0)
    assert shares.shape == x.shape
    scores = x @ fit.weight.T + fit.bias
    odds = shares.sum(1) + np.log(fit.prior[2] / fit.prior[0])
    np.testing.assert_allclose(odds, scores[:, 2] - scores[:, 0], atol=1e-9)


def test_features_that_hardly_vary_are_left_out_and_said() -> None:
    x, y = samples()
    x[:, 1] = 7.0  # constant
    x[:, 3] = y * 1.0  # varies between the classes only: its weight would be without limit
    fit = naive_bayes(moments(x, y, CLASSES))
    assert fit.dropped == (1, 3)
    assert not fit.weight[:, [1, 3]].any()
    assert np.isfinite(fit.weight).all()
    np.testing.assert_array_equal(fit.log_odds(x, 1, 0)[:, [1, 3]], 0)
    assert logistic(x, y, CLASSES).dropped == (1,)
    with pytest.raises(ModelError, match="none of 5 features varies"):
        naive_bayes(moments(np.ones((4, 5)), np.array([0, 1, 2, 0]), CLASSES))


def test_logistic_regression_is_at_its_optimum() -> None:
    x, y = samples(shift=100.0)
    strength = 0.7
    fit = logistic(x, y, CLASSES, strength=strength)
    low, extent = x.min(0), np.ptp(x, axis=0)
    p = np.exp(log_softmax(x @ fit.weight.T + fit.bias, axis=1))
    wrong = strength * (p - np.eye(CLASSES)[y])
    gradient = fit.weight * extent + wrong.T @ ((x - low) / extent)
    assert np.abs(gradient).max() < 1e-4 * strength * len(x)
    assert np.abs(wrong.sum(0)).max() < 1e-4 * strength * len(x)
    assert (p.argmax(1) == y).mean() > 0.8
    with pytest.raises(ModelError, match="did not converge in 2 iterations"):
        logistic(x, y, CLASSES, iterations=2)


def test_as_a_bag_head_it_scores_the_mean_tile() -> None:
    x, y = samples()
    fit = naive_bayes(moments(torch.from_numpy(x).float(), y, CLASSES))
    head = fit.head()
    found = head(torch.from_numpy(x[:20]))
    np.testing.assert_allclose(found.detach().numpy(), x[:20].mean(0) @ fit.weight.T + fit.bias, rtol=1e-4)
    assert not head.training


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda x, y: (x, np.where(y == 1, 0, y)), "no sample of class 1"),
        (
            lambda x, y: (np.where(x == x[4, 2], np.nan, x), y),
            "1 of 300 samples hold values that are not finite",
        ),
        (lambda x, y: (x, y + 1), "labels run from 1 to 3; expected indices of 3 classes"),
        (lambda x, y: (x[:, 0], y), r"shape \(300,\)"),
    ],
)
def test_samples_that_cannot_be_fitted(spoil: Callable[..., Any], complaint: str) -> None:
    x, y = spoil(*samples())
    with pytest.raises(ModelError, match=complaint):
        naive_bayes(moments(x, y, CLASSES))
    with pytest.raises(ModelError, match=complaint):
        logistic(x, y, CLASSES)
