"""Cards to networks: digests, strict weights, every adapter, preflight; what comes out is explained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.model import InputSpec, ModelCard
from tests.test_workers.tiny_networks import EVERYWHERE, classes, conv_net, lively
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.geometry import measure_cells
from workers.models.card import LoadedCard
from workers.models.checkpoint import load_weights
from workers.models.cnn import load_model, prepare

ARGS: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 3, "out_channels": 3, "init_features": 8, "growth_rate": 4, "block_config": [2, 2],
}  # fmt: skip
TILE = (40, 56)
PURE = EVERYWHERE


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dense() -> nn.Module:
    from monai.networks.nets.densenet import DenseNet

    torch.manual_seed(0)
    return lively(DenseNet(**ARGS))


def card(folder: Path, network: Mapping[str, Any], *, layer: str = "features", **output: Any) -> LoadedCard:
    value = ModelCard.model_validate(
        {
            "schema": 1, "name": "n", "version": "1", "licence": "CC0", "intended_use": "tests", "network": network,
            "input": {"kind": "slide", "channels": 3, "tile": TILE, "mpp": 0.5, "mean": [0.5], "std": [0.25]},
            "output": output or {"classes": ["a", "b", "c"]},
            "cam": {"layer": layer},
        }
    )  # fmt: skip
    return LoadedCard(value, folder / "model.toml", folder)


def saved(folder: Path, net: nn.Module) -> dict[str, Any]:
    path = folder / "w.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    return {"adapter": "monai", "name": "DenseNet", "args": ARGS, "weights": path.name, "sha256": sha(path)}


def same_maps(found: Any, net: nn.Module, layer: str) -> None:
    x = torch.randn(3, 3, *TILE, generator=torch.Generator().manual_seed(5))
    ours = explain(found.net, x, classes(3), PURE)
    expected = explain(HookedNet(net, layer), x, classes(3), PURE)
    for name in PURE:
        assert torch.equal(ours.maps[name], expected.maps[name]), name
    assert torch.equal(found.scores(x), expected.scores)


def test_a_monai_network_comes_ready(tmp_path: Path) -> None:
    net = dense()
    found = load_model(card(tmp_path, saved(tmp_path, net)))
    same_maps(found, net, "features")
    assert found.n_outputs == 3
    assert found.target_layer == "features"
    assert found.cells == measure_cells(HookedNet(net, "features"), (3, *TILE))
    assert not any(p.requires_grad for p in found.net.module.parameters())
    assert not any(m.training for m in found.net.module.modules())
    assert not found.scores(torch.zeros(1, 3, *TILE)).requires_grad


def test_layer_and_tile_can_be_others_than_the_cards(tmp_path: Path) -> None:
    found = load_model(card(tmp_path, saved(tmp_path, dense())), layer="features.denseblock1", tile=(64, 64))
    assert found.target_layer == "features.denseblock1"
    assert found.cells.shape == (16, 16)


def test_other_bytes_than_the_cards_are_refused(tmp_path: Path) -> None:
    network = saved(tmp_path, dense())
    with (tmp_path / "w.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError) as error:
        load_model(card(tmp_path, network))
    for part in ("model.toml", "w.safetensors", network["sha256"], sha(tmp_path / "w.safetensors")):
        assert part in error.value.message
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(card(tmp_path, network))


def test_random_weights_are_not_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights is missing"):
        load_model(card(tmp_path, {"adapter": "monai", "name": "DenseNet", "args": ARGS}))


def weights(folder: Path, state: Any, suffix: str = ".pt") -> Path:
    path = folder / f"state{suffix}"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"module.{k}": v for k, v in s.items()}],
)
def test_state_dicts_of_any_habit(tmp_path: Path, wrap: Any) -> None:
    net, other = conv_net(2, seed=1), conv_net(2, seed=2)
    path = weights(tmp_path, wrap(net.state_dict()))
    load_weights(other, path, sha(path))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_prefix_that_only_some_keys_carry_is_not_stripped(tmp_path: Path) -> None:
    state = dict(conv_net(2).state_dict())
    state["module.fc.bias"] = state.pop("fc.bias")
    path = weights(tmp_path, state)
    with pytest.raises(ModelError, match=r"1 missing: fc.bias; 1 unexpected: module.fc.bias"):
        load_weights(conv_net(2), path, sha(path))


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = {k: v for k, v in conv_net(2, seed=1).state_dict().items() if not k.startswith("stem")}
    state |= {f"extra{i}": torch.zeros(1) for i in range(12)}
    state["fc.weight"] = torch.zeros(7, 4)
    path = weights(tmp_path, state)
    net = conv_net(2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ModelError) as error:
        load_weights(net, path, sha(path))
    for part in (
        "7 missing: stem.0.weight",
        "12 unexpected: extra0",
        "and 2 more",
        "fc.weight (file [7, 4], network [3, 4])",
    ):
        assert part in error.value.message
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("content", [{"w": Path("an object that is no tensor")}, nn.Linear(2, 2)])
def test_pickles_that_could_run_code_are_refused(tmp_path: Path, content: Any) -> None:
    path = weights(tmp_path, content)
    with pytest.raises(ModelError, match=r"refused; save the state_dict alone"):
        load_weights(conv_net(2), path, sha(path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_broken_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="broken"):
        load_weights(conv_net(2), path, sha(path))
    path = weights(tmp_path, [torch.zeros(2)])
    with pytest.raises(ModelError, match="expected a state dict"):
        load_weights(conv_net(2), path, sha(path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "DenseNett"}, "near names: DenseNet"),
        ({"args": {"spatial_dims": 2}}, "cannot be built with args"),
        ({"args": {**ARGS, "pretrained": True}}, "downloaded unchecked"),
        ({"args": {**ARGS, "out_channels": 5}}, "class_layers.out.weight (file [3, 16], network [5, 16])"),
        ({"args": {**ARGS, "spatial_dims": 3}}, "do not fit DenseNet"),
        ({"adapter": "factory", "name": "DenseNet"}, "written package.module:function"),
        ({"adapter": "factory", "name": "no_such_package.nets:build"}, "cannot be imported"),
        (
            {"adapter": "factory", "name": "tests.test_workers.tiny_networks:conv_nett"},
            "near names: conv_net",
        ),
        (
            {"adapter": "factory", "name": "tests.test_workers.tiny_networks:classes", "args": {"n": 2}},
            "gives tuple",
        ),
    ],
)
def test_networks_that_cannot_be_built(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(card(tmp_path, saved(tmp_path, dense()) | change))
    assert complaint in error.value.message
    assert error.value.message.startswith(str(tmp_path / "model.toml"))


def test_preflight_finds_what_the_card_gets_wrong(tmp_path: Path) -> None:
    network = saved(tmp_path, dense())
    with pytest.raises(ModelError, match=r"names 2 classes \(a, b\), the network gives 3"):
        load_model(card(tmp_path, network, classes=["a", "b"]))
    with pytest.raises(ModelError, match="no layer 'feature'; near names: features"):
        load_model(card(tmp_path, network, layer="feature"))
    with pytest.raises(ModelError, match="name a layer before pooling"):
        load_model(card(tmp_path, network, layer="class_layers.out"))
    with pytest.raises(ModelError, match=r"does not take input of shape \(2, 3, 4, 4\)"):
        load_model(card(tmp_path, network), tile=(4, 4))
    with pytest.raises(ModelError, match="has 3 axes"):
        load_model(card(tmp_path, network), tile=(8, 8, 8))


def test_a_factory_may_bring_its_own_weights(tmp_path: Path) -> None:
    network = {"adapter": "factory", "name": "tests.test_workers.test_models_loading:average"}
    found = load_model(card(tmp_path, network, layer="pool", kind="regression", classes=["r", "g", "b"]))
    assert found.cells.cell_px == (8, 8)
    assert found.cells.first_centre_px == (4, 4)


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(x)
        return out.mean((2, 3))


def average() -> nn.Module:
    return Average()


# programs


def exported(folder: Path, net: nn.Module, *, dynamic: bool = True) -> dict[str, Any]:
    path = folder / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, *TILE),), dynamic_shapes=shapes), path)
    return {"adapter": "export", "weights": path.name, "sha256": sha(path)}


class Residual(nn.Module):
    """A stem and one block with a shortcut and in-place ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh())
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.conv2(torch.sigmoid(self.conv1(x))) + x)
        out: Tensor = self.fc(self.last(x).mean((2, 3)))
        return out


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(Residual())


def test_exported_programs_equal_the_network_wherever_they_are_cut(tmp_path: Path) -> None:
    net = dense()
    network = exported(tmp_path, net)
    for layer in ("features", "features.denseblock1"):
        found = load_model(card(tmp_path, network, layer=layer))
        same_maps(found, net, layer)
        assert found.cells == measure_cells(HookedNet(net, layer), (3, *TILE))


def test_a_cut_inside_a_residual_block_carries_the_shortcut(tmp_path: Path) -> None:
    net = residual()
    network = exported(tmp_path, net)
    for layer in ("conv1", "relu"):
        found = load_model(card(tmp_path, network, layer=layer))
        same_maps(found, net, layer)
        assert found.cells == measure_cells(HookedNet(net, layer), (3, *TILE))
    by_node = load_model(card(tmp_path, network, layer="add"))
    x = torch.rand(3, 3, *TILE)
    assert torch.equal(by_node.net.trunk(x).relu(), HookedNet(net, "relu").trunk(x))


def test_exported_programs_that_cannot_be_used(tmp_path: Path) -> None:
    net = residual()
    network = exported(tmp_path, net)
    with pytest.raises(
        ModelError,
        match=r"no node or submodule 'last9'; near names: last.*Last nodes: .*linear.*Submodules: ",
    ):
        load_model(card(tmp_path, network, layer="last9"))
    with pytest.raises(ModelError, match="Export it for the card's tile with a dynamic batch axis"):
        load_model(card(tmp_path, network, layer="relu"), tile=(64, 64))
    with pytest.raises(ModelError, match="Export it for the card's tile with a dynamic batch axis"):
        load_model(card(tmp_path, exported(tmp_path, net, dynamic=False), layer="relu"))
    with pytest.raises(ModelError, match="exported in training mode"):
        load_model(card(tmp_path, exported(tmp_path, net.train()), layer="relu"))
    (tmp_path / "net.pt2").write_bytes(b"no program")
    broken = {"adapter": "export", "weights": "net.pt2", "sha256": sha(tmp_path / "net.pt2")}
    with pytest.raises(ModelError, match=r"no torch\.export program"):
        load_model(card(tmp_path, broken, layer="relu"))


def test_a_torchscript_pair_equals_the_network(tmp_path: Path) -> None:
    net = dense().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch deprecates TorchScript, files of it live on
        example = torch.randn(2, 3, *TILE)
        trunk, tail = net.get_submodule("features"), net.get_submodule("class_layers")
        torch.jit.trace(trunk, example).save(tmp_path / "trunk.pt")  # type: ignore[no-untyped-call]
        torch.jit.trace(tail, trunk(example)).save(tmp_path / "tail.pt")  # type: ignore[no-untyped-call]
    network = {
        "adapter": "export", "trunk": "trunk.pt", "tail": "tail.pt",
        "trunk_sha256": sha(tmp_path / "trunk.pt"), "tail_sha256": sha(tmp_path / "tail.pt"),
    }  # fmt: skip
    found = load_model(card(tmp_path, network))
    same_maps(found, net, "features")
    assert found.cells == measure_cells(HookedNet(net, "features"), (3, *TILE))
    with pytest.raises(ModelError, match="cut where its card says"):
        load_model(card(tmp_path, network), layer="features.denseblock1")
    with pytest.raises(ModelError, match="sha256 found"):
        load_model(card(tmp_path, network | {"tail_sha256": "0" * 64}))


# prepare

SLIDE = InputSpec(kind="slide", channels=3, tile=(4, 4), mpp=0.5)
VOLUME = InputSpec(kind="volume", channels=1, tile=(2, 3, 4), spacing_mm=(1, 1, 1), window=(-100, 300))
CPU = torch.device("cpu")


def test_uint8_is_scaled_then_standardised_by_channel() -> None:
    spec = SLIDE.model_copy(update={"mean": (0.5, 0.25, 0.0), "std": (0.5, 1.0, 2.0)})
    pixels = np.full((2, 3, 4, 4), 51, np.uint8)
    x = prepare(pixels, spec, CPU)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[1, :, 2, 3].numpy(), [(0.2 - 0.5) / 0.5, 0.2 - 0.25, 0.1], rtol=1e-6)
    assert pixels.max() == 51


def test_a_window_clips_and_a_scale_does_not() -> None:
    values = np.array([-1000, -100, 100, 300, 3000, np.nan], np.float32)
    pixels = np.broadcast_to(values[:, None, None, None, None], (6, 1, 2, 3, 4))
    x = prepare(pixels.copy(), VOLUME, CPU)
    np.testing.assert_array_equal(x[:, 0, 0, 0, 0].numpy(), [0, 0, 0.5, 1, 1, np.nan])
    wide = VOLUME.model_copy(update={"window": None, "scale": (-100.0, 300.0)})
    np.testing.assert_array_equal(
        prepare(pixels.copy(), wide, CPU)[:5, 0, 0, 0, 0].numpy(), [-2.25, 0, 0.5, 1, 7.75]
    )


def test_prepared_input_is_contiguous_and_never_the_callers_array() -> None:
    pixels = np.zeros((2, 4, 4, 3), np.float32).transpose(0, 3, 1, 2)
    x = prepare(pixels, SLIDE, CPU)
    assert x.is_contiguous()
    x += 1
    assert (pixels == 0).all()
    given = torch.zeros(1, 3, 4, 4)
    prepare(given, SLIDE.model_copy(update={"mean": (1.0,)}), CPU)
    assert (given == 0).all()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4, 3), (3, 4, 4), (2, 3, 4, 4, 4)])
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"3 channels, 2 spatial axes"):
        prepare(np.zeros(shape, np.uint8), SLIDE, CPU)
