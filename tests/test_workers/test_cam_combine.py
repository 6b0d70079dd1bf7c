"""Maps of several layers: how they become one, on whose grid, and that one pass gives what a pass a layer does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ModelError, SpecError
from schemas.explanation import CellGeometry, MapFlag
from tests.test_workers.tiny_networks import classes, conv_net, monai_networks, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.combine import combine, minmax, ramp, resample
from workers.cam.explain import explain
from workers.cam.geometry import grid_cells, measure_cells
from workers.cam.layers import sites, stages
from workers.cam.methods import method
from workers.cam.tokens import Layout, TokenLayout
from workers.cam.view import Batch, View


def maps(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("weights", [None, [1, 2, 3], [0.7, 0.2, 0.9]])
def test_equal_maps_combine_to_themselves(weights: list[float] | None) -> None:
    same = [maps(1)[0]] * 3
    torch.testing.assert_close(combine(same, weights, "product"), same[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(combine(same, weights, "sum"), same[0], rtol=1e-12, atol=0)


def test_combination_by_hand() -> None:
    a, b = torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 9.0]])
    np.testing.assert_allclose(combine([a, b]), [[2, 3]], rtol=1e-6)
    np.testing.assert_allclose(combine([a, b], how="sum"), [[2.5, 5]], rtol=1e-6)
    # weights 1 : 3, such as linear-probe accuracies of .2 and .6
    np.testing.assert_allclose(combine([a, b], [0.2, 0.6]), [[4**0.25, 9**0.75]], rtol=1e-6)
    np.testing.assert_allclose(combine([a, b], [0.2, 0.6], "sum"), [[1.75, 7]], rtol=1e-6)
    assert ramp(4) == [0.25, 0.5, 0.75, 1]


def test_a_product_is_zero_where_any_map_is() -> None:
    parts = maps()
    parts[1][0, 2, 3] = 0
    found = combine(parts)
    assert found[0, 2, 3] == 0
    assert int((found == 0).sum()) == 1
    # but for a layer that has no say
    assert (combine(parts, [1, 0, 1]) > 0).all()


def test_a_factor_of_one_layer_is_one_of_the_whole() -> None:
    """Why a product of unscaled maps compares between tiles."""
    parts = maps()
    torch.testing.assert_close(
        combine([parts[0], 1000 * parts[1], parts[2]], [1, 2, 1]), combine(parts, [1, 2, 1]) * 1000**0.5
    )


def test_what_cannot_be_combined() -> None:
    parts = maps(2)
    for weights in ([1.0], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(SpecError, match="for 2 maps: expected as many, none below 0, not all 0"):
            combine(parts, weights)
    with pytest.raises(SpecError, match="negative"):
        combine([parts[0], -parts[1]])
    assert (combine([parts[0], -parts[1]], how="sum") < 0).any()
    parts[0][1, 0, 0] = torch.nan
    assert combine(parts).isnan().sum() == 1


def test_minmax() -> None:
    scaled, flat = minmax(torch.tensor([[[1.0, 2], [3, 5]], [[2, 2], [2, 2]]]))
    np.testing.assert_allclose(scaled.flatten(), [0, 0.25, 0.5, 1, 0, 0, 0, 0])
    assert flat.tolist() == [False, True]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 4, 2)])
def test_resampling_on_even_grids_is_linear_interpolation(shape: tuple[int, ...]) -> None:
    tile, onto = tuple(12 * n for n in shape), tuple(3 * n for n in shape)
    coarse = torch.rand(2, *shape)
    found = resample(coarse, grid_cells(shape, tile), grid_cells(onto, tile))
    mode = ("linear", "bilinear", "trilinear")[len(shape) - 1]
    expected = nn.functional.interpolate(coarse[:, None], onto, mode=mode, align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_resampling_goes_by_where_cells_are() -> None:
    """A ramp over the input is read as that ramp, though the coarse cells' first centre is not half a stride in."""
    coarse = CellGeometry(shape=(5, 1), cell_px=(8, 8), first_centre_px=(0.5, 4), source="receptive_field")
    fine = CellGeometry(shape=(8, 2), cell_px=(4, 4), first_centre_px=(1.5, 2), source="receptive_field")
    centres = 0.5 + 8 * torch.arange(5.0)
    found = resample(centres.view(1, 5, 1), coarse, fine)
    expected = (1.5 + 4 * torch.arange(8.0)).clamp(max=32.5)
    torch.testing.assert_close(found, expected.view(1, 8, 1).expand(1, 8, 2))


def view_of(net: HookedNet, x: Tensor, c: int = 1) -> View:
    target = torch.zeros(1, 3)
    target[0, c] = 1
    with torch.no_grad():
        return View(Batch(net, x, net.forward(x), torch.arange(len(x))), target)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_one_pass_gives_what_a_pass_a_layer_does(ndim: int) -> None:
    net, x = conv_net(ndim, inplace=True), tiles(ndim)
    found = sites(view_of(HookedNet(net, "relu"), x), ["tail.0", "relu", "stem", "body"])
    assert [s.layer for s in found] == ["stem", "body", "relu", "tail.0"], "in the order in which they run"
    for site in found:
        alone = view_of(HookedNet(net, site.layer), x)
        torch.testing.assert_close(site.activations, alone.activations, rtol=0, atol=0)
        torch.testing.assert_close(site.g.flatten(2), alone.g, rtol=1e-5, atol=1e-9)
        assert (site.inputs is None) == (site.layer in ("stem", "relu"))
        if site.inputs is not None:
            torch.testing.assert_close(site.inputs, HookedNet(net, site.layer).given(x), rtol=0, atol=0)
    virtual = sites(view_of(HookedNet(net, "relu"), x), ["body", "relu"], "conv1x1")
    assert all(s.inputs is None for s in virtual), "kept only where a layer's own weights are asked about"
    assert not any(p.grad is not None for p in net.parameters())


def test_the_trunk_before_the_first_layer_records_no_graph() -> None:
    net, x = conv_net(2), tiles(2)
    seen: dict[str, bool] = {}
    for name in ("stem", "body", "tail"):
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.requires_grad})
        )
    view = view_of(HookedNet(net, "relu"), x)
    with torch.no_grad():
        sites(view, ["relu", "body"])
    assert seen == {"stem": False, "body": False, "tail": True}


def test_targets_share_one_pass() -> None:
    net, x = conv_net(2), tiles(2)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    hooked = HookedNet(net, "relu")
    name = "normgrad_layers+layers=stem-relu"
    explain(hooked, x, classes(3)[:1], [name])  # cells are measured once a network
    passes.clear()
    together = explain(hooked, x, classes(3), [name]).maps[name]
    assert len(passes) == 2, "the engine's own, and one for the layers"
    for c in range(3):
        alone = explain(hooked, x, classes(3)[c : c + 1], [name]).maps[name]
        assert torch.equal(alone[:, 0], together[:, c])


def test_parallel_layers() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc((self.left(x) * self.right(x)).mean((2, 3)))
            return out

    net, x = Parallel(), tiles(2)
    left, right = sites(view_of(HookedNet(net, "left"), x), ["left", "right"])
    torch.testing.assert_close(left.g * left.activations, right.g * right.activations, rtol=1e-5, atol=1e-9)


def test_a_row_equals_its_parts() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    name = "normgrad_layers+layers=stem-relu"
    done = explain(net, x, classes(3), [name, f"{name}+combine=sum+weights=ramp", f"{name}+scale=minmax"])
    cells = measure_cells(HookedNet(net.module, "stem"), x.shape[1:])
    fine = explain(HookedNet(net.module, "stem"), x, classes(3), ["normgrad"]).maps["normgrad"].flatten(0, 1)
    coarse = explain(net, x, classes(3), ["normgrad"]).maps["normgrad"].flatten(0, 1)
    own = measure_cells(net, x.shape[1:])
    assert (cells.shape, own.shape) == ((18, 26), (9, 13))
    lifted = resample(coarse, own, cells)
    expected = (fine * lifted).sqrt().reshape(4, 3, 18, 26)
    torch.testing.assert_close(done.maps[name], expected, rtol=1e-4, atol=1e-9)
    weighted = ((fine + 2 * lifted) / 3).reshape(4, 3, 18, 26)
    ramped = done.maps[f"{name}+combine=sum+weights=ramp"]
    torch.testing.assert_close(ramped, weighted, rtol=1e-4, atol=1e-9)
    scaled = minmax(fine)[0] * resample(minmax(coarse)[0], own, cells)
    torch.testing.assert_close(
        done.maps[f"{name}+scale=minmax"], scaled.sqrt().reshape(4, 3, 18, 26), rtol=1e-3, atol=1e-4
    )
    assert method(name).cells(net, x.shape[1:], own) == cells
    assert method(name).cells(net, x.shape[1:], grid_cells(own.shape, x.shape[2:])).source == "grid"
    # the order in which layers are named says nothing
    swapped = explain(net, x, classes(3), ["normgrad_layers+layers=relu-stem"])
    torch.testing.assert_close(
        swapped.maps["normgrad_layers+layers=relu-stem"], done.maps[name], rtol=0, atol=0
    )


class Homogeneous(nn.Module):
    """No bias anywhere: a tile twice as bright has activations twice as large, and the same gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.ReLU())
        self.fc = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.last(self.first(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize(("ndim", "grid"), [(1, (23,)), (2, (18, 26)), (3, (9, 12, 14))])
def test_the_map_lies_on_the_finest_layers_grid(ndim: int, grid: tuple[int, ...]) -> None:
    name = "normgrad_layers+layers=relu-stem"
    net, x = HookedNet(conv_net(ndim), "relu"), tiles(ndim)
    found = explain(net, x, classes(3), [name]).maps[name]
    assert found.shape == (4, 3, *grid)
    assert method(name).cells(net, x.shape[1:], measure_cells(net, x.shape[1:])).shape == grid
    assert (found > 0).any()


def test_values_of_two_tiles_compare_unless_scaled_by_tile() -> None:
    x = tiles(2, batch=1)
    net, x = HookedNet(Homogeneous(), "last"), torch.cat([x, 2 * x])
    names = ["normgrad_layers+layers=first-last", "normgrad_layers+layers=first-last+scale=minmax"]
    plain, scaled = explain(net, x, classes(3), names).maps.values()
    torch.testing.assert_close(plain[1], 2 * plain[0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(scaled[1], scaled[0], rtol=1e-3, atol=1e-4)
    assert "NOT comparable" in method(names[1]).info.edition
    assert "NOT" not in method(names[0]).info.edition


def test_default_layers_are_the_last_of_each_resolution() -> None:
    for name, expected in {
        "resnet-2d": ("layer1", "layer2", "layer3", "layer4"),
        "densenet-2d": ("features.relu0", "features.transition1.conv", "features"),
    }.items():
        module, layer, shape = monai_networks()[name]
        assert stages(HookedNet(module, layer), shape) == expected
    module, _, shape = monai_networks()["resnet-2d"]
    assert stages(HookedNet(module, "layer2"), shape) == ("layer1", "layer2")
    found = explain(HookedNet(module, "layer3"), torch.randn(1, *shape), classes(3)[:1], ["normgrad_layers"])
    grid = measure_cells(HookedNet(module, "layer1"), shape).shape
    assert found.maps["normgrad_layers"].shape == (1, 1, *grid)


def test_real_layers_by_name_whatever_layer_is_explained() -> None:
    net, x = conv_net(2), tiles(2)
    name = "normgrad_layers+at=real+layers=body"
    found = explain(HookedNet(net, "relu"), x, classes(3), [name]).maps[name]
    expected = explain(HookedNet(net, "body"), x, classes(3), ["normgrad_proper"]).maps["normgrad_proper"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_layers_that_cannot_be_combined() -> None:
    net, x = conv_net(2), tiles(2)
    net.add_module("idle", nn.ReLU())
    hooked = HookedNet(net, "relu")
    for layers, message in (
        ("stem-nowhere", "no layer 'nowhere'"),
        ("stem-idle", "'idle' ran 0 times"),
        ("stem-fc", "gives shape|no axis|axes"),
    ):
        with pytest.raises(ModelError, match=message):
            explain(hooked, x, classes(3), [f"normgrad_layers+layers={layers}"])
    with pytest.raises(SpecError, match="geometric mean"):
        method("normgrad_layers+by=sum")
    pair = PairNet(nn.Sequential(net.stem, net.pool, net.body), Tail(net), "cut")
    with pytest.raises(ModelError, match="only in an eager network"):
        explain(pair, x, classes(3), ["normgrad_layers"])


class ChannelsLast(nn.Module):
    """A block as ConvNeXt has it: its inner layers give `(B, h, w, D)`, as many axes as a feature map has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depth, self.inner = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Linear(dim, 2 * dim)
        self.act, self.out = nn.ReLU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.act(self.inner(self.depth(x).movedim(1, -1))))
        return x + y.movedim(-1, 1)


def channels_last_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 4, 4), ChannelsLast(6), nn.Conv2d(6, 10, 2, 2), ChannelsLast(10),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3),
    ).eval()  # fmt: skip


def test_channels_that_come_last_are_no_cells() -> None:
    """Read as (B, K, *grid) they would be chosen as the finest grid, and the map be one of rows by channels."""
    net = HookedNet(channels_last_net(), "3")
    x = torch.randn(2, 2, 32, 48, generator=torch.Generator().manual_seed(0))
    assert stages(net, x.shape[1:]) == ("1", "3")
    name = "normgrad_layers"
    assert explain(net, x, classes(3), [name]).maps[name].shape == (2, 3, 8, 12)
    with pytest.raises(ModelError, match=r"layer '3\.out' gives shape \(2, 4, 6, 10\).*come last"):
        explain(net, x, classes(3), [f"{name}+layers=1-3.out"])


@pytest.mark.parametrize("said", ["channels_last", "channels_first"])
def test_what_the_card_says_of_the_explained_layer_counts(said: Layout) -> None:
    """4 x 4 cells of 4 channels can be read either way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    name = "normgrad_layers+layers=1"
    hooked = HookedNet(net, "1", tokens=TokenLayout(said))
    x = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    if said == "channels_last":
        with pytest.raises(ModelError, match="come last"):
            explain(hooked, x, classes(3), [name])
    else:
        assert explain(hooked, x, classes(3), [name]).maps[name].isfinite().all()


class Tail(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor) -> Tensor:
        out: Tensor = self.net.fc(self.net.tail(a.relu()).flatten(2).mean(2))  # type: ignore[operator]
        return out


def test_noise_on_gradients_reaches_every_layer() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    for name in ("normgrad_layers+layers=stem-relu", "normgrad_meta", "cfcam", "cfcam_code"):
        clean = explain(net, x, classes(3), [name]).maps[name]
        noisy = explain(net, x, classes(3), [name], gradient_noise=0.1).maps[name]
        again = explain(net, x, classes(3), [name], gradient_noise=0.1).maps[name]
        assert torch.equal(noisy, again), name
        assert not torch.equal(noisy, clean), name


def test_a_bad_row_spoils_no_other() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    name = "normgrad_layers+layers=stem-relu"
    clean = explain(net, x, classes(3), [name])
    x[1, 0, 3, 3] = torch.nan
    done = explain(net, x, classes(3), [name])
    assert done.maps[name][1].isnan().all()
    assert (done.flags[name][1] == MapFlag.NOT_FINITE).all()
    torch.testing.assert_close(done.maps[name][[0, 2, 3]], clean.maps[name][[0, 2, 3]], rtol=1e-4, atol=1e-8)
