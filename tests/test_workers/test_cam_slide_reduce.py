"""Methods of the whole image, on tensors: sums over tiles against the singular vectors of all cells at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.eigen import eigencam
from workers.cam.eigen_slide import gram_with_sums, on_direction, solve
from workers.cam.explain import explain
from workers.cam.method import Solved
from workers.cam.methods import method
from workers.cam.reduce import collect, reductions
from workers.cam.reduce import solve as solve_method

Array = NDArray[np.float64]

# Two channels of 2 x 2 cells.
A = torch.tensor([[[1.0, 0, 0, 3], [0, 2, 1, 1]]], dtype=torch.float64)

NAMES = (
    "eigencam_slide",
    "eigencam_slide+centred=true",
    "eigengradcam_slide",
    "eigengradcam_slide+centred=true",
)


def slow_maps(tiles_of: Sequence[Array], centred: bool, by_sum: bool) -> tuple[list[Array], float]:
    """From the definition: all cells of all tiles `(K, Z)` as one matrix, its singular vectors, the sign by looking."""
    m = np.concatenate([tile.T for tile in tiles_of])
    mean = m.mean(axis=0) if centred else np.zeros(m.shape[1])
    _, singular, vectors = np.linalg.svd(m - mean, full_matrices=False)
    v = vectors[0]
    along = (m - mean) @ v
    side = along.sum() if by_sum and not centred else ((m - mean).sum(axis=1) * along).sum()
    v = v if side > 0 else -v
    return [(tile.T - mean) @ v for tile in tiles_of], float(singular[0] ** 2 / (singular**2).sum())


def solved_by(
    net: HookedNet, batches: Sequence[Tensor], names: Sequence[str], n: int = 3
) -> dict[str, tuple[Solved, ...]]:
    parts = [collect(net, x, classes(n), names, range(len(x))) for x in batches]
    return {name: solve_method(name, sum(p[name] for p in parts)) for name in names}  # type: ignore[arg-type]


def test_one_tile_by_hand() -> None:
    total = gram_with_sums(A, [0])
    np.testing.assert_array_equal(total, [[10, 3, 4], [3, 6, 4], [4, 4, 4]])
    plain = solve(total, centred=False, by_sum=True)
    np.testing.assert_allclose(plain.state, [0.8817, 0.4719, 0], atol=5e-5)
    np.testing.assert_allclose(on_direction(A, plain.state)[0], [0.8817, 0.9437, 0.4719, 3.1169], atol=5e-5)
    assert plain.cells == 4
    assert plain.explained == pytest.approx(3.4067**2 / (3.4067**2 + 2.0963**2), abs=1e-4)
    centred = solve(total, centred=True, by_sum=True)
    np.testing.assert_allclose(centred.state[:2], [0.9732, -0.2298], atol=5e-5)
    np.testing.assert_allclose(
        on_direction(A, centred.state)[0], [0.2298, -1.2030, -0.9732, 1.9465], atol=5e-5
    )
    assert not plain.doubtful
    assert not centred.doubtful


def test_an_image_of_one_tile_is_that_tile() -> None:
    a = torch.rand(1, 6, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = solve(gram_with_sums(a, [0]), centred=False, by_sum=True).state
    np.testing.assert_allclose(on_direction(a, state), eigencam(a)[0], rtol=1e-9)


def test_tiles_of_one_pattern() -> None:
    # every channel a multiple of one field: the map is that field times the length of the multiples
    generator = torch.Generator().manual_seed(0)
    c, field = torch.rand(7, generator=generator).double(), torch.rand(5, 12, generator=generator).double()
    a = c[None, :, None] * field[:, None]
    found = solve(gram_with_sums(a, range(5)), centred=False, by_sum=True)
    np.testing.assert_allclose(on_direction(a, found.state), c.norm() * field, rtol=1e-9)
    assert found.explained == pytest.approx(1)
    assert not found.doubtful


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("head", ["conv", "gap"])
def test_maps_are_those_of_all_cells_at_once(ndim: int, head: str) -> None:
    net = HookedNet(conv_net(ndim, head=head), "relu")
    batches = [tiles(ndim, 3, seed=s) for s in range(3)]
    states = solved_by(net, batches, NAMES)
    found = [explain(net, x, classes(3), NAMES, states=states) for x in batches]
    for name in NAMES:
        gradient, centred = name.startswith("eigengrad"), "centred" in name
        assert len(states[name]) == (3 if gradient else 1)
        for target in range(3):
            cells = []
            for x in batches:
                split = net.forward(x)
                a = split.activations.detach()
                if gradient:
                    a = a * net.grad(split.scores[:, target], split.activations)
                cells += list(a.flatten(2).double().numpy())
            expected, explained = slow_maps(cells, centred, by_sum=not gradient)
            maps = torch.cat([f.maps[name][:, target] for f in found]).flatten(1)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(maps.numpy(), expected, rtol=0, atol=2e-6 * scale)
            solved = states[name][target if gradient else 0]
            assert solved.explained == pytest.approx(explained, rel=1e-6)
            assert solved.cells == len(cells) * cells[0].shape[1]


def test_the_gradient_form_goes_along_with_hirescam_over_the_image() -> None:
    net = HookedNet(conv_net(2), "relu")
    x = tiles(2, 6)
    name = "eigengradcam_slide"
    states = solved_by(net, [x], [name])
    found = explain(net, x, classes(3), [name, "hirescam"], states=states).maps
    for target in range(3):
        assert float((found[name][:, target] * found["hirescam"][:, target]).sum()) > 0


def test_sums_add_up_whatever_the_batches() -> None:
    net = HookedNet(conv_net(2).double(), "relu")
    x = tiles(2, 7).double()
    whole = collect(net, x, classes(3), NAMES, range(7))
    parts = [collect(net, part, classes(3), NAMES, range(len(part))) for part in (x[:2], x[2:5], x[5:])]
    for name in NAMES:
        np.testing.assert_allclose(sum(p[name] for p in parts), whole[name], rtol=1e-10, atol=1e-12)
        assert whole[name].dtype == torch.float64


def test_more_tiles_than_are_multiplied_at_once() -> None:
    m = torch.randn(19, 3, 5, generator=torch.Generator().manual_seed(1))
    flat = m.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(gram_with_sums(m, range(19))[:3, :3], flat @ flat.T, rtol=1e-12)


def test_rows_that_do_not_count_are_as_if_they_were_not_there() -> None:
    net = HookedNet(conv_net(2), "relu")
    x = tiles(2, 5)
    some = collect(net, x, classes(3), NAMES, [0, 2, 4])
    bad = x.clone()
    bad[1], bad[3] = torch.nan, 1e6
    again = collect(net, bad, classes(3), NAMES, [0, 1, 2, 4])
    for name in NAMES:
        torch.testing.assert_close(again[name], some[name], rtol=0, atol=0)


def test_an_image_without_cells_has_no_state() -> None:
    total = torch.zeros(4, 4, dtype=torch.float64)
    found = solve(total, centred=False, by_sum=True)
    assert found.state.isnan().all()
    assert found.cells == 0
    assert on_direction(torch.ones(1, 3, 2), found.state).isnan().all()


@pytest.mark.parametrize("centred", [False, True])
def test_without_energy_the_map_is_empty(centred: bool) -> None:
    a = torch.full((4, 3, 6), 0.1 if centred else 0.0)
    found = solve(gram_with_sums(a, range(4)), centred=centred, by_sum=True)
    assert (found.state == 0).all()
    assert found.explained == 0
    assert (on_direction(a, found.state) == 0).all()


def test_a_direction_among_equals_is_doubtful() -> None:
    equal = solve(gram_with_sums(torch.eye(6)[None], [0]), centred=False, by_sum=True)
    assert equal.doubtful
    assert equal.explained == pytest.approx(1 / 6)
    net = HookedNet(conv_net(2), "relu")
    x = tiles(2)
    states = {"eigencam_slide": (Solved(torch.ones(6, dtype=torch.float64), 1.0, 0.1, True),)}
    flags = explain(net, x, classes(3), ["eigencam_slide"], states=states).flags["eigencam_slide"]
    assert ((flags & int(MapFlag.DOUBTFUL)) > 0).all()


def test_without_a_state_it_says_what_is_missing() -> None:
    net = HookedNet(conv_net(2), "relu")
    for name in NAMES:
        with pytest.raises(SpecError, match=r"whole image.*reduce\.collect"):
            explain(net, tiles(2), classes(3), [name])
    with pytest.raises(SpecError, match="nothing to sum"):
        collect(net, tiles(2), classes(3), ["gradcam"], [0])


def test_what_is_centred_says_so() -> None:
    plain, centred = (method(name).info for name in NAMES[:2])
    assert not plain.signed
    assert centred.signed
    assert "centred over the image" in centred.edition
    assert all("summed over all tiles" in method(name).info.edition for name in NAMES)


def test_shapes_are_known_beforehand() -> None:
    net = HookedNet(conv_net(2), "relu")
    x = tiles(2, 1)
    found = reductions(net, torch.zeros_like(x), ["gradcam", *NAMES])
    assert list(found) == list(NAMES)
    sums = collect(net, x, classes(3), NAMES, [0])
    for name, reduction in found.items():
        assert reduction.per_target == name.startswith("eigengrad")
        assert tuple(sums[name].shape) == (3 if reduction.per_target else 1, *reduction.collected)
        assert tuple(solve_method(name, sums[name])[0].state.shape) == reduction.state
