"""Taking tiles out of a bag by relevance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from schemas.errors import SpecError
from tests.test_workers.tiny_heads import features, tiny_head, view
from workers.cam.bag import BagView
from workers.cam.bag_flipping import flipping
from workers.cam.bag_methods import attribute


@pytest.mark.parametrize("name", ["abmil", "clam_mb", "dsmil", "transmil"])
@pytest.mark.parametrize("sharp", [3.0, 3000.0])
def test_curve_is_that_of_forward_passes(name: str, sharp: float) -> None:
    """23 tiles in 10 steps; what is left keeps the bag's order; all attention on one tile does no harm."""
    bag = BagView(tiny_head(name, sharp=sharp), features(23), torch.eye(3))
    relevance = attribute(bag, ["gradient_input"])["gradient_input"].relevance
    found = flipping(bag, relevance, steps=10)
    assert found.fraction.tolist() == [s * 23 // 10 / 23 for s in range(10)]
    for t in range(3):
        for curve, sign in ((found.most, -1), (found.least, 1)):
            order = sorted(range(23), key=lambda i: (sign * relevance[i, t].item(), i))
            for s in range(10):
                left = sorted(order[s * 23 // 10 :])
                with torch.no_grad():
                    expected = bag.head(bag.h[left])
                torch.testing.assert_close(curve[t, s], expected, atol=1e-10, rtol=1e-10)


def test_ties_leave_in_the_order_of_the_bag() -> None:
    bag = view("abmil")
    flat = flipping(bag, torch.zeros(11, 3))
    assert torch.equal(flat.most, flat.least)
    with torch.no_grad():
        torch.testing.assert_close(flat.most[0, 4], bag.head(bag.h[4:]))
    assert flat.fraction.shape == (11,)
    assert (flat.gain == 0).all()


def test_contributions_are_more_faithful_than_their_opposite() -> None:
    bag = view("abmil")
    relevance = attribute(bag, ["contribution"])["contribution"].relevance
    right, wrong = flipping(bag, relevance), flipping(bag, -relevance)
    assert (right.gain > 0).all()
    torch.testing.assert_close(wrong.gain, -right.gain)
    assert (right.most_area < right.least_area).all()
    torch.testing.assert_close(right.scores(right.most)[:, 0], bag.logits)


def test_area_is_the_mean_probability_along_the_curve() -> None:
    bag = view("linear", classes=1)
    found = flipping(bag, bag.h[:, :1])
    p = found.most[0, :, 0].sigmoid()
    by_hand = (p[:-1] + p[1:]).sum() / 2 / (len(p) - 1)
    torch.testing.assert_close(found.most_area[0], by_hand)
    one = flipping(BagView(bag.head, bag.h[:1], bag.targets), torch.zeros(1, 1))
    torch.testing.assert_close(one.most_area, bag.head(bag.h[:1]).detach().sigmoid())


@pytest.mark.parametrize("relevance", [torch.zeros(10, 3), torch.full((11, 3), torch.nan)])
def test_a_tile_without_relevance_has_no_place(relevance: Tensor) -> None:
    with pytest.raises(SpecError, match="all finite"):
        flipping(view("abmil"), relevance)
