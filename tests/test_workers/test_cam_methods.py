"""CAM methods against closed forms, and against slow loops written from the definitions in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import ModelError, SpecError
from schemas.explanation import MapFlag
from schemas.model import OutputSpec
from tests.test_workers.tiny_networks import EVERYWHERE, classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.eigen import eigencam
from workers.cam.explain import explain
from workers.cam.gradient import gradcam, gradcampp, hirescam, layercam, xgradcam
from workers.cam.head import linear_head
from workers.cam.methods import METHODS
from workers.cam.targets import ResolvedTarget, functionals, resolve
from workers.cam.view import Batch, View

Array = NDArray[np.float64]

# Two channels of 2 x 2 cells and y = 2 mean(A_1) - mean(A_2), so that g_1 = 1/2 and g_2 = -1/4 everywhere.
A = torch.tensor([[[1.0, 0, 0, 3], [0, 2, 1, 1]]], dtype=torch.float64)
G = torch.tensor([[[0.5] * 4, [-0.25] * 4]], dtype=torch.float64)


def close(found: Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found.double().numpy().ravel(), expected, rtol=tolerance, atol=tolerance)


def test_closed_forms() -> None:
    close(gradcam(A, G), [0.5, -0.5, -0.25, 1.25])
    close(hirescam(A, G), [0.5, -0.5, -0.25, 1.25])
    close(layercam(A, G), [0.5, 0, 0, 1.5])
    close(xgradcam(A, G), [0.5, -0.5, -0.25, 1.25])
    plus, doubtful = gradcampp(A, G)
    close(plus, [0.5, 0, 0, 1.5])
    assert not doubtful.any()
    eigen, _ = eigencam(A)
    close(eigen, [0.8817, 0.9437, 0.4719, 3.1169], tolerance=1e-4)


def test_gradcampp_weight_by_hand() -> None:
    # one channel, S = 4, g = (1, 1/2): alpha = 1/(2 + 4 g) = (1/6, 1/4), weight = 1/6 + 1/8
    plus, _ = gradcampp(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 0.5]]]))
    close(plus, [7 / 24, 7 / 8], tolerance=1e-6)


def test_gradcampp_where_the_denominator_vanishes() -> None:
    # S = -2, g = 1: 2 + S g = 0, so alpha = g^2 = 1 and the weight is 1
    a, g = torch.tensor([[[-2.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    plus, doubtful = gradcampp(a, g)
    close(plus, [-2, 0])
    assert doubtful.all()


def test_xgradcam_of_a_channel_that_sums_to_nothing_is_zero() -> None:
    close(xgradcam(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[3.0, 5.0]]])), [0, 0])


# Slow replicas: one tile, arrays (K, *grid), one cell at a time.


def slow_gradcam(a: Array, g: Array) -> Array:
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        weight = sum(g[k][u] for u in np.ndindex(out.shape)) / out.size
        for u in np.ndindex(out.shape):
            out[u] += weight * a[k][u]
    return out


def slow_hirescam(a: Array, g: Array) -> Array:
    out = np.zeros(a.shape[1:])
    for k, u in itertools.product(range(len(a)), np.ndindex(out.shape)):
        out[u] += g[k][u] * a[k][u]
    return out


def slow_layercam(a: Array, g: Array) -> Array:
    out = np.zeros(a.shape[1:])
    for k, u in itertools.product(range(len(a)), np.ndindex(out.shape)):
        out[u] += max(g[k][u], 0.0) * a[k][u]
    return out


def slow_xgradcam(a: Array, g: Array) -> Array:
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        total = a[k].sum()
        weight = sum(a[k][u] / total * g[k][u] for u in np.ndindex(out.shape)) if total else 0.0
        for u in np.ndindex(out.shape):
            out[u] += weight * a[k][u]
    return out


def slow_gradcampp(a: Array, g: Array) -> Array:
    """Equation 19 of the paper as printed, with its second and third derivatives g^2 and g^3."""
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        weight = 0.0
        for u in np.ndindex(out.shape):
            denominator = 2 * g[k][u] ** 2 + a[k].sum() * g[k][u] ** 3
            alpha = g[k][u] ** 2 / (denominator if denominator else 1.0)
            weight += alpha * max(g[k][u], 0.0)
        for u in np.ndindex(out.shape):
            out[u] += weight * a[k][u]
    return out


def slow_eigencam(a: Array, _: Array) -> Array:
    m = a.reshape(len(a), -1).T
    u, s, _vt = np.linalg.svd(m, full_matrices=False)
    projected = u[:, 0] * s[0]
    signed: Array = projected if projected.sum() >= 0 else -projected
    return signed.reshape(a.shape[1:])


SLOW: dict[str, Callable[[Array, Array], Array]] = {
    "gradcam": slow_gradcam,
    "hirescam": slow_hirescam,
    "layercam": slow_layercam,
    "xgradcam": slow_xgradcam,
    "gradcampp": slow_gradcampp,
    "eigencam": slow_eigencam,
}


def end_to_end(net: nn.Module, x: Tensor, c: int) -> tuple[Array, Array]:
    """Activations and gradients of `relu` by differentiating the whole network, `(B, K, *grid)`."""
    kept: list[Tensor] = []

    def keep(_m: nn.Module, _i: object, out: Tensor) -> None:
        kept.append(out)

    handle = net.get_submodule("relu").register_forward_hook(keep)
    scores = net(x.clone().requires_grad_())
    handle.remove()
    (g,) = torch.autograd.grad(scores[:, c].sum(), kept[0])
    return kept[0].detach().numpy(), g.numpy()


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_method_equals_its_slow_twin(ndim: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=3).double()
    done = explain(HookedNet(net, "relu"), x, classes(3), list(SLOW))
    for c in range(3):
        a, g = end_to_end(net, x, c)
        for name, slow in SLOW.items():
            for b in range(len(x)):
                expected = slow(a[b], g[b])
                # maps are handed over in float32: half a unit in the last place, and room for cancellation
                np.testing.assert_allclose(
                    done.maps[name][b, c].numpy(),
                    expected,
                    rtol=1e-6,
                    atol=1e-6 * abs(expected).max(),
                    err_msg=name,
                )
    np.testing.assert_allclose(done.scores.numpy(), net(x).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_maps_over_a_linear_tail_sum_to_the_score_without_bias(ndim: int) -> None:
    net, x = conv_net(ndim, head="gap"), tiles(ndim)
    done = explain(HookedNet(net, "relu"), x, classes(3), ["cam", "hirescam", "gradcam", "xgradcam"])
    contribution = (done.scores - net.fc.bias.detach())[..., None].expand(-1, -1, 1).squeeze(-1)
    for name, maps in done.maps.items():
        # float32 sums of a few hundred products
        torch.testing.assert_close(maps.flatten(2).sum(2), contribution, rtol=1e-5, atol=1e-6, msg=name)
    # and cell by cell: Grad-CAM = HiResCAM = CAM, all W[c] / Z
    a = end_to_end(net, x, 0)[0]
    expected = np.einsum("ck,bk...->bc...", net.fc.weight.detach().numpy(), a) / a[0, 0].size
    for name in ("cam", "hirescam", "gradcam"):
        np.testing.assert_allclose(done.maps[name].numpy(), expected, rtol=1e-4, atol=1e-7)


def test_cam_is_refused_where_its_head_is_not_proven() -> None:
    with pytest.raises(ModelError, match=r"'cam' needs .*'gradcam' or 'hirescam'"):
        explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), ["cam"])


def test_cam_of_one_logit_is_signed() -> None:
    net = conv_net(2, head="gap", classes=1)
    targets = resolve(["all"], OutputSpec(kind="logit", classes=("no", "yes")), 1)
    done = explain(HookedNet(net, "relu"), tiles(2), targets, ["cam", "gradcam"])
    assert torch.equal(done.maps["cam"][:, 0], -done.maps["cam"][:, 1])
    torch.testing.assert_close(done.maps["cam"], done.maps["gradcam"], rtol=1e-5, atol=1e-7)
    assert done.target_index.tolist() == [[0, 1]] * 4


def test_methods_at_once_equal_each_alone() -> None:
    net, x = HookedNet(conv_net(2, head="gap"), "relu"), tiles(2)
    names = ("cam", *EVERYWHERE)
    together = explain(net, x, classes(3), names)
    for name in names:
        assert torch.equal(together.maps[name], explain(net, x, classes(3), [name]).maps[name]), name


def test_shapes_and_types() -> None:
    done = explain(HookedNet(conv_net(3), "relu"), tiles(3), classes(3)[:2], ["gradcam", "eigencam"])
    for maps in done.maps.values():
        assert maps.shape == (4, 2, 4, 6, 7)
        assert maps.dtype == torch.float32
        assert not maps.requires_grad
    assert done.scores.shape == (4, 3)
    assert not done.scores.requires_grad


def test_rows_are_independent() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    methods = list(SLOW)
    done, permuted = explain(net, x, classes(3), methods), explain(net, x[order], classes(3), methods)
    again = explain(net, x, classes(3), methods)
    for name in methods:
        assert torch.equal(done.maps[name], again.maps[name]), "equal input of equal shape gives equal bits"
        scale = float(done.maps[name].abs().max())
        # a row may round differently at another place of the batch
        torch.testing.assert_close(permuted.maps[name], done.maps[name][order], rtol=0, atol=1e-5 * scale)


def test_predicted_equals_the_explicit_class() -> None:
    net, x = conv_net(2), tiles(2, batch=12)
    with torch.no_grad():
        net.fc.bias.sub_(net(x).mean(0))  # so that no class wins everywhere
    output = OutputSpec(classes=("a", "b", "c"))
    done = explain(
        HookedNet(net, "relu"), x, resolve(["predicted", "all"], output, 3), ["gradcam", "layercam"]
    )
    predicted = done.target_index[:, 0].long()
    assert len(set(predicted.tolist())) > 1, "a batch of one class would not show a mix-up"
    rows = torch.arange(len(x))
    for maps in done.maps.values():
        torch.testing.assert_close(maps[:, 0], maps[rows, 1 + predicted], rtol=1e-6, atol=0)


def test_a_bad_row_is_flagged_and_spoils_no_other() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    clean = explain(net, x, classes(3), list(SLOW))
    x[1, 0, 3, 3] = torch.nan
    done = explain(net, x, classes(3), list(SLOW))
    for name, maps in done.maps.items():
        assert maps[1].isnan().all(), name
        assert (done.flags[name][1] == MapFlag.NOT_FINITE).all()
        others = [0, 2, 3]
        torch.testing.assert_close(maps[others], clean.maps[name][others], rtol=1e-5, atol=1e-7)
        assert not (done.flags[name][others] & MapFlag.NOT_FINITE).any()


class Infinite(torch.autograd.Function):
    """A finite value with an infinite gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * torch.inf


def test_an_infinite_gradient_is_flagged() -> None:
    net = conv_net(2)
    inner = net.tail.forward
    net.tail.forward = lambda x: Infinite.apply(inner(x))  # type: ignore[method-assign,no-untyped-call]
    done = explain(HookedNet(net, "relu"), tiles(2), classes(3), ["gradcam", "eigencam"])
    assert done.maps["gradcam"].isnan().all()
    assert (done.flags["gradcam"] == MapFlag.NOT_FINITE).all()
    assert done.maps["eigencam"].isfinite().all()


def test_a_map_without_evidence_is_flagged_empty_not_nan() -> None:
    net = conv_net(2, head="gap")
    with torch.no_grad():
        net.fc.weight.fill_(-1)
    done = explain(HookedNet(net, "relu"), tiles(2), classes(3), ["gradcam", "layercam"])
    assert (done.maps["gradcam"] <= 0).all()
    assert (done.flags["gradcam"] == MapFlag.EMPTY).all()
    assert (done.flags["layercam"] == MapFlag.EMPTY | MapFlag.CONSTANT).all()


def test_dead_activations_give_zero_maps_that_say_so() -> None:
    net = conv_net(2)
    with torch.no_grad():
        net.body.weight.zero_()
        assert net.body.bias is not None
        net.body.bias.fill_(-1)
    done = explain(HookedNet(net, "relu"), tiles(2), classes(3), list(SLOW))
    for name, maps in done.maps.items():
        assert (maps == 0).all(), name
        assert (done.flags[name] == MapFlag.EMPTY | MapFlag.CONSTANT).all(), name


def test_a_single_cell_is_flagged() -> None:
    net = conv_net(2, head="gap")
    done = explain(HookedNet(net, "relu"), torch.randn(2, 2, 2, 2), classes(3), ["gradcam", "eigencam"])
    assert done.maps["gradcam"].shape == (2, 3, 1, 1)
    for flags in done.flags.values():
        assert (flags & MapFlag.SINGLE_CELL).all()
        assert not (flags & MapFlag.CONSTANT).any()


def test_unknown_method_and_no_target() -> None:
    net = HookedNet(conv_net(2), "relu")
    with pytest.raises(SpecError, match="did you mean gradcam"):
        explain(net, tiles(2), classes(3), ["grad-cam"])
    with pytest.raises(SpecError, match="no target"):
        explain(net, tiles(2), (), ["gradcam"])


def test_eigencam_of_rank_one_is_the_pattern() -> None:
    pattern = torch.tensor([0.0, 1, 2, 5, 3], dtype=torch.float64)
    strength = torch.tensor([2.0, 0.5, 1], dtype=torch.float64)
    raw, doubtful = eigencam((strength[:, None] * pattern)[None])
    close(raw, (pattern * strength.norm()).tolist())
    assert not doubtful.any()


@pytest.mark.parametrize("shape", [(3, 40), (40, 3)])
def test_eigencam_sign_is_fixed_and_both_gram_sides_agree_with_svd(shape: tuple[int, int]) -> None:
    a = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.4
    raw, _ = eigencam(a)
    negated, _ = eigencam(-a)
    for b in range(len(a)):
        expected = slow_eigencam(a[b].numpy(), a[b].numpy())
        np.testing.assert_allclose(raw[b].numpy(), expected, atol=1e-10)
        # the map of -A has to have a positive sum as well: v1 is the same up to its sign, and so is the map
        np.testing.assert_allclose(negated[b].numpy(), expected, atol=1e-10)
    assert (raw.sum(1) > 0).all()


def test_eigencam_doubts_a_direction_that_is_arbitrary() -> None:
    twins = torch.eye(2, dtype=torch.float64)[None]  # equal singular values
    assert eigencam(twins)[1].all()


def test_the_tables_facts() -> None:
    units = {
        "gradcam": "logit/cell", "hirescam": "logit", "cam": "logit", "layercam": "1", "gradcampp": "1",
        "xgradcam": "1", "eigencam": "1",
    }  # fmt: skip
    done = explain(HookedNet(conv_net(2, head="gap"), "relu"), tiles(2), classes(3), list(units))
    for name, unit in units.items():
        info = METHODS[name].info
        assert (info.name, info.unit) == (name, unit)
        assert bool((done.maps[name] < 0).any()) == info.signed, name


def test_without_a_gradient_where_the_head_is_proven_linear() -> None:
    net, x = HookedNet(conv_net(2, head="gap", classes=70), "relu"), tiles(2)
    assert linear_head(net, x) is not None
    for name in ("gradcam", "hirescam", "layercam", "gradcampp", "xgradcam"):
        found = explain(net, x, classes(70), [name])
        views = views_of(net, x, classes(70))
        expected = torch.stack([METHODS[name].raw(v, METHODS[name].options)[0] for v in views], dim=1)
        expected = expected.reshape(found.maps[name].shape)
        torch.testing.assert_close(
            found.maps[name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
        )


def views_of(net: HookedNet, x: Tensor, targets: Sequence[ResolvedTarget]) -> list[View]:
    batch = Batch(net, x, net.forward(x), torch.arange(len(x)))
    return [View(batch, w) for w in functionals(batch.scores, targets)[0]]


def test_a_head_that_stops_being_linear_is_differentiated() -> None:
    net, x = conv_net(2, head="gap"), tiles(2)
    split = HookedNet(net, "relu")
    assert linear_head(split, x) is not None
    with torch.no_grad():
        net.fc.bias.add_(1)  # what was proven no longer gives these scores
    found = explain(split, x, classes(3), ["gradcam"]).maps["gradcam"]
    torch.testing.assert_close(
        found, explain(HookedNet(net, "relu"), x, classes(3), ["gradcam"]).maps["gradcam"]
    )
    assert linear_head(HookedNet(conv_net(2), "relu"), x) is None
