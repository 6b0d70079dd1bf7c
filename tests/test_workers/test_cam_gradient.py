"""The gradient family's rows of one gradient, and what all of the family do at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.gradient import (
    counterfactual,
    gradcam,
    gradcam_elementwise,
    gradcampp_official,
    gradcampp_official_weights,
)
from workers.cam.methods import METHODS
from workers.cam.targets import functionals
from workers.cam.view import Batch, View

Array = NDArray[np.float64]

FAMILY = (
    "gradcampp_official", "gradcam_elementwise", "counterfactual", "smoothgradcampp+n=2", "igcam+steps=3", "shapleycam",
    "finercam", "guidedbackprop", "guidedgradcam", "fullgrad",
)  # fmt: skip

A = torch.tensor([[[1.0, 0, 0, 3], [0, 2, 1, 1]]], dtype=torch.float64)
G = torch.tensor([[[0.5] * 4, [-0.25] * 4]], dtype=torch.float64)


def close(found: Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found.double().numpy().ravel(), expected, rtol=tolerance, atol=tolerance)


def test_closed_forms() -> None:
    weight, doubtful = gradcampp_official_weights(A, G)
    close(math.e * weight, [1.3591, 0], tolerance=1e-4)  # y = 1
    assert not doubtful.any()
    close(gradcampp_official(A, G)[0], [0.5, 0, 0, 1.5])
    close(gradcam_elementwise(A, G), [0.5, 0, 0, 1.5])
    close(counterfactual(A, G).relu(), [0, 0.5, 0.25, 0])
    assert not ((gradcam(A, G) > 0) & (counterfactual(A, G) > 0)).any(), "disjoint support"


def test_official_alpha_is_normalised_over_cells_of_positive_gradient_alone() -> None:
    # S = 4, g = (1, 1/2, -1): alpha = (1/6, 1/4, -1/2); over 5/12: (0.4, 0.6); weight 0.4 * 1 + 0.6 / 2
    a, g = torch.tensor([[[1.0, 3.0, 0.0]]]), torch.tensor([[[1.0, 0.5, -1.0]]])
    weight, doubtful = gradcampp_official_weights(a, g)
    close(weight, [0.7], tolerance=1e-6)
    assert not doubtful.any()


def test_official_where_denominators_vanish_or_turn_negative() -> None:
    # S = -2, g = 1: denominator 0, alpha = 1
    weight, doubtful = gradcampp_official_weights(torch.tensor([[[-2.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
    close(weight, [1])
    assert doubtful.all()
    # S = -4: alpha = -1/2 for g = 1 and 1/0 -> g^2 = 1/4 for g = 1/2; over their sum -1/4: (2, -1)
    weight, doubtful = gradcampp_official_weights(torch.tensor([[[-4.0, 0.0]]]), torch.tensor([[[1.0, 0.5]]]))
    close(weight, [2 - 0.5])
    assert doubtful.all()


def slow_official(a: Array, g: Array, y: float) -> Array:
    """As printed: with exp(y) in all three derivatives, alpha over its sum where the first is positive."""
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        alpha = np.zeros(out.shape)
        for u in np.ndindex(out.shape):
            second, third = math.exp(y) * g[k][u] ** 2, math.exp(y) * g[k][u] ** 3
            denominator = 2 * second + a[k].sum() * third
            alpha[u] = second / (denominator if denominator else 1.0)
        total = sum(alpha[u] for u in np.ndindex(out.shape) if g[k][u] > 0)
        weight = sum(
            alpha[u] / (total if total else 1.0) * max(math.exp(y) * g[k][u], 0.0)
            for u in np.ndindex(out.shape)
        )
        for u in np.ndindex(out.shape):
            out[u] += weight * a[k][u]
    return out / math.exp(y)


def slow_elementwise(a: Array, g: Array, _: float) -> Array:
    out = np.zeros(a.shape[1:])
    for k, *u in np.ndindex(a.shape):
        out[tuple(u)] += max(g[k][tuple(u)] * a[k][tuple(u)], 0.0)
    return out


def slow_counterfactual(a: Array, g: Array, _: float) -> Array:
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        weight = sum(-g[k][u] for u in np.ndindex(out.shape)) / out.size
        for u in np.ndindex(out.shape):
            out[u] += weight * a[k][u]
    return out


SLOW: dict[str, Callable[[Array, Array, float], Array]] = {
    "gradcampp_official": slow_official,
    "gradcam_elementwise": slow_elementwise,
    "counterfactual": slow_counterfactual,
}


def views(split: HookedNet, x: Tensor, n: int = 3) -> list[View]:
    batch = Batch(split, x, split.forward(x), torch.arange(len(x)))
    return [View(batch, w) for w in functionals(batch.scores, classes(n))[0]]


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_rows_equal_their_slow_twins(ndim: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=3).double()
    kept: list[Tensor] = []
    handle = net.relu.register_forward_hook(lambda _m, _i, out: kept.append(out))
    scores = net(x.clone().requires_grad_())
    handle.remove()
    done = explain(HookedNet(net, "relu"), x, classes(3), list(SLOW))
    for c in range(3):
        (g,) = torch.autograd.grad(scores[:, c].sum(), kept[0], retain_graph=True)
        for name, slow in SLOW.items():
            for b in range(len(x)):
                expected = slow(kept[0][b].detach().numpy(), g[b].numpy(), float(scores[b, c].detach()))
                np.testing.assert_allclose(
                    done.maps[name][b, c].numpy(),
                    expected,
                    rtol=1e-6,
                    atol=1e-6 * abs(expected).max(),
                    err_msg=name,
                )


def test_no_score_is_too_large_for_the_official_form() -> None:
    net, x = conv_net(2), tiles(2)
    expected = explain(HookedNet(net, "relu"), x, classes(3), ["gradcampp_official"])
    with torch.no_grad():
        net.fc.bias.add_(1000)  # exp(y) is beyond every float
    found = explain(HookedNet(net, "relu"), x, classes(3), ["gradcampp_official"])
    torch.testing.assert_close(found.maps, expected.maps)
    assert (found.scores > 900).all()


def test_closed_form_behind_a_linear_head() -> None:
    net, x = conv_net(2, head="gap"), tiles(2)
    split = HookedNet(net, "relu")
    for name in ("gradcampp_official", "counterfactual", "igcam", "shapleycam"):
        row = METHODS[name]
        assert row.weigh is not None
        found = explain(split, x, classes(3), [name]).maps[name]
        with torch.no_grad():
            expected = torch.stack([row.raw(v, row.options)[0] for v in views(split, x)], 1).reshape(
                found.shape
            )
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name
        )


def test_removing_what_the_counterfactual_shows_raises_a_linear_score() -> None:
    net, x = conv_net(2, head="gap"), tiles(2)
    split = HookedNet(net, "relu")
    done = explain(split, x, classes(3), ["counterfactual"])
    a = split.trunk(x)
    for c in range(3):
        shown = done.maps["counterfactual"][:, c] > 0
        assert shown.flatten(1).any(1).any()
        left = split.tail(a * ~shown[:, None], x)[:, c]
        assert (left >= done.scores[:, c] - 1e-6).all()
        assert (left > done.scores[:, c] + 1e-6).any()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_bad_row_is_flagged_and_spoils_no_other(ndim: int, name: str) -> None:
    net, x = HookedNet(conv_net(ndim), "relu"), tiles(ndim)
    clean = explain(net, x, classes(3), [name])
    bad = x.clone()
    bad[1, 0] = torch.nan
    done = explain(net, bad, classes(3), [name])
    (maps,), (flags,) = done.maps.values(), done.flags.values()
    assert maps[1].isnan().all()
    assert (flags[1] == MapFlag.NOT_FINITE).all()
    others = [0, 2, 3]
    scale = float(clean.maps[name].abs().max())
    torch.testing.assert_close(maps[others], clean.maps[name][others], rtol=1e-5, atol=1e-6 * scale)
    assert torch.equal(flags[others], clean.flags[name][others])


@pytest.mark.parametrize("name", FAMILY)
def test_rows_do_not_hang_on_their_company(name: str) -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=9)
    together = explain(net, x, classes(3), [name], torch.arange(9)).maps[name]
    scale = float(together.abs().max())
    for rows in ([4], [8, 0]):
        alone = explain(net, x[rows], classes(3), [name], torch.tensor(rows)).maps[name]
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", FAMILY)
def test_a_constant_network_gives_a_flagged_map(name: str) -> None:
    net = conv_net(2)
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.zero_()
    done = explain(HookedNet(net, "relu"), tiles(2), classes(3), [name])
    assert (done.maps[name] == 0).all()
    assert (done.flags[name] & (MapFlag.EMPTY | MapFlag.CONSTANT) == MapFlag.EMPTY | MapFlag.CONSTANT).all()


@pytest.mark.parametrize("name", [n for n in FAMILY if not n.startswith("guided")])
def test_a_single_cell_is_flagged(name: str) -> None:
    net = conv_net(2, head="gap")
    done = explain(HookedNet(net, "relu"), torch.randn(2, 2, 2, 2), classes(3), [name])
    assert done.maps[name].shape == (2, 3, 1, 1)
    assert (done.flags[name] & MapFlag.SINGLE_CELL).all()


@pytest.mark.parametrize("name", FAMILY)
def test_scores_without_a_path_to_the_layer_are_refused(name: str) -> None:
    class Cut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out.detach()

    with pytest.raises(ModelError, match=r"do not depend on layer|cannot be differentiated"):
        explain(HookedNet(Cut().eval(), "net.relu"), tiles(2), classes(3), [name])


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_is_left_behind(name: str) -> None:
    net, x = conv_net(2, inplace=True), tiles(2)
    before, scores = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
    explain(HookedNet(net, "relu"), x, classes(3), [name])
    assert torch.equal(net(x), scores)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(x, tiles(2))


def test_order_of_methods_does_not_matter() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    forward, backward = (explain(net, x, classes(3), names) for names in (FAMILY, FAMILY[::-1]))
    for name in FAMILY:
        assert torch.equal(forward.maps[name], backward.maps[name]), name
        assert torch.equal(forward.maps[name], explain(net, x, classes(3), [name]).maps[name]), name


def test_signs_are_as_the_table_says() -> None:
    done = explain(HookedNet(conv_net(2), "relu"), tiles(2, batch=8), classes(3), FAMILY)
    for name in FAMILY:
        info = METHODS[name.partition("+")[0]].info
        if not info.signed:
            assert (done.maps[name] >= 0).all(), name
        assert info.edition
        assert info.citation
