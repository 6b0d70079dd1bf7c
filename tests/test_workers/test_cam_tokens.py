"""Tokens as feature maps: layouts read right or refused, CAM methods on tokens equal slow loops, blind layers named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from schemas.model import CamLayer, ModelCard
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from tests.test_workers.tiny_transformers import (
    GRIDS,
    PATCH,
    VIT_TILES,
    TinyViT,
    monai_vit,
    swin,
    tiny_vit,
    vit_tiles,
)
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.geometry import measure_cells
from workers.cam.reach import check_tokens
from workers.cam.tokens import Arrangement, Layout, TokenLayout, looks_channels_last
from workers.models.card import LoadedCard, load_card, write_card
from workers.models.cnn import load_model

Array = NDArray[np.float64]
TOKENS = TokenLayout("tokens", 3)


@pytest.mark.parametrize("grid", GRIDS.values())
@pytest.mark.parametrize("layout", ["tokens", "channels_last", "channels_first"])
def test_layouts_there_and_back(grid: tuple[int, ...], layout: Layout) -> None:
    prefix = 2 if layout == "tokens" else 0
    lies = Arrangement(layout, prefix, grid)
    z = int(np.prod(grid))
    shape = {"tokens": (2, prefix + z, 5), "channels_last": (2, *grid, 5), "channels_first": (2, 5, *grid)}[
        layout
    ]
    output = torch.randn(shape)
    found = lies.encode(output)
    assert found.shape == (2, 5, *grid)
    for k, u in np.ndindex(5, z):
        at = np.unravel_index(u, grid)
        index = {"tokens": (prefix + u, k), "channels_last": (*at, k), "channels_first": (k, *at)}[layout]
        assert torch.equal(found[(slice(None), k, *at)], output[(slice(None), *index)])
    assert torch.equal(lies.decode(found, output), output)
    doubled = lies.decode(2 * found, output)
    assert torch.equal(lies.encode(doubled), 2 * found)
    assert layout != "tokens" or torch.equal(doubled[:, :prefix], output[:, :prefix])


@pytest.mark.parametrize(
    ("shape", "tile", "said", "expected"),
    [
        ((2, 197, 8), (224, 224), TokenLayout(), Arrangement("tokens", 1, (14, 14))),
        ((2, 256 + 5, 8), (224, 224), TokenLayout(), Arrangement("tokens", 5, (16, 16))),
        ((2, 196, 8), (224, 224), TokenLayout(), Arrangement("tokens", 0, (14, 14))),
        ((2, 3 * 5 + 1, 8), (24, 40), TokenLayout(), Arrangement("tokens", 1, (3, 5))),
        ((2, 5 * 3 + 1, 8), (40, 24), TokenLayout(), Arrangement("tokens", 1, (5, 3))),
        ((2, 2 * 3 * 3 + 1, 8), (16, 24, 24), TokenLayout(), Arrangement("tokens", 1, (2, 3, 3))),
        ((2, 7, 8), (12, 8), TokenLayout(grid=(3, 2)), Arrangement("tokens", 1, (3, 2))),
        ((2, 17, 8), (32, 32), TokenLayout(prefix_tokens=13), Arrangement("tokens", 13, (2, 2))),
        ((2, 5, 7, 8), (40, 56), TokenLayout(), Arrangement("channels_first", 0, (7, 8))),
        ((2, 5, 7, 8), (40, 56), TokenLayout("channels_last"), Arrangement("channels_last", 0, (5, 7))),
        ((2, 5, 8), (40,), TokenLayout(), Arrangement("channels_first", 0, (8,))),
        ((2, 6, 8), (40,), TokenLayout("tokens", 1), Arrangement("tokens", 1, (5,))),
    ],
)
def test_what_a_layer_gives_is_read(
    shape: tuple[int, ...], tile: tuple[int, ...], said: TokenLayout, expected: Arrangement
) -> None:
    assert said.fit(shape, tile, "layer") == expected


@pytest.mark.parametrize(
    ("shape", "tile", "said", "message"),
    [
        # 6 = 4 patches of 16 px and 2 others = 6 patches... only what is written can tell
        (
            (2, 10, 8),
            (48, 48),
            TokenLayout(),
            r"3 x 3 patches after 1 .*2 x 2 patches after 6|2 x 2 .* 6.*3 x 3 .* 1",
        ),
        ((2, 60, 8), (48, 48), TokenLayout(), r"no grid of square patches.*token_grid"),
        ((2, 197, 8), (224, 224), TokenLayout(prefix_tokens=2), r"does not go with prefix_tokens = 2"),
        (
            (2, 197, 8),
            (224, 224),
            TokenLayout(prefix_tokens=0, grid=(14, 14)),
            r"prefix_tokens = 0 and token_grid",
        ),
        ((2, 197, 8), (224, 224), TokenLayout(grid=(196,)), r"token_grid = \[196\].*2 numbers"),
        ((2, 8, 7, 7), (224, 224), TokenLayout("tokens"), r"expects \(tiles, tokens, channels\)"),
    ],
)
def test_what_cannot_be_read_says_what_to_write(
    shape: tuple[int, ...], tile: tuple[int, ...], said: TokenLayout, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        said.fit(shape, tile, "blocks.1")


def test_channels_last_is_suspected_only_where_it_fits_better() -> None:
    assert looks_channels_last((2, 8, 8, 96), (64, 64))
    assert looks_channels_last((2, 4, 4, 8, 96), (64, 64, 128))
    assert not looks_channels_last((2, 96, 8, 8), (64, 64))
    assert not looks_channels_last((2, 64, 13, 13), (64, 64))
    assert not looks_channels_last((2, 5, 9, 13), (18, 26))


def end_to_end(net: TinyViT, layer: str, x: Tensor, c: int) -> tuple[Array, Array]:
    """Tokens of a layer and their gradient, `(B, N, D)`, by differentiating the whole network."""
    kept: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    scores = net(x.clone().requires_grad_())
    handle.remove()
    (g,) = torch.autograd.grad(scores[:, c].sum(), kept[0])
    return kept[0].detach().numpy(), g.numpy()


def slow(tokens: Array, gradient: Array, prefix: int, grid: tuple[int, ...]) -> dict[str, Array]:
    """Grad-CAM and HiResCAM of one tile, cell by cell; cell `u` is token `prefix + u`, the last axis running fastest."""
    mean = gradient[prefix:].mean(0)
    gradcam, hirescam = np.zeros(grid), np.zeros(grid)
    for u, at in enumerate(np.ndindex(grid)):
        for k in range(tokens.shape[1]):
            gradcam[at] += mean[k] * tokens[prefix + u, k]
            hirescam[at] += gradient[prefix + u, k] * tokens[prefix + u, k]
    return {"gradcam": gradcam, "hirescam": hirescam}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("pool", "layer"), [("class", "blocks.2.norm1"), ("class", "blocks.1"), ("mean", "blocks.2")]
)
def test_cams_of_tokens_equal_their_slow_twins(ndim: int, pool: str, layer: str) -> None:
    net, x = tiny_vit(ndim, pool=pool).double(), vit_tiles(ndim).double()
    done = explain(HookedNet(net, layer, tokens=TOKENS), x, classes(3), ["gradcam", "hirescam"])
    for c in range(3):
        tokens, gradient = end_to_end(net, layer, x, c)
        for b in range(len(x)):
            for name, expected in slow(tokens[b], gradient[b], 3, GRIDS[ndim]).items():
                found = done.maps[name][b, c].numpy()
                np.testing.assert_allclose(
                    found, expected, rtol=1e-6, atol=1e-6 * abs(expected).max(), err_msg=name
                )


def test_a_split_at_tokens_gives_the_scores_back() -> None:
    net, x = tiny_vit(), vit_tiles()
    split = HookedNet(net, "blocks.1", tokens=TOKENS)
    a = split.trunk(x)
    assert a.shape == (3, 8, *GRIDS[2])
    torch.testing.assert_close(split.tail(a, x), net(x))
    torch.testing.assert_close(split.forward(x).scores, net(x))
    # class and register tokens are those of the tile, whatever the patches are
    assert not torch.equal(split.tail(0 * a, x)[0], split.tail(0 * a, x)[1])
    rows = torch.tensor([2, 0, 2, 1])
    torch.testing.assert_close(split.tail(a[rows], x, rows), net(x)[rows])


def test_a_head_on_the_class_token_sees_no_patch_of_the_last_block() -> None:
    net, x = tiny_vit(), vit_tiles()
    for blind in ("blocks.2", "norm", "blocks.2.norm2"):
        split = HookedNet(net, blind, tokens=TOKENS)
        with pytest.raises(ModelError, match=r"exactly zero.*such as 'blocks\.2\.norm1' or 'blocks\.1\.mlp"):
            check_tokens(split, x, split.forward(x))
    for seen in ("blocks.2.norm1", "blocks.1"):
        split = HookedNet(net, seen, tokens=TOKENS)
        check_tokens(split, x, split.forward(x))
        assert explain(split, x, classes(3), ["gradcam"]).maps["gradcam"].abs().min() > 0


def test_a_map_that_is_only_rounding_is_flagged() -> None:
    # Behind a layer norm alone the length of a token counts for nothing, so that gradient and token are at right angles.
    net, x = tiny_vit(), vit_tiles()
    doubt = {}
    for layer in ("blocks.1", "blocks.2.norm1"):
        done = explain(HookedNet(net, layer, tokens=TOKENS), x, classes(3), ["hirescam", "gradcam"])
        doubt[layer] = {name: bool((f & MapFlag.DOUBTFUL).any()) for name, f in done.flags.items()}
        size = done.maps["hirescam"].abs().max() / done.maps["gradcam"].abs().max()
        assert (size < 1e-3) == doubt[layer]["hirescam"]
    assert doubt == {
        "blocks.1": {"hirescam": True, "gradcam": False},
        "blocks.2.norm1": {"hirescam": False, "gradcam": False},
    }


def test_a_pooled_head_sees_the_last_block() -> None:
    net, x = tiny_vit(pool="mean"), vit_tiles()
    split = HookedNet(net, "blocks.2", tokens=TOKENS)
    check_tokens(split, x, split.forward(x))


def test_tokens_lie_on_the_even_grid_even_where_they_could_be_followed() -> None:
    net = tiny_vit()
    cells = measure_cells(HookedNet(net, "blocks.0.norm1", tokens=TOKENS), (2, 12, 16))
    assert cells.source == "grid"
    assert cells.shape == (3, 4)
    assert cells.cell_px == (PATCH, PATCH)
    assert cells.first_centre_px == (PATCH / 2, PATCH / 2)
    embed = measure_cells(HookedNet(net, "embed"), (2, 12, 16))
    assert embed.source == "receptive_field"
    assert (embed.cell_px, embed.first_centre_px) == (cells.cell_px, cells.first_centre_px)


@pytest.mark.parametrize("ndim", [2, 3])
def test_swin_blocks_are_read_with_channels_last(ndim: int) -> None:
    net = swin(ndim)
    x = torch.randn(2, 2, *(32, 64, 32)[:ndim], generator=torch.Generator().manual_seed(0))
    inner, outer = "swin.layers2.0.blocks.1", "swin.layers2.0"
    split = HookedNet(net, inner, tokens=TokenLayout("channels_last"))
    assert split.trunk(x).shape == (2, 12, *(8, 16, 8)[:ndim])
    done = explain(split, x, classes(3), ["hirescam", "gradcam"])
    kept: list[Tensor] = []
    handle = net.get_submodule(inner).register_forward_hook(lambda _m, _i, out: kept.append(out))
    scores = net(x.clone().requires_grad_())
    handle.remove()
    (g,) = torch.autograd.grad(scores[:, 1].sum(), kept[0])
    expected = (g * kept[0]).sum(-1).detach()
    torch.testing.assert_close(done.maps["hirescam"][:, 1], expected, rtol=1e-4, atol=1e-7)
    # the stage after it gives channels first again, and can be named as it is
    assert HookedNet(net, outer).trunk(x).shape == (2, 24, *(4, 8, 4)[:ndim])
    with pytest.raises(ModelError, match=r"unevenly.*layout = 'channels_last'"):
        check_tokens(HookedNet(net, inner), x, HookedNet(net, inner).forward(x))


def test_feature_maps_are_left_as_they_are() -> None:
    net, x = conv_net(2), tiles(2)
    as_found = HookedNet(net, "relu")
    stated = HookedNet(net, "relu", tokens=TokenLayout("channels_first"))
    assert torch.equal(as_found.forward(x).activations, stated.forward(x).activations)
    check_tokens(as_found, x, as_found.forward(x))


def monai_card(folder: Path, ndim: int, **cam: Any) -> LoadedCard:
    """A card of MONAI's own ViT, with weights in a file."""
    net = monai_vit(ndim)
    safetensors.torch.save_file(net.state_dict(), folder / "w.safetensors")
    digest = hashlib.sha256((folder / "w.safetensors").read_bytes()).hexdigest()
    args = {
        "in_channels": 2, "img_size": list(VIT_TILES[ndim]), "patch_size": 8, "hidden_size": 16, "mlp_dim": 24,
        "num_layers": 2, "num_heads": 2, "classification": True, "num_classes": 3, "spatial_dims": ndim,
        "post_activation": "",
    }  # fmt: skip
    size = {"kind": "slide", "mpp": 0.5} if ndim == 2 else {"kind": "volume", "spacing_mm": [1, 1, 1]}
    card = ModelCard.model_validate({
        "schema": 1, "name": "vit", "version": "1", "licence": "CC0", "intended_use": "tests",
        "network": {"adapter": "monai", "name": "ViT", "args": args, "weights": "w.safetensors", "sha256": digest},
        "input": {"channels": 2, "tile": VIT_TILES[ndim], **size},
        "output": {"classes": ["a", "b", "c"]},
        "cam": {"layer": "blocks.1.norm1", **cam},
    })  # fmt: skip
    write_card(folder / "model.toml", card)
    loaded = load_card(folder / "model.toml")
    assert loaded.card == card
    return loaded


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_card_of_monais_vit(tmp_path: Path, ndim: int) -> None:
    loaded = monai_card(tmp_path, ndim)
    found = load_model(loaded)
    grid = tuple(t // 8 for t in VIT_TILES[ndim])
    assert found.cells.shape == grid
    assert found.cells.source == "grid"
    assert found.cells.first_centre_px == (4.0,) * ndim
    x = torch.randn(2, 2, *VIT_TILES[ndim], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.scores(x), monai_vit(ndim)(x)[0])
    written = {"layout": "tokens", "prefix_tokens": 1, "token_grid": list(grid)}
    stated = load_model(monai_card(tmp_path, ndim, **written))
    maps = [explain(m.net, x, classes(3), ["gradcam"]).maps["gradcam"] for m in (found, stated)]
    assert torch.equal(*maps)
    assert maps[0].shape == (2, 3, *grid)
    # another layer has the same patches; one that nothing reads is refused
    assert load_model(loaded, layer="blocks.0").cells.shape == grid
    assert load_model(loaded, layer="patch_embedding.patch_embeddings").cells.shape == grid
    with pytest.raises(
        ModelError, match=r"model\.toml: .*'blocks\.1' .*such as 'blocks\.1\.norm1' or 'blocks\.0\."
    ):
        load_model(loaded, layer="blocks.1")
    with pytest.raises(ModelError, match="does not go with prefix_tokens = 4"):
        load_model(monai_card(tmp_path, ndim, prefix_tokens=4))


def test_cards_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="neither prefix_tokens nor token_grid"):
        CamLayer(layer="x", layout="channels_last", prefix_tokens=1)
    with pytest.raises(ValueError, match="at least 1"):
        CamLayer(layer="x", token_grid=(0, 4))


def test_a_model_is_left_as_found() -> None:
    net = monai_vit()
    net.train()
    before = [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()
    ]
    x = torch.randn(2, 2, *VIT_TILES[2])
    methods = ["gradcam", "rollout", "attention_relevance", "legrad", "doei"]
    explain(HookedNet(net, "blocks.1.norm1"), x, classes(3), methods)
    after = [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()
    ]
    assert before == after
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert isinstance(net, nn.Module)


class Trunk(nn.Module):
    def __init__(self, net: TinyViT) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        t = self.net.embed(x).flatten(2).mT + self.net.position
        t = torch.cat([self.net.extra.expand(len(t), -1, -1), t], 1)
        return self.net.blocks[1](self.net.blocks[0](t))  # type: ignore[no-any-return]


class Tail(nn.Module):
    def __init__(self, net: TinyViT) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor) -> Tensor:
        return self.net.fc(self.net.norm(self.net.blocks[2](t))[:, 0])  # type: ignore[no-any-return]


def test_a_network_in_two_parts_is_cut_at_tokens() -> None:
    net, x = tiny_vit(), vit_tiles()
    pair = PairNet(Trunk(net), Tail(net), "cut", tokens=TOKENS)
    hooked = HookedNet(net, "blocks.1", tokens=TOKENS)
    check_tokens(pair, x, pair.forward(x))
    assert pair.arrangement(x) == hooked.arrangement(x)
    found, expected = (explain(n, x, classes(3), ["gradcam", "layercam"]) for n in (pair, hooked))
    for name, maps in found.maps.items():
        assert torch.equal(maps, expected.maps[name])
    rows = torch.tensor([2, 0, 2, 1])
    a = pair.trunk(x)
    torch.testing.assert_close(pair.tail(a[rows], x, rows), net(x)[rows])
