"""LVM-Med's encoders, with random weights under the published names: what they compute, what is loaded, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from schemas.model import CamLayer
from tests.parity.gradcam_library import declare_torchvision_operators
from tests.test_workers.test_models_embedding import needs_timm, needs_transformers
from tests.test_workers.test_models_loading import card, sha
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.head import linear_head
from workers.cam.targets import resolve
from workers.models.checkpoint import load_weights
from workers.models.cnn import load_model
from workers.models.facts import model_facts
from workers.models.lvm_med import lvm_med, lvm_med_names
from workers.models.sam import Block, SamEncoder

TINY: dict[str, Any] = {
    "dim": 8, "depth": 3, "heads": 2, "patch": 4, "window": 2, "everywhere": [1], "trained_px": 16,
}  # fmt: skip
"""Of a ViT whose windows do not fill a grid of 3 x 5 patches."""
TILE = (12, 20)


def vit(seed: int = 0, **args: Any) -> SamEncoder:
    torch.manual_seed(seed)
    net = lvm_med("vit_b", {**TINY, **args})
    assert isinstance(net, SamEncoder)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.4)  # attention as uneven as a trained one's
    return net.eval()


def tiles(n: int = 3) -> Tensor:
    return torch.randn(n, 3, *TILE, generator=torch.Generator().manual_seed(1))


def slow_attention(net: nn.Module, t: Tensor) -> Tensor:
    """`(h, w, D)`: key by key, with a relative position an axis."""
    h, w, width = t.shape
    state = dict(net.named_parameters())
    size = width // 2
    qkv = t @ state["qkv.weight"].T + state["qkv.bias"]
    out = torch.zeros_like(t)
    for head in range(2):
        q, k, v = (qkv[..., i * width + head * size : i * width + (head + 1) * size] for i in range(3))
        for i in range(h):
            for j in range(w):
                logits = torch.empty(h, w, dtype=t.dtype)
                for a in range(h):
                    for b in range(w):
                        row = resampled(state["rel_pos_h"], h)[i - a + h - 1]
                        column = resampled(state["rel_pos_w"], w)[j - b + w - 1]
                        logits[a, b] = q[i, j] @ (k[a, b] / math.sqrt(size) + row + column)
                weights = logits.flatten().softmax(0).reshape(h, w, 1)
                out[i, j, head * size : (head + 1) * size] = (weights * v).sum((0, 1))
    return out @ state["proj.weight"].T + state["proj.bias"]


def resampled(table: Tensor, n: int) -> Tensor:
    return F.interpolate(table.T[None], size=2 * n - 1, mode="linear")[0].T


def slow(net: SamEncoder, tile: Tensor) -> Tensor:
    """Segment Anything's image encoder of one tile `(3, H, W)`, before its neck: `(D, h, w)`."""
    t = net.patch_embed["proj"](tile[None])[0].permute(1, 2, 0)
    if net.pos_embed is not None:
        grid = F.interpolate(
            net.pos_embed.permute(0, 3, 1, 2), size=t.shape[:2], mode="bilinear", antialias=True
        )
        t = t + grid[0].permute(1, 2, 0)
    for block in net.blocks:
        assert isinstance(block, Block)
        state: Any = dict(block.named_modules())
        x = state["norm1"](t)
        if block.window:
            h, w, _ = x.shape
            s = block.window
            filled = torch.zeros(-(-h // s) * s, -(-w // s) * s, x.shape[2], dtype=x.dtype)
            filled[:h, :w] = x
            for y in range(0, h, s):
                for z in range(0, w, s):
                    filled[y : y + s, z : z + s] = slow_attention(state["attn"], filled[y : y + s, z : z + s])
            x = filled[:h, :w]
        else:
            x = slow_attention(state["attn"], x)
        t = t + x
        t = t + state["mlp.lin2"](F.gelu(state["mlp.lin1"](state["norm2"](t))))
    out: Tensor = t.permute(2, 0, 1)
    return out


@pytest.mark.parametrize("positions", [False, True])
def test_the_encoder_is_that_of_segment_anything(positions: bool) -> None:
    net = vit(positions=positions).double()
    x = tiles(2).double()
    with torch.no_grad():
        maps = HookedNet(net, "features").trunk(x)
        for tile, found in zip(x, maps, strict=True):
            torch.testing.assert_close(found, slow(net, tile), rtol=0, atol=1e-10)
        torch.testing.assert_close(net(x), maps.mean((2, 3)))


@needs_transformers
@needs_timm
def test_the_encoder_is_that_of_transformers() -> None:
    """Their port of Segment Anything, whose image encoder has the same names but for four."""
    declare_torchvision_operators()
    transformers: Any = import_module("transformers")
    net = vit(positions=True, trained_px=24)
    config = transformers.SamVisionConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4, window_size=2,
        global_attn_indexes=[1], mlp_dim=32, output_channels=4, attn_implementation="eager",
    )  # fmt: skip
    reference = transformers.SamVisionModel(config).eval()
    other = {"patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", "norm1": "layer_norm1", "norm2": "layer_norm2"}  # fmt: skip
    state = {}
    for name, value in net.state_dict().items():
        for ours, theirs in other.items():
            name = name.replace(ours, theirs)
        state[f"vision_encoder.{name}"] = value
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not [name for name in missing if "neck" not in name]
    assert not unexpected
    last: list[Any] = []
    reference.vision_encoder.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        reference(x)
        found = HookedNet(net, "features").trunk(x)
    expected = last[0][0] if isinstance(last[0], tuple) else last[0]
    torch.testing.assert_close(found, expected.movedim(-1, 1))


def test_the_layouts_are_the_published_ones() -> None:
    """Names and shapes of ViT-B by Segment Anything's key list; of ResNet-50 the 318 of torchvision's without `fc`."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in lvm_med("vit_b", {"positions": True}).state_dict().items()}
        trunk = {k: tuple(v.shape) for k, v in lvm_med("resnet50", {}).state_dict().items()}
    assert len(shapes) == 171
    assert shapes["pos_embed"] == (1, 64, 64, 768)
    assert shapes["patch_embed.proj.weight"] == (768, 3, 16, 16)
    assert shapes["blocks.11.attn.rel_pos_h"] == shapes["blocks.2.attn.rel_pos_w"] == (127, 64)
    assert shapes["blocks.0.attn.rel_pos_h"] == shapes["blocks.10.attn.rel_pos_w"] == (27, 64)
    assert shapes["blocks.5.attn.qkv.weight"] == (2304, 768)
    assert shapes["blocks.5.mlp.lin1.weight"] == (3072, 768)
    assert len(trunk) == 318
    assert trunk["conv1.weight"] == (64, 3, 7, 7)
    assert trunk["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert trunk["layer4.2.bn3.num_batches_tracked"] == ()
    assert trunk["layer3.5.conv2.weight"] == (256, 256, 3, 3)


def resnet_state(value: float = 0.01) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = lvm_med("resnet50", {}).state_dict()
    return {
        k: torch.full(v.shape, value if v.is_floating_point() else 7).to(v.dtype) for k, v in shapes.items()
    }


def test_the_resnet_in_its_published_and_older_forms() -> None:
    with torch.device("meta"):
        net = lvm_med("resnet50", {})
    state = resnet_state()
    head = {"fc.weight": torch.zeros(4, 2048), "fc.bias": torch.zeros(4)}
    older = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(older) == 265
    for file in (
        state,
        state | head,
        older,
        {f"module.{k}": v for k, v in (state | head).items()},
        {f"backbone.{k}": v for k, v in (state | head).items()},
    ):
        assert lvm_med_names(net, file).keys() == state.keys()
    assert "projection_head.0.weight" in lvm_med_names(
        net, state | {"projection_head.0.weight": head["fc.bias"]}
    )
    broken = {k: v for k, v in older.items() if k != "bn1.running_var"}
    assert set(state) - set(lvm_med_names(net, broken)) == {"bn1.running_var", "bn1.num_batches_tracked"}


def test_the_resnet_through_a_card_is_explained_without_a_backward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lvm_med("resnet50", {}).eval()
    path = tmp_path / "lvmmed_resnet.torch"
    torch.save(net.state_dict(), path)
    network = {"adapter": "lvm_med", "name": "resnet50", "weights": path.name, "sha256": sha(path)}
    model = load_model(card(tmp_path, network, layer="layer4", kind="embedding"), tile=(64, 96))
    x = torch.randn(1, 3, 64, 96)
    assert model.n_outputs == 2048
    assert model.cells.cell_px == (32, 32)
    assert model.cells.shape == (2, 3)
    assert model.net.trunk(x).shape == (1, 2048, 2, 3)
    assert linear_head(model.net, x) is not None
    found = explain(model.net, x, resolve(["5"], model.card.output, 2048), ["gradcam", "hirescam"])
    assert found.maps["hirescam"].shape == (1, 1, 2, 3)
    torch.testing.assert_close(found.maps["hirescam"].sum((1, 2, 3)), model.scores(x)[:, 5])


def wrapped(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v for k, v in state.items()}


SAM_PARTS = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 128),
    "mask_decoder.iou_token.weight": torch.zeros(1, 256),
}
NECK = {
    "neck.0.weight": torch.zeros(4, 8, 1, 1),
    "neck.1.weight": torch.zeros(4),
    "neck.1.bias": torch.zeros(4),
}


@pytest.mark.parametrize("form", ["published", "classifier", "segment anything", "parallel"])
def test_the_vit_in_the_forms_it_is_found_in(tmp_path: Path, form: str) -> None:
    positions = form == "segment anything"
    net = vit(1, positions=positions)
    state = {
        "published": {**net.state_dict(), **NECK},
        "classifier": {**wrapped({**net.state_dict(), **NECK}, "model."), "fc.weight": torch.zeros(4, 8)},
        "segment anything": {**wrapped({**net.state_dict(), **NECK}, "image_encoder."), **SAM_PARTS},
        "parallel": wrapped({**net.state_dict(), **NECK}, "module."),
    }[form]
    path = tmp_path / "lvmmed_vit.pth"
    torch.save(state, path)
    network = {
        "adapter": "lvm_med", "name": "vit_b", "args": {**TINY, "positions": positions},
        "weights": path.name, "sha256": sha(path),
    }  # fmt: skip
    model = load_model(card(tmp_path, network, layer="features", kind="embedding"), tile=TILE)
    assert torch.equal(model.scores(tiles()), net(tiles()))
    assert model.net.trunk(tiles()).shape == (3, 8, 3, 5)
    (target,) = resolve(["2"], model.card.output, 8)
    sums = explain(model.net, tiles(), [target], ["hirescam"]).maps["hirescam"].sum((1, 2, 3))
    torch.testing.assert_close(sums, model.scores(tiles())[:, 2])
    facts = model_facts(
        card(tmp_path, network, layer="features", kind="embedding"), "features", ["2"], tile=TILE
    )
    assert "non-commercial research" in facts.notes[0]
    assert "the card says: CC0" in facts.notes[0]
    # a block of it, whose output lies as (tiles, *grid, channels)
    said = card(tmp_path, network, kind="embedding")
    cam = CamLayer(layer="blocks.2", layout="channels_last")
    inner = load_model(replace(said, card=said.card.model_copy(update={"cam": cam})), tile=TILE)
    assert explain(inner.net, tiles(), [target], ["gradcam"]).maps["gradcam"].shape[2:] == (3, 5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.0.attn.rel_pos_h"},
            "1 missing: blocks.0.attn.rel_pos_h",
        ),
        (lambda s: {**s, "pos_embed": torch.zeros(1, 4, 4, 8)}, "1 unexpected: pos_embed"),
        (
            lambda s: {**s, "projection_head.0.weight": torch.zeros(2)},
            "1 unexpected: projection_head.0.weight",
        ),
        (lambda s: {f"visual.{k}": v for k, v in s.items()}, "unexpected: visual.patch_embed.proj.weight"),
        (lambda s: {**s, "model.blocks.0.norm1.bias": torch.zeros(8)}, "twice"),
        (
            lambda s: {**s, "blocks.0.norm1.bias": torch.zeros(9)},
            "blocks.0.norm1.bias (file [9], network [8])",
        ),
    ],
    ids=["missing", "positions", "head", "prefix", "twice", "shape"],
)
def test_what_has_no_place_is_listed(tmp_path: Path, change: Any, complaint: str) -> None:
    net = vit()
    path = tmp_path / "w.pth"
    torch.save(change({**net.state_dict()}), path)
    with pytest.raises(ModelError) as error:
        load_weights(net, path, sha(path), adapt=lambda state: lvm_med_names(net, state))
    assert complaint in error.value.message


def test_other_parts_are_left_out_where_the_card_lists_them(tmp_path: Path) -> None:
    net = vit()
    path = tmp_path / "w.pth"
    torch.save({**net.state_dict(), "projection_head.0.weight": torch.zeros(2)}, path)
    network: dict[str, Any] = {
        "adapter": "lvm_med", "name": "vit_b", "args": TINY, "weights": path.name, "sha256": sha(path),
        "leave_out": ["projection_head."],
    }  # fmt: skip
    found = load_model(card(tmp_path, network, layer="features", kind="embedding"), tile=TILE)
    assert torch.equal(found.scores(tiles()), net(tiles()))
    network["leave_out"] = ["projection_head.", "decoder."]
    with pytest.raises(
        ModelError, match=r"no entry of the checkpoint begins with decoder\.; they begin with blocks"
    ):
        load_model(card(tmp_path, network, layer="features", kind="embedding"), tile=TILE)


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        ({"name": "resnet18"}, "LVM-Med has 'resnet50'"),
        ({"name": "resnet50", "args": {"widen_factor": 2}}, "without args"),
        ({"name": "vit_b", "args": {"size": 3}}, "cannot be built with args"),
        ({"name": "vit_b", "args": TINY}, "weights is missing"),
    ],
)
def test_cards_that_name_no_encoder(tmp_path: Path, network: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        load_model(card(tmp_path, {"adapter": "lvm_med", **network}, kind="embedding"), tile=TILE)


def test_tiles_that_cannot_be_cut_into_patches() -> None:
    with pytest.raises(ModelError, match="12 x 18 px cannot be cut into patches of 4 px"):
        vit()(torch.zeros(1, 3, 12, 18))
