"""CF-CAM against its toy, its closed forms and a slow replica of what its code does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.cfcam import (
    DOMINANT,
    Padding,
    Weighting,
    cfcam,
    code_filter,
    gaussian_filter,
    gram_distances,
    sort_channels,
)
from workers.cam.dbscan import NOISE, dbscan
from workers.cam.explain import explain
from workers.cam.methods import method

Array = NDArray[np.float64]

# Eight channels of 2 x 2 cells: two dominant, four alike, two that are like no other.
TOY = torch.tensor(
    [[9.0] * 4, [8.0] * 4, *([1 + 0.01 * j, *[0.01 * j] * 3] for j in range(4)), [0, 3, 0, 0], [0, 0, 0, 4]],
    dtype=torch.float64,
)
PADDINGS: tuple[Padding, ...] = ("zero", "symmetric", "mirror")
WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "linear")
LABELS = [DOMINANT, DOMINANT, 0, 0, 0, 0, NOISE, NOISE]


def gradient(seed: int = 0) -> Tensor:
    return torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy_map(g: Tensor, a: Tensor = TOY, **settings: object) -> Tensor:
    return cfcam(a.view(-1, 2, 2), g, sort_channels(a), gaussian_filter(1.0), **settings)  # type: ignore[arg-type]


def test_toy_sorting() -> None:
    norms = TOY.norm(dim=1).numpy()
    np.testing.assert_allclose(norms, [18, 16, 1, 1.010, 1.021, 1.031, 3, 4], atol=1e-3)
    assert np.percentile(norms, 75) == 7
    between = gram_distances(TOY[2:])
    assert np.percentile(between[~np.eye(6, dtype=bool)], 25) == pytest.approx(0.04)
    np.testing.assert_allclose(between, torch.cdist(TOY[2:], TOY[2:]), atol=1e-7)
    assert sort_channels(TOY).tolist() == LABELS


def test_noise_does_not_count() -> None:
    g = gradient()
    moved = g.clone()
    moved[6:] += 100
    for settings in ({}, {"weighting": "linear"}, {"local": True}):
        assert torch.equal(toy_map(g, **settings), toy_map(moved, **settings))
        other = g.clone()
        other[3] += 1
        assert not torch.equal(toy_map(g, **settings), toy_map(other, **settings))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_channels_does_not_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=generator)
    g = gradient(seed)
    torch.testing.assert_close(toy_map(g[order], TOY[order]), toy_map(g), rtol=1e-12, atol=1e-12)
    # and with channels of all kinds: dead, equal, many
    a = torch.randn(60, 12, generator=generator).relu()
    a[:7] = 0
    a[7:12] = a[12]
    a[20:40] = 0.1 * a[20:40] + a[41]
    order = torch.randperm(60, generator=generator)
    assert len(set(sort_channels(a).tolist())) > 2
    assert torch.equal(sort_channels(a)[order], sort_channels(a[order]))


def test_equal_gradients_give_the_mean_of_what_counts() -> None:
    # constant gradients, and a filter that keeps constants
    g = torch.full((8, 2, 2), 0.3, dtype=torch.float64)
    found = cfcam(TOY.view(8, 2, 2), g, sort_channels(TOY), gaussian_filter(1.0, "symmetric"))
    torch.testing.assert_close(found.flatten(), TOY[:6].mean(0))


def test_scaling_gradients() -> None:
    g = gradient()
    linear = toy_map(g, weighting="linear")
    torch.testing.assert_close(toy_map(1000 * g, weighting="linear"), 1000 * linear)
    soft = toy_map(g)
    assert not torch.allclose(toy_map(1000 * g), soft, rtol=0.1)
    # the temperature is the same factor the other way round
    torch.testing.assert_close(toy_map(1000 * g, temperature=1000.0), soft)
    # cold: the channel of largest weight alone; hot: the plain mean
    weight = torch.cat(
        [g[:2].flatten(1).mean(1), gaussian_filter(1.0)(g[2:6].mean(0)[None]).mean().expand(4)]
    )
    torch.testing.assert_close(
        toy_map(g, temperature=1e-4).flatten(),
        TOY[weight.argmax()] if weight.argmax() < 2 else TOY[2:6].mean(0),
    )
    torch.testing.assert_close(toy_map(g, temperature=1e9).flatten(), TOY[:6].mean(0))


def test_edge_cases_of_sorting() -> None:
    assert sort_channels(torch.ones(5, 4)).tolist() == [DOMINANT] * 5
    assert sort_channels(torch.zeros(3, 1)).tolist() == [DOMINANT] * 3
    assert sort_channels(torch.tensor([[2.0]])).tolist() == [DOMINANT]
    # equal channels under a dominant one, larger than eps = 1e-5 could tell apart by rounding
    many = torch.full((9, 50), 1e4) + torch.rand(50, generator=torch.Generator().manual_seed(0))
    many[0] *= 3
    many[1] *= 2
    many[2] *= 2
    assert sort_channels(many).tolist() == [DOMINANT] * 3 + [0] * 6
    one_cell = torch.arange(1.0, 13).view(12, 1)
    found = cfcam(one_cell, torch.ones(12, 1), sort_channels(one_cell), code_filter)
    assert found.shape == (1,)
    assert found.isfinite().all()


# DBSCAN


def slow_dbscan(points: Array, eps: float, least: int) -> list[int]:
    """The textbook's: one point after the other, a cluster grown from each core point not yet in one."""
    n = len(points)
    near = [[j for j in range(n) if math.dist(points[i], points[j]) <= eps] for i in range(n)]
    labels = [-1] * n
    cluster = 0
    for i in range(n):
        if labels[i] != -1 or len(near[i]) < least:
            continue
        queue = [i]
        while queue:
            j = queue.pop()
            if labels[j] != -1:
                continue
            labels[j] = cluster
            if len(near[j]) >= least:
                queue += near[j]
        cluster += 1
    return labels


@pytest.mark.parametrize("seed", range(20))
def test_dbscan_equals_the_textbook(seed: int) -> None:
    random = np.random.default_rng(seed)
    centres = random.uniform(-3, 3, (4, 2))
    points = centres[random.integers(0, 4, 60)] + random.normal(0, 0.5, (60, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    seen = set()
    for eps, least in itertools.product((0.2, 0.5, 1.0), (2, 4, 8)):
        found = dbscan(distances, eps, least).tolist()
        assert found == slow_dbscan(points, eps, least)
        seen |= set(found)
    assert {NOISE, 0, 1} <= seen


def test_a_border_point_joins_the_first_cluster() -> None:
    line = np.array([0, 0.1, 0.2, 1.0, 1.8, 1.9, 2.0])
    distances = np.abs(line[:, None] - line[None])
    assert dbscan(distances, 0.85, 4).tolist() == [0, 0, 0, 0, 1, 1, 1]
    back = np.ix_(range(6, -1, -1), range(6, -1, -1))
    assert dbscan(distances[back], 0.85, 4).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert dbscan(distances, 0.01, 2).tolist() == [NOISE] * 7


# Filters


def slow_code_filter(m: Array) -> Array:
    """Kernel and cross-correlation by the formula, a cell at a time; of an even side the window reaches further ahead."""
    shape = m.shape
    kernel = np.zeros(shape)
    for i in np.ndindex(shape):
        squared = sum((i[d] - shape[d] / 2) ** 2 for d in range(m.ndim))
        kernel[i] = math.exp(-squared / 50) * math.exp(-((m[i] - m.mean()) ** 2) / 0.02)
    kernel /= kernel.sum() + 1e-6
    out = np.zeros(shape)
    for u in np.ndindex(shape):
        for i in np.ndindex(shape):
            v = tuple(u[d] + i[d] - (shape[d] - 1) // 2 for d in range(m.ndim))
            if all(0 <= v[d] < shape[d] for d in range(m.ndim)):
                out[u] += kernel[i] * m[v]
    return out


@pytest.mark.parametrize("shape", [(6,), (7, 4), (5, 5), (3, 4, 2)])
def test_code_filter_equals_its_slow_twin(shape: tuple[int, ...]) -> None:
    maps = 0.1 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for found, m in zip(code_filter(maps), maps, strict=True):
        np.testing.assert_allclose(found, slow_code_filter(m.numpy()), rtol=1e-10, atol=1e-14)


def test_code_filter_in_two_axes_is_the_released_arithmetic() -> None:
    m = 0.1 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    i, j = torch.meshgrid(*[torch.arange(7, dtype=torch.float64) - 3.5] * 2, indexing="ij")
    kernel = torch.exp(-(i**2 + j**2) / 50) * torch.exp(-((m - m.mean()) ** 2) / 0.02)
    kernel = kernel / (kernel.sum() + 1e-6)
    expected = torch.nn.functional.conv2d(m[None, None], kernel[None, None], padding="same")[0, 0]
    torch.testing.assert_close(code_filter(m[None])[0], expected, rtol=1e-10, atol=1e-14)


def test_facts_of_the_code_filter() -> None:
    constant = code_filter(torch.full((1, 7, 7), 2.0, dtype=torch.float64))[0]
    assert constant[3, 3] == pytest.approx(2, rel=1e-6), "an odd map's centre sees the whole kernel"
    for corner in (constant[0, 0], constant[-1, -1], constant[0, -1]):
        assert 0.2 < float(corner) / 2 < 0.5, "about a third is left at the corners"
    impulse = torch.zeros(1, 7, 7, dtype=torch.float64)
    impulse[0, 3, 3] = 10
    found = code_filter(impulse)[0]
    assert float(found[3, 3]) < 1e-12, "removed at its own place"
    assert float(found.sum()) > 5, "smeared elsewhere"


def test_gaussian_filter() -> None:
    impulse = torch.zeros(1, 9, 11, dtype=torch.float64)
    impulse[0, 4, 5] = 1
    found = gaussian_filter(1.0)(impulse)[0].numpy()
    line = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    line /= line.sum()
    expected = np.zeros((9, 11))
    expected[1:8, 2:9] = np.outer(line, line)
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert expected.sum() == pytest.approx(1)
    m = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for padding in PADDINGS:
        assert torch.equal(gaussian_filter(0.0, padding)(m), m)
        torch.testing.assert_close(gaussian_filter(0.05, padding)(m), m)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 2, 5), (1, 4)])
def test_paddings_equal_those_of_numpy(shape: tuple[int, ...], sigma: float) -> None:
    m = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = math.ceil(3 * sigma)
    line = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
    line /= line.sum()
    for padding, mode in zip(PADDINGS, ("constant", "symmetric", "reflect"), strict=True):
        expected = m[0].numpy()
        for axis in range(len(shape)):
            widths = [(r, r) if d == axis else (0, 0) for d in range(len(shape))]
            wide = np.pad(expected, widths, mode=mode)  # type: ignore[call-overload]
            expected = np.apply_along_axis(np.convolve, axis, wide, line, mode="valid")
        found = gaussian_filter(sigma, padding)(m)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", [(2, 2), (9,), (4, 5), (3, 2, 4)])
def test_symmetric_padding_makes_the_filter_inert(space: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = TOY[:, torch.arange(math.prod(space)) % 4].reshape(8, *space)
    g = torch.randn(8, *space, generator=generator, dtype=torch.float64)
    labels = sort_channels(a.flatten(1))
    assert labels.tolist() == LABELS
    for weighting in WEIGHTINGS:
        none, inert, zero, mirror = (
            cfcam(a, g, labels, smooth, weighting=weighting)
            for smooth in (
                gaussian_filter(0.0),
                gaussian_filter(2.0, "symmetric"),
                gaussian_filter(2.0),
                gaussian_filter(2.0, "mirror"),
            )
        )
        torch.testing.assert_close(inert, none, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(zero, none, rtol=1e-4)
        # on two cells an axis a mirror about the border cell keeps the mean too
        assert torch.allclose(mirror, none, rtol=1e-4) == (space == (2, 2))
    local = cfcam(a, g, labels, gaussian_filter(2.0, "symmetric"), local=True)
    assert not torch.allclose(local, cfcam(a, g, labels, gaussian_filter(0.0), local=True), rtol=1e-4)


# The whole


def slow_cfcam(a: Array, g: Array, filtered: object, *, softmax: bool, local: bool = False) -> Array:
    """One tile `(K, *grid)`, in loops."""
    flat = a.reshape(len(a), -1)
    norms = np.array([math.sqrt((f**2).sum()) for f in flat])
    dominant = [k for k in range(len(a)) if norms[k] >= np.percentile(norms, 75)]
    rest = sorted((k for k in range(len(a)) if k not in dominant), key=lambda k: norms[k])
    gradients = {k: g[k] for k in dominant}
    if len(rest) > 1:
        apart = [math.dist(flat[i], flat[j]) for i in rest for j in rest if i != j]
        eps = max(float(np.percentile(apart, 25)), 1e-5)
        labels = slow_dbscan(flat[rest], eps * (1 + 1e-9), max(2, int(0.05 * len(rest))))
        for c in range(max(labels) + 1):
            members = [k for k, label in zip(rest, labels, strict=True) if label == c]
            shared = filtered(np.mean([g[k] for k in members], axis=0))  # type: ignore[operator]
            gradients.update(dict.fromkeys(members, shared))
    if local:
        return np.asarray(sum(f * a[k] for k, f in gradients.items()))
    weights = {k: f.mean() for k, f in gradients.items()}
    if softmax:
        top = max(weights.values())
        exponentials = {k: math.exp(w - top) for k, w in weights.items()}
        weights = {k: e / sum(exponentials.values()) for k, e in exponentials.items()}
    return np.asarray(sum(w * a[k] for k, w in weights.items()))


@pytest.mark.parametrize("space", [(9,), (4, 5), (3, 2, 4)])
def test_both_editions_equal_their_slow_twin(space: tuple[int, ...]) -> None:
    from scipy.ndimage import gaussian_filter1d

    def gaussian(m: Array) -> Array:
        for axis in range(m.ndim):
            m = gaussian_filter1d(m, 1.0, axis=axis, mode="constant", radius=3)
        return m

    generator = torch.Generator().manual_seed(3)
    clustered = 0
    for _ in range(4):
        a, g = (torch.randn(40, *space, generator=generator, dtype=torch.float64) for _ in range(2))
        a[5:20] = 0.2 * a[5:20] + a[0]
        a = a.relu()
        labels = sort_channels(a.flatten(1))
        clustered += int(labels.max()) >= 0
        for smooth, slow in ((code_filter, slow_code_filter), (gaussian_filter(1.0), gaussian)):
            for settings in ({"weighting": "softmax"}, {"weighting": "linear"}, {"local": True}):
                found = cfcam(a, g, labels, smooth, **settings)
                expected = slow_cfcam(
                    a.numpy(),
                    g.numpy(),
                    slow,
                    softmax=settings.get("weighting") == "softmax",
                    local=bool(settings.get("local")),
                )
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert clustered


def test_rows_through_the_engine() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    names = [
        "cfcam_code",
        "cfcam",
        "cfcam+weighting=softmax",
        "cfcam+local=true",
        "cfcam_code+temperature=0.0001",
    ]
    done = explain(net, x, classes(3), names)
    assert (done.maps["cfcam_code"] >= 0).all()
    assert (done.maps["cfcam"] < 0).any()
    # what the released code does: weights so alike that the map is that of no class
    a, b = done.maps["cfcam_code"][:, 0], done.maps["cfcam_code"][:, 1]
    assert float((a - b).abs().amax() / a.abs().amax()) < 0.05
    cold = done.maps["cfcam_code+temperature=0.0001"]
    assert not torch.allclose(cold[:, 0], cold[:, 1], rtol=0.05)
    linear = done.maps["cfcam"]
    assert not torch.allclose(linear[:, 0], linear[:, 1], rtol=0.05)
    alone = explain(net, x, classes(3)[1:2], ["cfcam"]).maps["cfcam"]
    torch.testing.assert_close(alone[:, 0], linear[:, 1], rtol=1e-5, atol=1e-8)


def test_the_reconstruction_says_so_in_every_form() -> None:
    for name in (
        "cfcam",
        "cfcam+sigma=2",
        "cfcam+weighting=softmax",
        "cfcam+local=true",
        "cfcam+padding=symmetric",
    ):
        info = method(name).info
        assert "(reconstruction)" in info.title
        assert "(reconstruction)" in info.edition
    assert "our extension" in method("cfcam+local=true").info.edition
    assert "no effect" in method("cfcam+padding=symmetric").info.edition
    assert method("cfcam").info.signed
    assert not method("cfcam+weighting=softmax").info.signed
    assert "reconstruction" not in method("cfcam_code").info.title
    with pytest.raises(SpecError, match="softmax"):
        method("cfcam+local=true+weighting=softmax")
    with pytest.raises(SpecError, match="temperature"):
        method("cfcam_code+temperature=0")


def test_a_bad_row_spoils_no_other() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    clean = explain(net, x, classes(3), ["cfcam", "cfcam_code"])
    x[1, 0, 3, 3] = torch.nan
    done = explain(net, x, classes(3), ["cfcam", "cfcam_code"])
    for name, maps in done.maps.items():
        assert maps[1].isnan().all()
        assert (done.flags[name][1] == MapFlag.NOT_FINITE).all()
        torch.testing.assert_close(maps[[0, 2, 3]], clean.maps[name][[0, 2, 3]], rtol=1e-5, atol=1e-8)
