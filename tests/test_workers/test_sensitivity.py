from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from schemas.model import OutputSpec
from tests.test_workers.every_method import setting
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.noise import NoisyNet
from workers.metrics.sensitivity import class_sensitivity, rank_correlation, robustness
from workers.trust import both_classes, target_of


def maps(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- class sensitivity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(11,), (5, 7), (3, 4, 5)])
def test_it_is_spearman_of_the_highest_and_the_lowest_class(grid: tuple[int, ...]) -> None:
    found, scores = maps(4, 3, *grid), maps(4, 3, seed=1)
    expected = [
        stats.spearmanr(found[b, scores[b].argmax()].ravel(), found[b, scores[b].argmin()].ravel()).statistic
        for b in range(4)
    ]
    sensitivity = class_sensitivity(found, scores)
    assert sensitivity.values == pytest.approx(expected, abs=1e-12)
    assert sensitivity.mean == pytest.approx(np.mean(expected))


def test_maps_are_resized_as_torch_does_with_edges_on_edges() -> None:
    found = maps(2, 2, 4, 6)
    scores = np.array([[0.0, 1.0], [1.0, 0.0]])
    sized = torch.nn.functional.interpolate(
        torch.from_numpy(found), (13, 31), mode="bilinear", align_corners=False
    ).numpy()
    expected = class_sensitivity(sized, scores)
    assert class_sensitivity(found, scores, (13, 31)).values == pytest.approx(expected.values, abs=1e-4)
    # the last bit of a tie decides its rank


def test_the_same_map_is_1_its_negative_is_minus_1_and_ties_count_as_ranks_do() -> None:
    first = maps(3, 6, 5)
    assert rank_correlation(first, np.exp(first)).values == pytest.approx(1.0)
    assert rank_correlation(first, -first).values == pytest.approx(-1.0)
    tied, other = np.round(maps(1, 30)), np.round(maps(1, 30, seed=1))
    expected = stats.spearmanr(tied[0], other[0]).statistic
    assert rank_correlation(tied, other).values == pytest.approx([expected])


def test_a_constant_map_is_left_out_and_counted() -> None:
    found = maps(4, 2, 3, 3)
    found[1, 0] = 7.0
    found[2, 1, 0, 0] = np.nan
    sensitivity = class_sensitivity(found, np.tile([1.0, 0.0], (4, 1)))
    assert np.isnan(sensitivity.values).tolist() == [False, True, True, False]
    assert (sensitivity.counted, sensitivity.left_out) == (2, 2)
    assert sensitivity.mean == pytest.approx(np.nanmean(sensitivity.values))
    assert np.isnan(class_sensitivity(np.ones((2, 2, 3)), np.zeros((2, 2))).mean)


def test_of_one_logit_the_classes_are_its_two_signs() -> None:
    found = np.stack([maps(3, 8), maps(3, 8, seed=1)], axis=1)
    two = class_sensitivity(found, np.array([[-1.0, 1.0], [2.0, -2.0], [0.5, -0.5]]))
    assert class_sensitivity(found, np.array([[1.0], [-2.0], [-0.5]])).values == pytest.approx(two.values)


@pytest.mark.parametrize(
    ("output", "n"),
    [
        (OutputSpec(classes=("1", "0")), 2),
        (OutputSpec(kind="logit", classes=("1", "0")), 1),
        (OutputSpec(kind="logit", classes=("0",)), 1),
    ],
)
def test_every_class_is_measured_where_they_are_called_like_indices(output: OutputSpec, n: int) -> None:
    card: Any = SimpleNamespace(output=output)
    model: Any = SimpleNamespace(card=card, n_outputs=n)
    assert [target.index for target in both_classes(model)] == [0, 1]
    assert [target.index for target in target_of(model)] == [0]


@pytest.mark.parametrize(("t", "c"), [(1, 1), (3, 2), (3, 1)])
def test_a_map_for_each_class_is_asked_for(t: int, c: int) -> None:
    with pytest.raises(ValueError, match="expected a map for each class"):
        class_sensitivity(maps(2, t, 4), maps(2, c))


# --- robustness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(20,), (9, 12), (8, 8, 8)])
def test_equal_maps_are_wholly_alike_and_count_as_unchanged(grid: tuple[int, ...]) -> None:
    first = maps(3, *grid)
    same = robustness(first, first.copy())
    assert same.changed == 0
    assert same.ssim.values == pytest.approx(1.0)
    assert same.mse.values == pytest.approx(0.0)


def test_mse_is_of_maps_scaled_by_the_range_of_the_first_and_units_do_not_matter() -> None:
    first = maps(2, 9, 12)
    noisy = first + 0.1 * maps(2, 9, 12, seed=1)
    found = robustness(first, noisy)
    expected = [np.mean((a - b) ** 2) / np.ptp(a) ** 2 for a, b in zip(first, noisy, strict=True)]
    assert found.mse.values == pytest.approx(expected)
    assert found.changed == 2
    assert (found.ssim.values < 1).all()
    scaled = robustness(1e-6 * first + 3, 1e-6 * noisy + 3)
    assert scaled.mse.values == pytest.approx(found.mse.values, rel=1e-5)
    assert scaled.ssim.values == pytest.approx(found.ssim.values, rel=1e-5)


def test_ssim_is_that_of_its_definition_in_one_window() -> None:
    a, b = maps(7, 7), maps(7, 7, seed=1)
    low, range_ = a.min(), np.ptp(a)
    x, y = ((v - low) / range_ for v in (a, b))
    cov = np.cov(x.ravel(), y.ravel())
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
    expected /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)
    assert robustness(a[None], b[None]).ssim.values == pytest.approx([expected])


def test_a_map_without_a_range_has_no_figure() -> None:
    first = maps(3, 5, 5)
    noisy = first + 0.1
    first[0] = 2.0
    noisy[1, 0, 0] = np.nan
    found = robustness(first, noisy)
    assert np.isnan(found.mse.values).tolist() == [True, True, False]
    assert (found.ssim.left_out, found.changed) == (2, 3)


# --- the noise is really used ----------------------------------------------------------------------------------------


def engine(ndim: int, name: str, head: str, noise: float, batch: slice = slice(None)) -> torch.Tensor:
    net = HookedNet(conv_net(ndim, head=head), "relu")
    seeds = torch.tensor([5, 3, 8, 1])
    return explain(net, tiles(ndim)[batch], classes(3), [name], seeds[batch], gradient_noise=noise).maps[name]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", ["gradcam", "hirescam", "layercam", "gradcampp", "xgradcam"])
def test_noise_on_the_gradient_reaches_every_map_also_behind_a_linear_head(ndim: int, name: str) -> None:
    for head in ("gap", "conv"):
        plain, noisy = engine(ndim, name, head, 0.0), engine(ndim, name, head, 0.1)
        empty = (plain == 0).flatten(2).all(-1)  # no gradient above 0: Layer-CAM sees nothing, noise or not
        assert empty.float().mean() < 0.5
        assert ((plain != noisy).flatten(2).any(-1) | empty).all()
        assert torch.equal(noisy, engine(ndim, name, head, 0.1))
        # 10 % of noise on the gradient is a change, not another map.
        assert (plain - noisy).abs().max() < plain.abs().max()


def test_methods_without_a_gradient_are_untouched() -> None:
    for name in ("eigencam", "cam"):
        assert torch.equal(engine(2, name, "gap", 0.0), engine(2, name, "gap", 0.5)), name


def test_noise_belongs_to_the_tile_and_not_to_the_batch_or_the_other_methods() -> None:
    whole = engine(2, "hirescam", "conv", 0.1)
    assert torch.allclose(whole[2:], engine(2, "hirescam", "conv", 0.1, slice(2, None)), atol=1e-6)
    net = HookedNet(conv_net(2), "relu")
    both = explain(
        net, tiles(2), classes(3), ["gradcam", "eigencam", "hirescam"], torch.tensor([5, 3, 8, 1]), 0.1
    )
    assert torch.equal(both.maps["hirescam"], whole)
    assert list(both.maps) == list(both.flags) == ["gradcam", "eigencam", "hirescam"]


@pytest.mark.parametrize("name", ["guidedbackprop", "fullgrad"])
def test_noise_belongs_to_the_tile_also_where_a_batch_is_taken_apart(name: str) -> None:
    """Gradients of the whole network are taken of a few tiles at a time."""
    net, seeds = HookedNet(conv_net(2), "relu"), torch.arange(10) + 3
    x = torch.randn(10, 2, 12, 14, generator=torch.Generator().manual_seed(0))

    def noisy(rows: slice) -> torch.Tensor:
        return explain(net, x[rows], classes(3), [name], seeds[rows], gradient_noise=0.1).maps[name]

    torch.testing.assert_close(noisy(slice(None))[8:], noisy(slice(8, None)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["doei", "finercam+similar=weights"])
def test_noise_hides_nothing_of_the_network(name: str) -> None:
    """A method may have to know what network it is: its attention, its linear head."""
    of = setting(name.partition("+")[0])
    net = HookedNet(of.net, of.layer, tokens=of.tokens)
    plain = explain(net, of.x, classes(3), [name]).maps[name]
    noisy = explain(net, of.x, classes(3), [name], gradient_noise=0.1).maps[name]
    assert (plain != noisy).flatten(2).any(-1).all()


def test_the_size_of_the_noise_is_a_share_of_each_gradients_own_deviation() -> None:
    net = HookedNet(conv_net(2), "relu")
    noisy = NoisyNet(net, 0.25, torch.arange(4))
    with torch.enable_grad():
        split = net.forward(tiles(2))
        g = net.grad(split.scores[:, 0], split.activations, retain=True)
        one = noisy.grad(split.scores[:, 0], split.activations, retain=True)
        other = noisy.grad(split.scores[:, 0], split.activations)
    for found in (one, other):
        share = (found - g).flatten(1).std(1) / g.flatten(1).std(1)
        assert share.numpy() == pytest.approx(0.25, rel=0.1)
    assert not torch.equal(one, other)  # repeated gradients are noised independently
    assert noisy.calls == 2
