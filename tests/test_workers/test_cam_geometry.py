"""Measured cell centres against receptive-field arithmetic, against back-propagated ones, and against a bright pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.explanation import CellGeometry
from tests.test_workers.tiny_networks import monai_networks
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.geometry import grid_cells, measure_cells
from workers.cam.targets import ResolvedTarget

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MAX = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

Layer = tuple[str, int, int, int, int]
"""Kind, kernel, stride, padding, dilation."""

STACKS: dict[str, list[Layer]] = {
    "same": [("conv", 3, 1, 1, 1), ("conv", 5, 1, 2, 1)],
    "valid": [("conv", 3, 1, 0, 1), ("conv", 4, 1, 0, 1)],
    "strided": [("conv", 3, 2, 1, 1), ("conv", 3, 2, 1, 1), ("conv", 3, 2, 1, 1)],
    "even kernel": [("conv", 2, 2, 0, 1), ("conv", 4, 2, 1, 1)],
    "wide padding": [("conv", 3, 1, 3, 1), ("conv", 3, 2, 4, 1)],
    "dilated": [("conv", 3, 1, 2, 2), ("conv", 3, 2, 3, 3), ("conv", 3, 1, 0, 2)],
    "max": [("conv", 7, 2, 3, 1), ("max", 3, 2, 1, 1), ("conv", 3, 1, 1, 1), ("max", 2, 2, 0, 1)],
    "dilated max": [("max", 3, 1, 1, 2), ("max", 2, 2, 1, 2)],
    "average": [("conv", 3, 1, 1, 1), ("avg", 2, 2, 0, 1), ("avg", 3, 2, 1, 1)],
    "patches": [("conv", 16, 16, 0, 1)],
}


def stack(layers: list[Layer], ndim: int) -> nn.Sequential:
    out: list[nn.Module] = []
    channels = 1
    for kind, k, s, p, d in layers:
        if kind == "conv":
            out += [CONV[ndim](channels, 3, k, s, p, d), nn.ReLU(inplace=True)]
            channels = 3
        elif kind == "max":
            out.append(MAX[ndim](k, s, p, d))
        else:
            out.append(AVG[ndim](k, s, p))
    return nn.Sequential(
        nn.Sequential(*out), nn.AdaptiveMaxPool2d(1) if ndim == 2 else nn.AdaptiveMaxPool3d(1)
    )


def arithmetic(layers: list[Layer]) -> tuple[float, float]:
    """Stride and first centre: a window of k elements d apart that starts p before the first one."""
    step, first = 1.0, 0.5
    for _, k, s, p, d in layers:
        first += step * (d * (k - 1) / 2 - p)
        step *= s
    return step, first


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_follow_receptive_field_arithmetic(name: str, ndim: int) -> None:
    step, first = arithmetic(STACKS[name])
    net = stack(STACKS[name], ndim)
    found = measure_cells(HookedNet(net, "0"), (1, 32, 48, 40)[: ndim + 1])
    assert found.source == "receptive_field"
    assert found.cell_px == pytest.approx([step] * ndim, abs=2e-3)
    assert found.first_centre_px == pytest.approx([first] * ndim, abs=2e-3)
    assert found.shape == tuple(net[0](torch.zeros(1, 1, *(32, 48, 40)[:ndim])).shape[2:])


def test_axes_are_kept_apart() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, (1, 3, 5), stride=(1, 2, 4), padding=(0, 1, 0)))
    found = measure_cells(HookedNet(net, "0"), (1, 6, 20, 30))
    assert found.cell_px == (1, 2, 4)
    assert found.first_centre_px == (0.5, 0.5, 2.5)
    assert found.shape == (6, 10, 7)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [15, 16, 17])
def test_pooling_of_partial_windows(ceil_mode: bool, size: int) -> None:
    for pool in (nn.MaxPool2d(3, 2, ceil_mode=ceil_mode), nn.AvgPool2d(3, 2, 1, ceil_mode=ceil_mode)):
        net = nn.Sequential(pool)
        found = measure_cells(HookedNet(net, "0"), (1, size, size + 4))
        assert found.cell_px == (2, 2)
        assert found.first_centre_px == ((1.5, 1.5) if pool.padding == 0 else (0.5, 0.5))
        assert found.shape == tuple(pool(torch.zeros(1, 1, size, size + 4)).shape[2:])


def test_padding_on_one_side_moves_the_cells() -> None:
    # as EfficientNet pads: nothing before, one after
    net = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 2, 3, stride=2))
    assert measure_cells(HookedNet(net, "1"), (1, 16, 16)).first_centre_px == (1.5, 1.5)


def back_propagated(net: nn.Module, x: Tensor, layer: str, cell: tuple[int, ...]) -> list[float]:
    """Centroid of the ones that a cell sends back to the input."""
    kept: list[Tensor] = []

    def keep(_m: nn.Module, _i: object, out: Tensor) -> None:
        kept.append(out)

    handle = net.get_submodule(layer).register_forward_hook(keep)
    net(x.requires_grad_())
    handle.remove()
    (g,) = torch.autograd.grad(
        kept[0][0].flatten(1)[:, np.ravel_multi_index(cell, kept[0].shape[2:])].sum(), x
    )
    weight = g[0].sum(0)
    places = torch.meshgrid(*(torch.arange(n) + 0.5 for n in weight.shape), indexing="ij")
    return [float((weight * p).sum() / weight.sum()) for p in places]


class Residual(nn.Module):
    """Strided blocks with 1x1 shortcuts, all weights equal and positive, no maximum in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(1, 4, 1, 2, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.c, self.shorter = nn.Conv2d(4, 6, 5, 2, 2, bias=False), nn.Conv2d(4, 6, 1, 2, bias=False)
        self.out = nn.Identity()
        for p in self.parameters():
            nn.init.constant_(p, 1 / p[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(self.a(x)) + self.short(x))
        x = self.pool(x)
        return self.out(torch.relu(self.c(x) + self.shorter(x))).mean((2, 3))  # type: ignore[no-any-return]


def test_cells_lie_where_back_propagated_ones_are_centred() -> None:
    net = Residual()
    found = measure_cells(HookedNet(net, "out"), (1, 64, 96))
    for cell in ((3, 5), (4, 4), (3, 8)):  # no border within their reach
        expected = [f + k * s for f, k, s in zip(found.first_centre_px, cell, found.cell_px, strict=True)]
        assert back_propagated(net, torch.rand(1, 1, 64, 96), "out", cell) == pytest.approx(
            expected, abs=1e-3
        )


def test_known_networks() -> None:
    from monai.networks.nets.resnet import resnet18
    from monai.networks.nets.senet import SEResNet50

    resnet = resnet18(spatial_dims=2, n_input_channels=3, num_classes=2)
    # MONAI's ResNet-18 has stride 16 at its end; 8 px would be the middle of an even grid's first cell, 7.5 px off
    assert measure_cells(HookedNet(resnet, "layer4"), (3, 224, 224)) == CellGeometry(
        shape=(14, 14), cell_px=(16, 16), first_centre_px=(0.5, 0.5), source="receptive_field"
    )
    dense, layer, shape = monai_networks()["densenet-3d"]
    # 7/2 convolution and 3/2 pool keep the centre, the averaging 2/2 transition moves it by half its stride of 4
    assert measure_cells(HookedNet(dense, layer), shape) == CellGeometry(
        shape=(3, 4, 5), cell_px=(8, 8, 8), first_centre_px=(2.5, 2.5, 2.5), source="receptive_field"
    )
    # squeeze-and-excitation gates reach over the whole tile and yet move nothing
    squeeze = SEResNet50(spatial_dims=2, in_channels=3, num_classes=2)
    found = measure_cells(HookedNet(squeeze, "layer4"), (3, 64, 64))
    assert (found.cell_px, found.first_centre_px) == ((32, 32), (2.5, 2.5))


def test_a_layer_of_one_cell_is_measured_on_a_larger_tile() -> None:
    net, layer, _ = monai_networks()["resnet-2d"]
    found = measure_cells(HookedNet(net, layer), (3, 16, 16))
    assert found == CellGeometry(
        shape=(1, 1), cell_px=(16, 16), first_centre_px=(0.5, 0.5), source="receptive_field"
    )


def test_measuring_leaves_the_network_as_it_was() -> None:
    net, layer, shape = monai_networks()["densenet-2d"]
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    measure_cells(HookedNet(net, layer), shape)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())


class Gated(nn.Module):
    """Strided convolutions and a squeeze-and-excitation gate of linear layers, in half precision by its own cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).to(dtype)
        self.gate, self.out = nn.Linear(4, 4).to(dtype), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.to(self.dtype))
        out: Tensor = self.out(y * self.gate(y.mean((2, 3))).sigmoid()[..., None, None])
        return out.mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_moves_no_cell(dtype: torch.dtype) -> None:
    """Coordinates would be rounded to whole pixels: no even grid is found, or another one."""
    net = Gated(dtype)
    before = {k: (v.data_ptr(), v.clone()) for k, v in net.state_dict().items()}
    found = measure_cells(HookedNet(net, "out"), (1, 192, 256))
    assert all(
        v.data_ptr() == before[k][0] and v.dtype == dtype and torch.equal(v, before[k][1])
        for k, v in net.state_dict().items()
    )
    assert found == CellGeometry(
        shape=(48, 64), cell_px=(4, 4), first_centre_px=(0.5, 0.5), source="receptive_field"
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x)
        tokens = grid.flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        out: Tensor = self.out(tokens.mT.reshape(grid.shape))
        return out.mean((2, 3))


class Distorting(nn.Module):
    """Cells that lie at no even spacing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x[:, :, :, [0, 1, 3, 7]])
        return out.mean((2, 3))


@pytest.mark.parametrize(
    "net", [Attention(), Distorting(), nn.Sequential(nn.Conv2d(1, 2, 2), nn.ConvTranspose2d(2, 2, 2))]
)
def test_what_cannot_be_measured_says_grid(net: nn.Module) -> None:
    layer = "1" if isinstance(net, nn.Sequential) else "out"
    found = measure_cells(HookedNet(net, layer), (1, 16, 24))
    assert found == grid_cells(found.shape, (16, 24))
    assert found.source == "grid"


def test_the_even_grid() -> None:
    assert grid_cells((7, 7, 4), (224, 112, 6)) == CellGeometry(
        shape=(7, 7, 4), cell_px=(32, 16, 1.5), first_centre_px=(16, 8, 0.75), source="grid"
    )
    # a layer whose axes are not the tile's says nothing of where
    assert grid_cells((49,), (224, 112)).shape == (1, 1)


def test_a_missing_layer_is_an_error_not_a_grid() -> None:
    with pytest.raises(ModelError, match="near names"):
        measure_cells(HookedNet(Residual(), "outer"), (1, 32, 32))


def test_a_bright_pixel_is_found_at_its_place() -> None:
    from monai.networks.nets.resnet import ResNet

    torch.manual_seed(0)
    net = ResNet(
        "basic", [2, 2, 2, 2], [8, 16, 32, 64], spatial_dims=2, n_input_channels=1, num_classes=1
    ).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    hooked = HookedNet(net, "layer4")
    cells = measure_cells(hooked, (1, 256, 256))
    centres = [
        f + s * torch.arange(n)
        for f, s, n in zip(cells.first_centre_px, cells.cell_px, cells.shape, strict=True)
    ]
    target = (ResolvedTarget("it", 0),)
    for y, x in itertools.product((121, 128, 133), (118, 127, 130)):
        image = torch.zeros(1, 1, 256, 256)
        image[0, 0, y, x] = 1
        raw = explain(hooked, image, target, ["gradcam"]).maps["gradcam"][0, 0]
        found = [float((raw.sum(1 - d) * centres[d]).sum() / raw.sum()) for d in (0, 1)]
        assert found == pytest.approx([y + 0.5, x + 0.5], abs=1.0)
