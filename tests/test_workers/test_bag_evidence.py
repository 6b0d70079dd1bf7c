"""Bags whose answer is known: what the page of bag methods says, on a small instance."""

from __future__ import annotations

import pytest

from schemas.training import FitSpec
from tests.bench.evidence import HEADS, PAGE, TEXT, UPRIGHT, WORLDS, Figures, Sizes, able, compare, page
from workers.cam.bag_methods import BAG_METHODS
from workers.models.heads.registry import build_head

SMALL = Sizes(train=64, validation=16, test=16)
QUICK = FitSpec(epochs=25, learning_rate=3e-3)


@pytest.fixture(scope="module")
def signed() -> Figures:
    return compare("signed", "abmil", 0, SMALL, QUICK)


def test_attention_cannot_say_against_and_contribution_can(signed: Figures) -> None:
    bags = signed["bags"]
    assert bags["auroc"] > 0.85
    for mark in "+-":
        assert signed["contribution"][mark] > 0.85
    # Turned, attention ranks evidence last; upright it cannot tell the two signs apart.
    assert signed["attention"]["-"] < bags["-"] + 0.05
    assert signed[UPRIGHT]["-"] < 0.7
    assert signed["contribution"]["-"] - signed[UPRIGHT]["-"] > 0.25


def test_the_page_is_filled_from_the_figures(signed: Figures) -> None:
    results = {(world, "abmil"): [signed, signed] for world in WORLDS}
    text = page("{TABLE}\n{signed:abmil:attention:-}", results, {})
    assert f"{signed['attention']['-']:.2f} ± 0.00" in text
    assert text.endswith(f"\n{signed['attention']['-']:.2f}")


def test_the_guide_has_a_row_for_every_head_and_method() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, args in HEADS.items():
        head = build_head(name, 32, 2, args)
        for method in able(head):
            assert f"| `{name}` | `{method}` |" in text
    assert {m for name, args in HEADS.items() for m in able(build_head(name, 32, 2, args))} == set(
        BAG_METHODS
    )
    assert "{" not in text
    for heading in [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.startswith("#")]:
        assert heading in text
