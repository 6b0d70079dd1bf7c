"""Weighted convolutions: the density they multiply by, what they refuse, and that folding changes nothing but the speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.errors import ModelError
from tests.test_workers.test_models_loading import card, sha
from tests.test_workers.tiny_networks import CONV, EVERYWHERE, TILES, classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.models.cnn import load_model
from workers.models.weighted import (
    PLAIN,
    WeightedConv,
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    density,
    folded,
    weigh,
    weighted_monai,
)

LAYERS: tuple[Any, ...] = (WeightedConv1d, WeightedConv2d, WeightedConv3d)
SETTINGS: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}


def layer(ndim: int, den: list[float], trainable: bool = False, **settings: Any) -> WeightedConv:
    torch.manual_seed(0)
    found: WeightedConv = LAYERS[ndim - 1](4, 6, 2 * len(den) + 1, den=den, trainable=trainable, **settings)
    if found.bias is not None:
        nn.init.normal_(found.bias)
    return found.double()


def pixels(ndim: int) -> Tensor:
    size = TILES[ndim]
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_density_of_one_is_a_plain_convolution(ndim: int) -> None:
    ours = layer(ndim, [1.0, 1.0], **SETTINGS)
    plain = CONV[ndim - 1](4, 6, 5, **SETTINGS).double()
    plain.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    assert torch.equal(ours(pixels(ndim)), plain(pixels(ndim)))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("den", "per_axis"), [([0.5], 2.0), ([0.2, 0.8], 3.0), ([0.25, 0.15, 0.55], 2.9), ([], 1.0)]
)
def test_ones_over_ones_give_the_sum_of_the_density(
    den: list[float], per_axis: float, trainable: bool
) -> None:
    for ndim in (1, 2, 3):
        ours: WeightedConv = LAYERS[ndim - 1](
            1, 1, 2 * len(den) + 1, den=den, trainable=trainable, bias=False
        )
        nn.init.ones_(ours.weight)
        out = ours(torch.ones(1, 1, *[9] * ndim))
        torch.testing.assert_close(out, torch.full_like(out, per_axis**ndim))
        assert out.shape[2:] == (9 - 2 * len(den),) * ndim


def test_the_first_value_is_the_outermost() -> None:
    phi = density(torch.tensor([0.25, 0.5]), 2)
    assert phi[0].tolist() == [0.0625, 0.125, 0.25, 0.125, 0.0625]
    assert phi[2].tolist() == [0.25, 0.5, 1, 0.5, 0.25]
    assert torch.equal(phi, phi.T)


@pytest.mark.parametrize(
    ("size", "den", "complaint"),
    [
        (3, [0.5, 0.5], "den has 2 values, a kernel of 3 takes 1"),
        (5, [0.5], "takes 2"),
        (4, [0.5, 0.5], "one odd size"),
        ((3, 5), [0.5], "one odd size"),
    ],
)
def test_kernels_without_a_density_are_refused(size: Any, den: list[float], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        WeightedConv2d(2, 2, size, den=den)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_folded_it_is_the_same_and_plain(ndim: int, trainable: bool) -> None:
    for settings in ({}, {**SETTINGS, "bias": False}, {"padding_mode": "circular", "padding": 1}):
        ours = layer(ndim, [0.2, 0.8], trainable, **settings)
        plain = folded(ours)
        assert type(plain) is PLAIN[type(ours)]
        torch.testing.assert_close(plain(pixels(ndim)), ours(pixels(ndim)), rtol=0, atol=1e-12)


def test_state_dicts_keep_the_density_under_the_published_names() -> None:
    ours, other = layer(2, [0.2, 0.8]), layer(2, [1.0, 1.0])
    assert list(ours.state_dict()) == ["weight", "bias", "alfa", "Phi"]
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(pixels(2)), ours(pixels(2)))
    learned = layer(2, [0.2, 0.8], trainable=True)
    assert list(learned.state_dict()) == ["weight", "bias", "den"]
    learned(pixels(2)).sum().backward()
    assert learned.den.grad is not None
    assert (learned.den.grad != 0).all()


def test_a_network_is_weighed_and_folded_under_its_own_names() -> None:
    """Every method finds the maps of the weighted network in the plain one, LRP's W' included."""
    net = conv_net(2)
    names = list(net.state_dict())
    before = net(tiles(2))
    weighed = weigh(net, {3: [0.7]})
    assert isinstance(weighed.get_submodule("body"), WeightedConv2d)
    after = weighed(tiles(2))
    assert (after - before).abs().max() > 1e-3
    expected = explain(
        HookedNet(weighed, "relu"), tiles(2), classes(3), ["gradcam", "hirescam", "layercam", "lrp"]
    )
    plain = folded(weighed)
    assert list(plain.state_dict()) == names
    torch.testing.assert_close(plain(tiles(2)), after)
    found = explain(HookedNet(plain, "relu"), tiles(2), classes(3), [*EVERYWHERE, "lrp", "normgrad"])
    for name, maps in expected.maps.items():
        torch.testing.assert_close(found.maps[name], maps)
    with pytest.raises(ModelError, match="no convolution of kernel 5"):
        weigh(conv_net(2), {3: [0.7], 5: [0.1, 0.2]})


def test_a_card_names_a_weighted_network_and_it_is_folded(tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "network": "DenseNet", "den": {"3": [0.7]}, "spatial_dims": 2, "in_channels": 3, "out_channels": 3,
        "init_features": 8, "growth_rate": 4, "block_config": [1, 1],
    }  # fmt: skip
    torch.manual_seed(0)
    net = weighted_monai(**args).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    network = {
        "adapter": "factory", "name": "workers.models.weighted:weighted_monai", "args": args,
        "weights": "w.safetensors", "sha256": sha(tmp_path / "w.safetensors"),
    }  # fmt: skip
    model = load_model(card(tmp_path, network))
    assert not any(isinstance(m, WeightedConv) for m in model.net.module.modules())
    x = torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(model.scores(x), net(x))
    with pytest.raises(ModelError, match="keys are kernel sizes"):
        weighted_monai("DenseNet", {"three": [0.7]})
