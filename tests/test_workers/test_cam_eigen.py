"""Eigen-CAM, EigenGradCAM, KPCA-CAM and FEM against closed forms and slow NumPy twins written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.eigen import (
    arbitrary,
    channel_sums,
    eigencam,
    eigengradcam,
    gram,
    larger_side,
    leading,
    positive_sum,
    project,
)
from workers.cam.explain import explain
from workers.cam.fem import fem
from workers.cam.kernel import KernelOptions, kpcacam
from workers.cam.methods import method
from workers.cam.targets import functionals
from workers.cam.view import Batch, View

Array = NDArray[np.float64]

# Two channels of 2 x 2 cells and y = 2 mean(A_1) - mean(A_2), so that g_1 = 1/2 and g_2 = -1/4 everywhere.
A = torch.tensor([[[1.0, 0, 0, 3], [0, 2, 1, 1]]], dtype=torch.float64)
G = torch.tensor([[[0.5] * 4, [-0.25] * 4]], dtype=torch.float64)

AGNOSTIC = ("eigencam", "eigencam+centred=true", "kpcacam", "fem", "fem+form=pgc")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: ArrayLike, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found.double().numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


# Slow twins: one tile, (K, Z).


def slow_eigen(m: Array, centred: bool, by_sum: bool) -> Array:
    points = m.T.copy()
    if centred:
        for k in range(points.shape[1]):
            points[:, k] -= sum(points[:, k]) / len(points)
    _, _, vt = np.linalg.svd(points, full_matrices=True)
    raw = np.array([sum(p[k] * vt[0][k] for k in range(len(p))) for p in points])
    positive = raw.sum() >= 0 if by_sum else abs(raw.max()) >= abs(raw.min())
    return raw if positive else -raw


def slow_kernel(x: Array, y: Array, options: KernelOptions) -> float:
    gamma = options.gamma if options.gamma else 1 / len(x)
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    if options.kernel == "sigmoid":
        return float(np.tanh(gamma * dot + options.coef0))
    if options.kernel == "poly":
        return float((gamma * dot + options.coef0) ** options.degree)
    if options.kernel == "rbf":
        return float(np.exp(-gamma * sum((a - b) ** 2 for a, b in zip(x, y, strict=True))))
    if options.kernel == "cosine":
        return float(dot / np.sqrt((x**2).sum() * (y**2).sum()))
    return float(dot)


def slow_kpca(m: Array, options: KernelOptions) -> Array:
    points = m.T - m.mean(1)
    z = len(points)
    kernel = np.array([[slow_kernel(p, q, options) for q in points] for p in points])
    one = np.full((z, z), 1 / z)
    kernel = kernel - one @ kernel - kernel @ one + one @ kernel @ one
    values, vectors = np.linalg.eig(kernel)
    first = int(values.real.argmax())
    raw = vectors[:, first].real * np.sqrt(values[first].real)
    signed: Array = raw if abs(raw.max()) >= abs(raw.min()) else -raw
    return signed


def slow_fem(m: Array, k: float, library: bool) -> Array:
    out = np.zeros(m.shape[1])
    for channel in m:
        mean = sum(channel) / len(channel)
        deviation = np.sqrt(sum((v - mean) ** 2 for v in channel) / len(channel))
        over = [v > mean + k * deviation for v in channel]
        for z, v in enumerate(channel):
            out[z] += sum(over) / len(over) * v if library else mean * over[z]
    return out


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_method_equals_its_slow_twin(ndim: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=3).double()
    split = HookedNet(net, "relu")
    names = [*AGNOSTIC, "fem+k=0.5", "eigengradcam", "eigengradcam+centred=true"]
    done = explain(split, x, classes(3), names)
    batch = Batch(split, x, split.forward(x), torch.arange(3))
    for c, target in enumerate(functionals(batch.scores, classes(3))[0]):
        view = View(batch, target)
        for b in range(len(x)):
            a, ag = view.a[b].numpy(), (view.a * view.g)[b].numpy()
            expected = {
                "eigencam": slow_eigen(a, False, True),
                "eigencam+centred=true": slow_eigen(a, True, False),
                "eigengradcam": slow_eigen(ag, False, False),
                "eigengradcam+centred=true": slow_eigen(ag, True, False),
                "kpcacam": slow_kpca(a, KernelOptions()),
                "fem": slow_fem(a, 2, False),
                "fem+k=0.5": slow_fem(a, 0.5, False),
                "fem+form=pgc": slow_fem(a, 2, True),
            }
            for name in names:
                np.testing.assert_allclose(
                    done.maps[name][b, c].flatten().numpy(),
                    expected[name],
                    rtol=1e-5,
                    atol=1e-6 * abs(expected[name]).max(),
                    err_msg=name,
                )
                assert done.maps[name].shape[2:] == tuple(split.trunk(x).shape[2:])


def test_toy_closed_forms() -> None:
    v, values = leading(A[0] @ A[0].mT)
    close(v.abs(), [0.8817, 0.4719], 1e-4)
    close(values.sqrt(), [2.0963, 3.4067], 1e-4)
    close(eigencam(A)[0], [[0.8817, 0.9437, 0.4719, 3.1169]], 1e-4)
    close(eigencam(A, centred=True)[0], [[0.2298, -1.2030, -0.9732, 1.9465]], 1e-4)
    # y = 2 mean(A_1) - mean(A_2): A g = (A_1 / 2, -A_2 / 4)
    raw, _ = eigengradcam(A, G)
    close(raw, slow_eigen((A * G)[0].numpy(), False, False)[None])
    assert raw.abs().argmax() == raw.argmax() == 3


def test_fem_of_the_toy() -> None:
    # means 1 and 1, deviations sqrt(3/2) and sqrt(1/2): at k = 1 only 3 of the first and 2 of the second stand out
    close(fem(A, 1), [[0, 1, 0, 1]])
    close(fem(A, 1, library=True), [[0.25, 0.5, 0.25, 1]])
    assert (fem(A, 2) == 0).all(), "of 4 cells none lies more than sqrt(3) deviations above the mean"


def test_fem_of_a_flat_channel_is_nothing() -> None:
    flat = torch.full((1, 1, 9), 0.1)
    assert (fem(flat) == 0).all()
    assert (fem(flat, 0, library=True) == 0).all()


def test_centred_forms_do_not_see_an_offset() -> None:
    a = random(2, 6, 20)
    offset = random(1, 6, 1, seed=1) * 3
    close(eigencam(a + offset, centred=True)[0], eigencam(a, centred=True)[0].numpy(), 1e-9)
    close(kpcacam(a + offset)[0], kpcacam(a)[0].numpy(), 1e-9)
    assert (eigencam(a + offset)[0] - eigencam(a)[0]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4, 30), (30, 4)])
def test_rank_one_gives_the_pattern(shape: tuple[int, int]) -> None:
    k, z = shape
    pattern, strength = random(z).abs(), random(k, seed=1)
    m = (strength[:, None] * pattern)[None]
    close(eigencam(m)[0], (pattern * strength.norm()).numpy()[None], 1e-9)
    close(
        eigengradcam(m, torch.ones_like(m))[0],
        (pattern * strength.norm()).numpy()[None],
        1e-9,
    )
    centred = pattern - pattern.mean()
    centred = centred if centred.max() >= -centred.min() else -centred
    close(eigencam(m, centred=True)[0], (centred * strength.norm()).numpy()[None], 1e-9)


@pytest.mark.parametrize("form", ["eigencam", "centred", "eigengradcam", "kpcacam"])
def test_the_sign_does_not_hang_on_the_solver(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = random(3, 7, 12), random(3, 7, 12, seed=1)

    def raw() -> Tensor:
        if form == "kpcacam":
            return kpcacam(a)[0]
        if form == "eigengradcam":
            return eigengradcam(a, g)[0]
        return eigencam(a, form == "centred")[0]

    found = raw()
    inner = torch.linalg.eigh

    def negated(m: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = inner(m)
        return values, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", negated)
    assert torch.equal(raw(), found)
    assert (found.sum(1) > 0 if form == "eigencam" else found.amax(1) >= -found.amin(1)).all()


def test_a_tie_of_sides_is_settled_by_the_largest_entry() -> None:
    # centred map (-1, 1) x direction (0.6, -0.8): maximum and minimum alike, the largest entry must come out positive
    v = torch.tensor([0.6, -0.8], dtype=torch.float64)
    m = (v[:, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64))[None]
    close(eigencam(m, centred=True)[0], [[1.0, -1.0]])
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    close(larger_side(v, one, -one), -v.numpy())
    close(larger_side(v, one, zero), v.numpy())
    # channels that sum to nothing: rounding must not decide
    close(positive_sum(v, torch.tensor([[1e-17, 0.0], [5.0, 5.0]], dtype=torch.float64)), -v.numpy())


def test_linear_kernel_is_the_centred_form() -> None:
    a = random(3, 9, 14)
    close(kpcacam(a, KernelOptions(kernel="linear"))[0], eigencam(a, centred=True)[0].numpy(), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        KernelOptions(kernel="rbf", gamma=0.3),
        KernelOptions(kernel="poly", degree=2, coef0=0.5),
        KernelOptions(kernel="cosine"),
        KernelOptions(gamma=0.02, coef0=0.0),
    ],
)
def test_kernels_equal_their_slow_twins(options: KernelOptions) -> None:
    a = random(3, 6, 15) + 0.3
    raw, _ = kpcacam(a, options)
    for b in range(len(a)):
        close(raw[b], slow_kpca(a[b].numpy(), options), 1e-8)


def test_kernel_matrices_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random(5, 4, 10)
    whole, doubt = kpcacam(a)
    monkeypatch.setattr("workers.cam.kernel.AT_ONCE", 200)  # two of five
    parts, doubts = kpcacam(a)
    assert torch.equal(whole, parts)
    assert torch.equal(doubt, doubts)


def test_a_kernel_matrix_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ModelError, match=r"has 27000 cells, at most 8192.*eigencam"):
        kpcacam(torch.zeros(1, 2, 30**3))


def test_parts_add_up_over_tiles() -> None:
    a = random(5, 6, 7).abs()
    whole = gram(a)
    close(gram(a[:2]) + gram(a[2:]), whole.numpy())
    close(channel_sums(a[:2]) + channel_sums(a[2:]), channel_sums(a).numpy())
    v, values = leading(whole)
    v = positive_sum(v, channel_sums(a))
    maps = project(a, v)
    # one long tile made of all of them
    long = a.transpose(0, 1).flatten(1)[None]
    close(maps.flatten(), eigencam(long)[0].flatten().numpy(), 1e-9)
    assert not arbitrary(values)


def test_a_weak_or_double_direction_is_doubted() -> None:
    assert arbitrary(torch.tensor([0.99, 1.0])), "second singular value within 1 % of the first"
    assert not arbitrary(torch.tensor([0.9, 1.0]))
    assert arbitrary(torch.tensor([0.1] * 50 + [1.0])), "a sixth of the energy"
    assert not arbitrary(torch.zeros(3)), "no direction at all: the map is 0 and says so itself"


@pytest.mark.parametrize("name", [*AGNOSTIC, "eigengradcam", "kpcacam+kernel=linear", "kpcacam+kernel=rbf"])
def test_flat_activations_never_make_a_picture(name: str) -> None:
    net = conv_net(2)
    with torch.no_grad():
        net.body.weight.zero_()
        assert net.body.bias is not None
        net.body.bias.fill_(0.3)
    done = explain(HookedNet(net, "relu"), tiles(2), classes(3), [name])
    maps = done.maps[name]
    if name in ("eigencam", "eigengradcam"):  # uncentred: a flat map, or the gradient's own shape
        assert maps.isfinite().all()
    else:
        assert (maps == 0).all()
        assert (done.flags[name] == MapFlag.EMPTY | MapFlag.CONSTANT).all()


def test_a_bad_row_spoils_no_other() -> None:
    a, g = random(3, 5, 8), random(3, 5, 8, seed=1)
    bad = a.clone()
    bad[1, 2, 3] = torch.nan
    for clean, dirty in (
        (eigencam(a)[0], eigencam(bad)[0]),
        (eigencam(a, True)[0], eigencam(bad, True)[0]),
        (eigengradcam(a, g)[0], eigengradcam(bad, g)[0]),
        (kpcacam(a)[0], kpcacam(bad)[0]),
        (fem(a), fem(bad)),
    ):
        assert dirty[1].isnan().all()
        assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def test_what_options_change_is_said() -> None:
    assert not method("eigencam").info.signed
    centred = method("eigencam+centred=true").info
    assert centred.signed
    assert "centred" in centred.edition
    with pytest.raises(SpecError, match="kernel"):
        method("kpcacam+kernel=quintic")
    with pytest.raises(SpecError, match="k = "):
        method("fem+k=-1")


def test_a_class_agnostic_map_is_the_same_for_every_class() -> None:
    done = explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), [*AGNOSTIC, "eigengradcam"])
    for name in AGNOSTIC:
        assert not method(name).info.class_specific
        assert torch.equal(done.maps[name][:, 0], done.maps[name][:, 2])
    assert not torch.equal(done.maps["eigengradcam"][:, 0], done.maps["eigengradcam"][:, 2])
