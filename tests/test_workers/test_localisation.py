"""AUROC by ranks equals the definition: the share of pairs in the right order, ties one half."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.metrics.localisation import auroc


def pairs_in_order(score: list[int], positive: list[bool]) -> float:
    wins = 0.0
    pairs = 0
    for s, p in zip(score, positive, strict=True):
        for t, q in zip(score, positive, strict=True):
            if p and not q:
                pairs += 1
                wins += 1.0 if s > t else 0.5 if s == t else 0.0
    return wins / pairs if pairs else float("nan")


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    score, positive = [s for s, _ in rows], [p for _, p in rows]
    found = auroc(np.array(score, np.float32), np.array(positive))
    assert found == pytest.approx(pairs_in_order(score, positive), nan_ok=True, abs=1e-12)


def test_auroc_of_many_pixels_does_not_overflow() -> None:
    """Rank sums of a slide exceed 32 bits."""
    positive = np.arange(200_000) >= 100_000
    assert auroc(np.arange(200_000, dtype=np.float32), positive) == 1.0
    assert auroc(-np.arange(200_000, dtype=np.float32), positive) == 0.0
    assert auroc(np.zeros(200_000), positive) == 0.5


def test_auroc_refuses_pixels_nobody_looked_at() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        auroc(np.array([0.0, np.nan, 1.0]), np.array([True, False, True]))


def test_auroc_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="expected two vectors of one length"):
        auroc(np.zeros((2, 2)), np.zeros(4, np.bool_))
