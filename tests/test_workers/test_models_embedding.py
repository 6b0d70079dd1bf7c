"""Embeddings read inside a network, and networks of packages that need not be installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.model import BagSpec, CamLayer, NetworkSpec
from tests.parity.gradcam_library import declare_torchvision_operators
from tests.test_workers.test_models_loading import TILE, card, dense, saved, sha
from tests.test_workers.tiny_transformers import tiny_vit, vit_tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.head import linear_head
from workers.cam.targets import ResolvedTarget, TileTarget, resolve
from workers.cam.tokens import TokenLayout
from workers.models.card import LoadedCard, resolved
from workers.models.cnn import load_model
from workers.models.embedding import Embedding
from workers.models.fast import accelerate


def with_cam(loaded: LoadedCard, **cam: Any) -> LoadedCard:
    return replace(loaded, card=loaded.card.model_copy(update={"cam": CamLayer(**cam)}))


def target(index: int, n: int) -> ResolvedTarget:
    from schemas.model import OutputSpec

    (found,) = resolve([str(index)], OutputSpec(kind="embedding"), n)
    return found


def test_a_cnn_gives_the_mean_of_a_layer_and_keeps_its_names(tmp_path: Path) -> None:
    """Explained at that layer the tail is the identity: no backward, and the cells sum to the coordinate."""
    net = dense()
    network = saved(tmp_path, net) | {"embedding": "mean", "embedding_layer": "features"}
    model = load_model(card(tmp_path, network, layer="features", kind="embedding"))
    x = torch.randn(3, 3, *TILE, generator=torch.Generator().manual_seed(5))
    maps = HookedNet(net, "features").trunk(x)
    torch.testing.assert_close(model.scores(x), maps.mean((2, 3)))
    assert list(model.net.module.state_dict()) == list(net.state_dict())
    head = linear_head(model.net, x)
    assert head is not None
    assert torch.equal(head.weight, torch.eye(maps.shape[1]))
    v = torch.randn(3, maps.shape[1])
    found = explain(model.net, x, [TileTarget("slide", v)], ["hirescam"]).maps["hirescam"]
    torch.testing.assert_close(found[:, 0], (maps * v[:, :, None, None]).sum(1) / maps[0, 0].numel())
    earlier = load_model(card(tmp_path, network, layer="features.denseblock1", kind="embedding"))
    assert explain(earlier.net, x, [target(0, 16)], ["gradcam"]).maps["gradcam"].shape == (3, 1, 10, 14)
    torch.testing.assert_close(
        accelerate(earlier.net, "fast-fp32", x).module(x), model.scores(x), rtol=1e-3, atol=1e-4
    )


def test_under_a_bag_head_its_width_is_the_layers(tmp_path: Path) -> None:
    network = saved(tmp_path, dense()) | {"embedding": "mean", "embedding_layer": "features"}
    loaded = card(tmp_path, network, classes=["a", "b"])
    bag = BagSpec(head="mean", weights="h", sha256="0" * 64, features=16)
    assert load_model(replace(loaded, card=loaded.card.model_copy(update={"bag": bag}))).n_outputs == 16
    wrong = bag.model_copy(update={"features": 3})
    with pytest.raises(ModelError, match="the encoder gives 16 numbers a tile"):
        load_model(replace(loaded, card=loaded.card.model_copy(update={"bag": wrong})))


@pytest.mark.parametrize("how", ["class", "mean"])
def test_a_vit_gives_its_class_token_or_the_mean_of_its_patches(how: Any) -> None:
    plain = tiny_vit()
    kept: list[Tensor] = []
    plain.norm.register_forward_hook(lambda _m, _i, out: kept.append(out))
    plain(vit_tiles())
    expected = kept[0][:, 0] if how == "class" else kept[0][:, 3:].mean(1)
    net = tiny_vit()
    Embedding(how, "norm", TokenLayout(prefix_tokens=3, grid=(3, 4))).attach(net)
    torch.testing.assert_close(net(vit_tiles()), expected)
    split = HookedNet(net, "blocks.1", tokens=TokenLayout(prefix_tokens=3, grid=(3, 4)))
    y = expected[:, 5]
    found = explain(split, vit_tiles(), [target(5, 8)], ["gradcam", "hirescam", "attention_relevance"])
    torch.testing.assert_close(found.scores[:, 5], y)
    assert all(m.shape == (3, 1, 3, 4) and m.abs().max() > 0 for m in found.maps.values())


def swin_like() -> nn.Module:
    return SwinLike()


class SwinLike(nn.Module):
    """Feature maps that lie as `(tiles, *grid, channels)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out.movedim(1, -1)


FACTORY = f"{__name__}:swin_like"


@pytest.mark.parametrize(
    ("cam", "network", "complaint"),
    [
        ({}, {"embedding": "mean"}, "parts the tile more evenly"),
        ({"layout": "channels_last"}, {"embedding": "class"}, "has no class token"),
        ({}, {"embedding": "mean", "embedding_layer": "conv9"}, "no layer 'conv9'; near names: conv"),
        ({"layer": "pool"}, {"name": "tests.test_workers.test_models_loading:average", "embedding": "mean"}, "expected feature maps or tokens"),
        ({"layer": "pool"}, {"name": f"{__name__}:idle", "embedding": "mean", "embedding_layer": "other"}, "does not run in a pass"),
    ],
)  # fmt: skip
def test_embeddings_that_cannot_be_read(
    tmp_path: Path, cam: dict[str, Any], network: dict[str, Any], complaint: str
) -> None:
    loaded = card(tmp_path, {"adapter": "factory", "name": FACTORY, **network}, kind="embedding")
    with pytest.raises(ModelError, match=complaint):
        load_model(with_cam(loaded, **{"layer": "conv", **cam}))


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.other = nn.AvgPool2d(8), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(x)
        return out.mean((2, 3))


def idle() -> nn.Module:
    return Idle()


def test_channels_last_is_averaged_over_the_grid(tmp_path: Path) -> None:
    loaded = card(tmp_path, {"adapter": "factory", "name": FACTORY, "embedding": "mean"}, kind="embedding")
    model = load_model(with_cam(loaded, layer="conv", layout="channels_last"), layer="conv")
    x = torch.randn(2, 3, *TILE)
    torch.testing.assert_close(model.scores(x), model.net.module.conv(x).mean((2, 3)))  # type: ignore[operator]


def test_what_is_not_said_leaves_a_cards_identity_as_it_was(tmp_path: Path) -> None:
    network = saved(tmp_path, dense())
    plain = resolved(card(tmp_path, network).card)
    assert set(plain["network"]) == {"adapter", "name", "args", "sha256", "trunk_sha256", "tail_sha256"}
    for more in ({"embedding": "mean", "embedding_layer": "features"}, {"leave_out": ["head."]}):
        assert resolved(card(tmp_path, network | more).card) != plain


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        ({"adapter": "monai", "name": "ViT", "embedding_layer": "norm"}, "needs embedding"),
        ({"adapter": "export", "weights": "p.pt2", "sha256": "0" * 64, "embedding": "mean"}, "says nothing of adapter 'export'"),
        ({"adapter": "monai", "name": "ViT", "config": "c.json", "config_sha256": "0" * 64}, "config says nothing of adapter 'monai'"),
        ({"adapter": "transformers", "config": "c.json"}, "config is given without config_sha256"),
        ({"adapter": "transformers"}, "name is missing"),
    ],
)  # fmt: skip
def test_keys_that_contradict_the_adapter(network: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NetworkSpec.model_validate(network)


# timm and transformers

# Not in the test extra: MONAI imports transformers where it is installed, which takes seconds.
EXTRAS = (
    "extras that are not there; to run this: pip install -c deploy/constraints.txt transformers && "
    "pip install --no-deps -c deploy/constraints.txt timm torchvision==0.28.0"
)
needs_timm = pytest.mark.skipif(find_spec("timm") is None or find_spec("torchvision") is None, reason=EXTRAS)
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason=EXTRAS)
VIT = {"img_size": list(TILE), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
HF: dict[str, Any] = {
    "image_size": [40, 56], "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        ({"adapter": "timm", "name": "vit_tiny", "args": {"pretrained": True}}, "nothing is downloaded"),
        ({"adapter": "timm", "name": "hf-hub:owner/name"}, "nothing is downloaded"),
        ({"adapter": "transformers", "name": ""}, "name is missing"),
    ],
)
def test_nothing_is_downloaded(tmp_path: Path, network: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError if complaint == "name is missing" else ModelError, match=complaint):
        load_model(card(tmp_path, network))


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_package_that_is_not_there_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"pip install 'gigacam\[{package}\]'"):
        load_model(card(tmp_path, {"adapter": package, "name": "vit"}))


def write(folder: Path, net: nn.Module, rename: Callable[[str], str] = str, more: Mapping[str, Tensor] = {}) -> dict[str, str]:  # fmt: skip
    save_file(
        {rename(k): v.contiguous() for k, v in net.state_dict().items()} | dict(more),
        folder / "w.safetensors",
    )
    return {"weights": "w.safetensors", "sha256": sha(folder / "w.safetensors")}


@needs_timm
def test_a_vit_of_timm_is_explained_by_its_tokens(tmp_path: Path) -> None:
    declare_torchvision_operators()
    timm: Any = import_module("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    network = {"adapter": "timm", "name": "vit_tiny_patch16_224", "args": VIT, **write(tmp_path, net)}
    model = load_model(card(tmp_path, network, layer="blocks.1.norm1", kind="embedding"))
    x = torch.randn(2, 3, *TILE)
    assert torch.equal(model.scores(x), net(x))
    lies = model.net.arrangement(x)
    assert (lies.layout, lies.prefix, lies.grid) == ("tokens", 1, (5, 7))
    found = explain(model.net, x, [target(3, 24)], ["gradcam", "hirescam", "rollout"]).maps
    tokens: list[Tensor] = []
    net.blocks[1].norm1.register_forward_hook(lambda _m, _i, out: tokens.append(out.requires_grad_()))
    (g,) = torch.autograd.grad(net.requires_grad_(False)(x)[:, 3].sum(), tokens)
    a, g = (t[:, 1:].mT.reshape(2, 24, 5, 7) for t in (tokens[0].detach(), g))
    torch.testing.assert_close(found["hirescam"][:, 0], (a * g).sum(1))
    torch.testing.assert_close(found["gradcam"][:, 0], (a * g.mean((2, 3), True)).sum(1))
    with pytest.raises(ModelError, match=r"is none of timm .*; near names: vit_tiny_patch16_224"):
        load_model(card(tmp_path, network | {"name": "vit_tiny_patch16_244"}, kind="embedding"))
    with pytest.raises(ModelError, match="cannot be built with args"):
        load_model(card(tmp_path, network | {"args": {"depths": 3}}, kind="embedding"))


@needs_transformers
@pytest.mark.parametrize("how", ["class", "mean", ""])
def test_a_vit_of_transformers_is_explained_by_its_tokens(tmp_path: Path, how: str) -> None:
    """From a checkpoint of the classifier: the encoder's own name is taken off, the head left out by name."""
    transformers: Any = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**HF)
    net = transformers.ViTModel(config, add_pooling_layer=not how).eval()
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.2)
    (tmp_path / "config.json").write_text(
        json.dumps({**config.to_dict(), "auto_map": {"AutoModel": "evil.py"}})
    )
    network = {
        "adapter": "transformers", "config": "config.json", "config_sha256": sha(tmp_path / "config.json"),
        "embedding": how, "leave_out": ["classifier."],
        **write(tmp_path, net, "vit.{}".format, {"classifier.weight": torch.zeros(2, 24)}),
    }  # fmt: skip
    layer = next(n for n, m in net.named_modules() if n.endswith("1.layernorm_before"))
    model = load_model(card(tmp_path, network, layer=layer, kind="embedding"))
    x = torch.randn(2, 3, *TILE)
    out = net(x)
    tokens = out.last_hidden_state
    expected = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "": out.pooler_output}[how]
    torch.testing.assert_close(model.scores(x), expected)
    lies = model.net.arrangement(x)
    assert (lies.layout, lies.prefix, lies.grid) == ("tokens", 1, (5, 7))
    found = explain(model.net, x, [target(3, 24)], ["gradcam", "attention_relevance"]).maps
    assert all(m.shape == (2, 1, 5, 7) and m.abs().max() > 0 for m in found.values())
    other = card(
        tmp_path,
        network | {"config": "", "config_sha256": "", "name": "vit", "args": HF},
        layer=layer,
        kind="embedding",
    )
    torch.testing.assert_close(load_model(other).scores(x), expected)


@needs_transformers
@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        ({"name": "google/vit-base-patch16-224"}, "nothing is downloaded"),
        ({"name": "vitt"}, "nothing is downloaded"),
        ({"name": "vit", "args": {"hiden_size": 24}}, "takes no argument hiden_size"),
        ({"name": "vit", "args": {"hidden_size": "wide"}}, "no model that transformers"),
        ({"name": "dinov2", "config": "c.json"}, "c.json says 'vit'"),
        ({"config": "d.json"}, "says no model_type"),
    ],
)
def test_models_that_transformers_cannot_build(
    tmp_path: Path, network: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "c.json").write_text('{"model_type": "vit"}')
    (tmp_path / "d.json").write_text("{}")
    if "config" in network:
        network = network | {"config_sha256": sha(tmp_path / network["config"])}
    with pytest.raises(ModelError, match=complaint):
        load_model(card(tmp_path, {"adapter": "transformers", **network}, kind="embedding"))
