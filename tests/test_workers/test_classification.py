"""Metrics of a classifier of slides, and their intervals from resampled patients."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from workers.metrics.classification import METRICS, accuracy, auprc, balanced_accuracy, evaluate_classifier


def scores(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    label = np.arange(n) % 2
    p = 1 / (1 + np.exp(-(generator.standard_normal(n) + 2.0 * label - 1.0)))
    return np.stack([1 - p, p], 1), label


def test_average_precision_by_hand() -> None:
    truth = np.array([True, False, True, False])
    assert auprc(np.array([4.0, 3, 2, 1]), truth) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert auprc(np.array([1.0, 2, 3, 4]), truth) == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 4)
    assert auprc(np.zeros(4), truth) == pytest.approx(0.5)  # all tied: the share of positives
    assert np.isnan(auprc(np.zeros(2), np.zeros(2, bool)))
    with pytest.raises(ValueError, match="finite"):
        auprc(np.array([np.nan, 1]), np.array([True, False]))


def test_accuracies_by_hand() -> None:
    probability = np.eye(3)[[0, 0, 0, 1, 2]]
    label = np.array([0, 0, 1, 1, 2])
    assert accuracy(probability, label) == pytest.approx(4 / 5)
    assert balanced_accuracy(probability, label) == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert METRICS["auroc"](probability, label) == pytest.approx((5 / 6 + 3 / 4 + 1) / 3)


def test_more_slides_of_a_patient_narrow_nothing() -> None:
    probability, label = scores(40)
    once = evaluate_classifier(probability, label, np.arange(40), resamples=200)
    five = [np.repeat(values, 5, axis=0) for values in (probability, label, np.arange(40))]
    again = evaluate_classifier(*five, resamples=200)
    for name in METRICS:
        assert astuple(again[name]) == pytest.approx(astuple(once[name]))
        assert once[name].low < once[name].value < once[name].high
    apart = evaluate_classifier(five[0], five[1], np.arange(200), resamples=200)
    assert all(apart[n].high - apart[n].low < once[n].high - once[n].low for n in METRICS)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    expected = 0.92135  # Phi(2 / sqrt 2): two unit Gaussians two standard deviations apart
    held = 0
    for seed in range(24):
        found = evaluate_classifier(*scores(80, seed), np.arange(80), resamples=80, seed=seed)["auroc"]
        held += found.low <= expected <= found.high
    assert held >= 20


def test_what_is_not_defined_is_no_number() -> None:
    probability, label = scores(6)
    found = evaluate_classifier(probability, np.zeros_like(label), np.arange(6), resamples=50)
    assert np.isnan([found["auroc"].value, found["auroc"].low, found["auroc"].high]).all()
    assert found["auroc"].resamples == 0
    assert np.isfinite(found["accuracy"].low)
    with pytest.raises(ValueError, match="expected"):
        evaluate_classifier(probability, label[:3], np.arange(6))
