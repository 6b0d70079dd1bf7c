"""Finer-CAM: the comparison it explains, which classes it compares, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.model import OutputSpec
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.finer import finer_target
from workers.cam.methods import method
from workers.cam.targets import resolve

N = 6


def maps(name: str, net: torch.nn.Module | None = None, batch: int = 3) -> Tensor:
    net = net or conv_net(2, classes=N).double()
    x = tiles(2, batch=batch).double()
    return next(iter(explain(HookedNet(net, "relu"), x, classes(N), [name]).maps.values())).double()


def test_without_comparison_it_is_gradcam() -> None:
    torch.testing.assert_close(maps("finercam+gamma=0"), maps("gradcam"))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("n", "gamma"), [(3, 0.6), (1, 1.0), (9, 0.5)])
def test_equals_differences_of_gradcams(ndim: int, n: int, gamma: float) -> None:
    net, x = conv_net(ndim, classes=N).double(), tiles(ndim, batch=3).double()
    name = f"finercam+n={n}+gamma={gamma}"
    done = explain(HookedNet(net, "relu"), x, classes(N), [name, "gradcam"])
    (found, single) = (m.double().numpy() for m in done.maps.values())
    for b in range(3):
        scores = done.scores[b].double().numpy()
        for c in range(N):
            others = sorted((d for d in range(N) if d != c), key=lambda d: abs(scores[d] - scores[c]))[:n]
            expected = single[b, c] - gamma * np.mean([single[b, d] for d in others], axis=0)
            np.testing.assert_allclose(found[b, c], expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def test_softmax_mean_is_the_gradient_of_the_authors_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, N, generator=generator, dtype=torch.float64)
    for c in range(N):
        target = torch.zeros(4, N, dtype=torch.float64)
        target[:, c] = 1
        likeness = -(scores - scores[:, c : c + 1]).abs()
        found = finer_target(scores, target, likeness, 3, 0.6, "softmax")
        for b in range(4):
            s = scores[b].clone().requires_grad_()
            others = sorted(
                (d for d in range(N) if d != c), key=lambda d: float((scores[b, d] - scores[b, c]).abs())
            )
            p = s.softmax(0)
            top = sum((p[d] * (s[c] - 0.6 * s[d]) for d in others[:3]), torch.zeros((), dtype=torch.float64))
            y = top / sum((p[d] for d in others[:3]), torch.zeros((), dtype=torch.float64))
            (expected,) = torch.autograd.grad(y, s)
            torch.testing.assert_close(found[b], expected)


def test_similarity_of_weights() -> None:
    net = conv_net(2, head="gap", classes=N).double()
    w = net.fc.weight.detach()
    found, single = maps("finercam+n=1+gamma=1+similar=weights", net), maps("gradcam", net)
    cosine = (w @ w.T) / (w.norm(dim=1)[:, None] * w.norm(dim=1))
    for c in range(N):
        nearest = max((d for d in range(N) if d != c), key=lambda d: float(cosine[c, d]))
        expected = single[:, c] - single[:, nearest]
        torch.testing.assert_close(found[:, c], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(ModelError, match="similar=weights"):
        maps("finercam+similar=weights")


def test_target_by_hand() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    own = torch.tensor([[1.0, 0, 0, 0]])
    likeness = -(scores - 5).abs()
    assert finer_target(scores, own, likeness, 2, 0.5).tolist() == [[1, 0, -0.25, -0.25]]
    assert finer_target(scores, -own, likeness, 1, 1).tolist() == [[-1, 0, 1, 0]]
    assert finer_target(scores, own, likeness, 99, 0.75).tolist() == [[1, -0.25, -0.25, -0.25]]


def test_equal_scores_are_taken_in_order_of_their_class() -> None:
    scores, own = torch.zeros(1, 4), torch.tensor([[0.0, 1, 0, 0]])
    assert finer_target(scores, own, torch.zeros(1, 4), 2, 1).tolist() == [[-0.5, 1, -0.5, 0]]


def test_a_single_score_has_nothing_to_be_compared_with() -> None:
    net = conv_net(2, classes=1)
    targets = resolve(["all"], OutputSpec(kind="logit", classes=("no", "yes")), 1)
    with pytest.raises(ModelError, match="single score"):
        explain(HookedNet(net, "relu"), tiles(2), targets, ["finercam"])


def test_options() -> None:
    assert method("finercam").info.options == {"n": "3", "gamma": "0.6", "mean": "even", "similar": "scores"}
    for bad in ("n=0", "gamma=-1", "mean=odd", "similar=names"):
        with pytest.raises(SpecError, match="option"):
            method(f"finercam+{bad}")


def test_the_edition_says_which_likeness_and_which_mean() -> None:
    assert "authors' code; their even mean" in method("finercam").info.edition
    assert "cosine of the head's weights" in method("finercam+similar=weights").info.edition
    assert "by their softmax" in method("finercam+mean=softmax").info.edition
