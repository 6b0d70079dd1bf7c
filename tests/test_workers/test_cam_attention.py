"""Rollout, relevance and LeGrad against a NumPy transformer differentiated by finite differences; what cannot be followed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from schemas.model import OutputSpec
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from tests.test_workers.tiny_transformers import Attend, TinyViT, monai_vit, swin, tiny_vit, vit_tiles
from workers.cam import softmax
from workers.cam.attention import carried, read_rows, rolled_out
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.softmax import Attending, attention_of
from workers.cam.targets import resolve
from workers.cam.tokens import TokenLayout

Array = NDArray[np.float64]
NAMES = ("rollout", "attention_relevance", "legrad", "legrad+pool=head", "legrad+layers=1")


def split(net: nn.Module, prefix: int = 3, layer: str = "blocks.1") -> HookedNet:
    return HookedNet(net, layer, tokens=TokenLayout("tokens", prefix))


def test_relevance_of_the_worked_example() -> None:
    # A = [[.5, .5], [.2, .8]], dy/dA = [[1, -1], [2, .5]]: one block, and the same again
    step = (torch.tensor([[0.5, 0.5], [0.2, 0.8]]) * torch.tensor([[1, -1], [2, 0.5]])).relu()[None].double()
    for n, expected in ((1, [[1.5, 0], [0.4, 1.4]]), (2, [[2.25, 0], [1.16, 1.96]])):
        for i in range(2):
            row = torch.eye(2, dtype=torch.float64)[i : i + 1]
            np.testing.assert_allclose((carried(row, [step] * n) + row)[0], expected[i], atol=1e-7)


def test_rollout_by_hand() -> None:
    # (A + I) / 2 = [[.75, .25], [.1, .9]]; squared
    a = torch.tensor([[[0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64)
    expected = np.linalg.matrix_power(np.array([[0.75, 0.25], [0.1, 0.9]]), 2)
    for i in range(2):
        np.testing.assert_allclose(
            rolled_out(torch.eye(2, dtype=torch.float64)[i : i + 1], [a, a])[0], expected[i]
        )


def test_rows_that_are_read_are_those_with_a_gradient() -> None:
    g = torch.zeros(3, 2, 4, 4)
    g[0, 1, 0, 2] = -1e-30
    g[1, 0, 1:, :] = 1
    expected = [[1, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 0]]
    torch.testing.assert_close(read_rows(g), torch.tensor(expected))


class Slow:
    """A `TinyViT` once more, in NumPy, for one tile; its attention can be bumped, and its blocks cut short."""

    def __init__(self, net: TinyViT) -> None:
        self.net = net
        self.p = {n: v.detach().double().numpy() for n, v in net.state_dict().items()}
        self.depth = len(net.blocks)
        self.heads = 2

    def embed(self, x: Array) -> Array:
        kernel = self.p["embed.weight"]
        size = kernel.shape[2:]
        tokens = [
            [
                (
                    kernel[k]
                    * x[(slice(None), *(slice(i * s, (i + 1) * s) for i, s in zip(at, size, strict=True)))]
                ).sum()
                + self.p["embed.bias"][k]
                for k in range(len(kernel))
            ]
            for at in np.ndindex(*(n // s for n, s in zip(x.shape[1:], size, strict=True)))
        ]
        return np.concatenate([self.p["extra"][0], np.array(tokens) + self.p["position"][0]])

    def norm(self, t: Array, name: str) -> Array:
        t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5)
        return np.asarray(t * self.p[f"{name}.weight"] + self.p[f"{name}.bias"])

    def block(self, t: Array, i: int, bump: Array | float = 0.0) -> tuple[Array, Array]:
        """Tokens `(..., N, D)` after block `i`, and its attention `(..., heads, N, N)`; `bump` is added to the attention."""
        b = f"blocks.{i}"
        qkv = (
            self.norm(t, f"{b}.norm1") @ self.p[f"{b}.attn.mha.in_proj_weight"].T
            + self.p[f"{b}.attn.mha.in_proj_bias"]
        )
        q, k, v = np.split(qkv, 3, axis=-1)
        d = q.shape[-1] // self.heads
        parts = [slice(h * d, (h + 1) * d) for h in range(self.heads)]
        attention = []
        for s in parts:
            e = np.exp(q[..., s] @ np.swapaxes(k[..., s], -1, -2) / math.sqrt(d))
            attention.append(e / e.sum(-1, keepdims=True))
        used = np.stack(attention, axis=-3) + bump
        mixed = np.concatenate([used[..., h, :, :] @ v[..., s] for h, s in enumerate(parts)], axis=-1)
        t = t + mixed @ self.p[f"{b}.attn.mha.out_proj.weight"].T + self.p[f"{b}.attn.mha.out_proj.bias"]
        hidden = self.norm(t, f"{b}.norm2") @ self.p[f"{b}.mlp.0.weight"].T + self.p[f"{b}.mlp.0.bias"]
        gelu = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        return t + gelu @ self.p[f"{b}.mlp.2.weight"].T + self.p[f"{b}.mlp.2.bias"], used

    def head(self, t: Array, pool: str) -> Array:
        """Scores `(..., C)`."""
        t = self.norm(t.mean(-2, keepdims=True) if pool == "all" else t, "norm")
        read = t[..., 0, :] if pool in ("class", "all") else t[..., self.net.prefix :, :].mean(-2)
        return np.asarray(read @ self.p["fc.weight"].T + self.p["fc.bias"])

    def streams(self, x: Array) -> tuple[list[Array], list[Array]]:
        """Tokens that enter each block, and its attention."""
        t, entering, attention = self.embed(x), [], []
        for i in range(self.depth):
            entering.append(t)
            t, a = self.block(t, i)
            attention.append(a)
        return entering, attention

    def gradient(self, entering: Array, i: int, last: int, pool: str) -> Array:
        """Gradient `(heads, N, N, C)` of the scores read after block `last` at the attention of block `i`, by central differences."""
        n, step = len(entering), 1e-5
        size = self.heads * n * n
        ends = []
        for sign in (1, -1):
            # one entry bumped in each of `size` passes
            bump = sign * step * np.eye(size).reshape(size, self.heads, n, n)
            t, _ = self.block(entering, i, bump)
            for later in range(i + 1, last + 1):
                t, _ = self.block(t, later)
            ends.append(self.head(t, pool))
        return ((ends[0] - ends[1]) / (2 * step)).reshape(self.heads, n, n, -1)

    def maps(self, x: Array) -> dict[str, Array]:
        """Each method's maps `(Z, C)`."""
        entering, attention = self.streams(x)
        n, last, pool = len(entering[0]), self.depth - 1, self.net.pool
        gradients = [self.gradient(t, i, last, pool) for i, t in enumerate(entering)]
        roll = np.eye(n)
        for a in attention:
            mixed = a.mean(0) + np.eye(n)
            roll = mixed / mixed.sum(1, keepdims=True) @ roll
        relevance = []
        for c in range(gradients[0].shape[-1]):
            r = np.eye(n)
            for a, g in zip(attention, gradients, strict=True):
                r = r + sum(np.maximum(a[h] * g[h, :, :, c], 0) for h in range(self.heads)) / self.heads @ r
            relevance.append(r - np.eye(n))
        formed = {}
        for name, how in (("legrad", "all"), ("legrad+pool=head", pool)):
            layers = [np.maximum(self.gradient(t, i, i, how), 0).mean((0, 1)) for i, t in enumerate(entering)]
            formed[name] = np.mean(layers, axis=0)
            if how == "all":
                formed["legrad+layers=1"] = layers[-1]
        rows = [0] if pool == "class" else list(range(self.net.prefix, n))
        rolled = np.repeat(roll[rows].mean(0)[:, None], len(relevance), axis=1)
        related = np.stack([r[rows].mean(0) for r in relevance], axis=1)
        found = {"rollout": rolled, "attention_relevance": related, **formed}
        return {name: m[self.net.prefix :] for name, m in found.items()}


@pytest.mark.parametrize(
    ("ndim", "pool", "prefix"),
    [(1, "class", 1), (2, "class", 3), (2, "mean", 2), (3, "mean", 0), (3, "class", 1)],
)
def test_methods_equal_their_slow_twins(ndim: int, pool: str, prefix: int) -> None:
    net = tiny_vit(ndim, pool=pool, prefix=prefix, depth=2).double()
    x = vit_tiles(ndim, batch=2).double()
    done = explain(split(net, prefix), x, classes(3), NAMES)
    for b in range(len(x)):
        for name, expected in Slow(net).maps(x[b].numpy()).items():
            found = done.maps[name][b].flatten(1).numpy().T
            # float32 maps against central differences
            np.testing.assert_allclose(
                found, expected, rtol=1e-5, atol=1e-6 * abs(expected).max(), err_msg=name
            )


@pytest.mark.parametrize("how", ["softmax", "sdpa", "mha", "mha_weights"])
def test_attention_is_seen_however_it_is_written(how: Attend) -> None:
    net, twin, x = tiny_vit(how=how), tiny_vit(how="softmax"), vit_tiles()
    found = attention_of(split(net), x)
    assert found.sizes == ((2, 15, 15),) * 3
    assert found.blocks == ("blocks.0", "blocks.1", "blocks.2")
    seen: list[Tensor] = []

    def keep(p: Tensor) -> Tensor:
        seen.append(p)
        return p

    with torch.no_grad(), Attending(len(x), keep):
        scores = net(x)
    torch.testing.assert_close(scores, twin(x))
    _, attention = Slow(tiny_vit(how="softmax").double()).streams(x[1].double().numpy())
    for p, expected in zip(seen, attention, strict=True):
        torch.testing.assert_close(p.sum(-1), torch.ones(3, 2, 15))
        np.testing.assert_allclose(p[1].numpy(), expected, atol=1e-5)
    ours, theirs = (explain(split(n), x, classes(3), NAMES) for n in (net, twin))
    for name in NAMES:
        torch.testing.assert_close(ours.maps[name], theirs.maps[name], rtol=1e-3, atol=1e-6)


def test_what_is_used_is_what_the_network_goes_on_with() -> None:
    net, x = tiny_vit(how="sdpa"), vit_tiles()
    with torch.no_grad():
        base = net(x)
        with Attending(len(x), torch.clone):
            torch.testing.assert_close(net(x), base)
        with Attending(len(x), torch.zeros_like):
            assert not torch.allclose(net(x), base)
        torch.testing.assert_close(net(x), base)


@pytest.mark.parametrize(
    "extra",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(2)},
        {"enable_gqa": True},
    ],
)
def test_scaled_dot_product_attention_step_by_step(extra: dict[str, object]) -> None:
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in extra else 4
    q, k, v = torch.randn(3, 4, 5, 6), torch.randn(3, heads, 5, 6), torch.randn(3, heads, 5, 6)
    expected = F.scaled_dot_product_attention(q, k, v, **extra)  # type: ignore[arg-type]
    with Attending(3, torch.clone):
        found = F.scaled_dot_product_attention(q, k, v, **extra)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ndim", [2, 3])
def test_monais_vit(ndim: int) -> None:
    net = monai_vit(ndim)
    x = torch.randn(2, 2, *((24, 40), (16, 24, 24))[ndim - 2], generator=torch.Generator().manual_seed(0))
    done = explain(HookedNet(net, "blocks.1.norm1"), x, classes(3), NAMES)
    for name, maps in done.maps.items():
        assert maps.shape == (2, 3, *((3, 5), (2, 3, 3))[ndim - 2]), name
        assert (maps >= 0).all()
        assert not done.flags[name].any(), name
    # the class token's attention is one row of a stochastic matrix
    assert (done.maps["rollout"].flatten(2).sum(2) < 1).all()
    assert torch.equal(done.maps["rollout"][:, 0], done.maps["rollout"][:, 2])
    assert not torch.equal(done.maps["attention_relevance"][:, 0], done.maps["attention_relevance"][:, 2])


def test_any_token_layer_gives_the_same_attention_maps() -> None:
    net, x = tiny_vit(), vit_tiles()
    one, other = (explain(split(net, layer=n), x, classes(3), NAMES) for n in ("blocks.0", "blocks.2.norm1"))
    embedded = explain(HookedNet(net, "embed"), x, classes(3), NAMES)
    for name in NAMES:
        assert torch.equal(one.maps[name], other.maps[name])
        assert torch.equal(one.maps[name], embedded.maps[name])


def test_rows_and_chunks_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = tiny_vit(), vit_tiles(batch=5)
    targets = resolve(["predicted", "all"], OutputSpec(classes=("a", "b", "c")), 3)
    with torch.no_grad():
        net.fc.bias.sub_(net(x).mean(0))
    whole = explain(split(net), x, targets, NAMES)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = explain(split(net), x[order], targets, NAMES)
    monkeypatch.setattr(softmax, "ELEMENTS_AT_ONCE", 2 * 3 * 2 * 15 * 15)
    chunked = explain(split(net), x, targets, NAMES)
    predicted = whole.target_index[:, 0].long()
    assert len(set(predicted.tolist())) > 1
    for name in NAMES:
        scale = float(whole.maps[name].abs().max())
        torch.testing.assert_close(permuted.maps[name], whole.maps[name][order], rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(chunked.maps[name], whole.maps[name], rtol=0, atol=1e-5 * scale)
        expected = whole.maps[name][torch.arange(5), 1 + predicted]
        torch.testing.assert_close(whole.maps[name][:, 0], expected, rtol=0, atol=1e-5 * scale)


def test_a_bad_tile_spoils_no_other() -> None:
    net, x = tiny_vit(), vit_tiles()
    clean = explain(split(net), x, classes(3), NAMES)
    x[1, 0, 2, 2] = torch.nan
    done = explain(split(net), x, classes(3), NAMES)
    for name in NAMES:
        assert done.maps[name][1].isnan().all()
        assert (done.flags[name][1] & MapFlag.NOT_FINITE).all()
        torch.testing.assert_close(done.maps[name][[0, 2]], clean.maps[name][[0, 2]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_windows_have_no_attention_over_all_tokens(name: str) -> None:
    with pytest.raises(ModelError, match=r"over windows \(Swin\).*'gradcam'"):
        explain(HookedNet(swin(), "swin.layers4.0"), torch.randn(2, 2, 64, 64), classes(3), [name])


@pytest.mark.parametrize("name", NAMES)
def test_networks_without_attention(name: str) -> None:
    with pytest.raises(ModelError, match="ConvNet computes no attention"):
        explain(HookedNet(conv_net(2), "relu"), tiles(2), classes(3), [name])


class Pooled(nn.Module):
    """A ViT that pools by attention of one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(prefix=0, pool="mean")
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        t = self.vit.embed(x).flatten(2).mT
        for block in self.vit.blocks:
            t = block(t)
        return self.vit.fc(self.pool(self.query.expand(len(t), -1, -1), t, t)[0][:, 0])  # type: ignore[no-any-return]


class Dropping(nn.Module):
    """Attention whose dropout knows nothing of eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(t, t, t, dropout_p=0.1).sum((1, 2))


def test_attention_that_cannot_be_followed() -> None:
    x = vit_tiles()
    with pytest.raises(ModelError, match=r"attention of 1 queries over 12 tokens"):
        explain(HookedNet(Pooled().eval(), "vit.blocks.1"), x, classes(3), ["rollout"])
    dropping = nn.Sequential(nn.ReLU(), Dropping())
    with pytest.raises(ModelError, match="dropout is at work although the network is in eval mode"):
        explain(HookedNet(dropping, "0"), x, classes(2), ["rollout"])
    pair = PairNet(nn.ReLU(), nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1)), "cut")
    with pytest.raises(ModelError, match="exported or scripted"):
        explain(pair, x, classes(2), ["rollout"])


def test_a_layer_that_is_not_the_grid_of_the_patches() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.ReLU()
            self.vit = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(self.fine(x))  # type: ignore[no-any-return]

    with pytest.raises(ModelError, match=r"over 15 tokens, the explained layer has 12 x 16 = 192 cells"):
        explain(HookedNet(Hybrid().eval(), "fine"), vit_tiles(), classes(3), ["rollout"])


def test_two_attentions_in_a_block_are_no_blocks_for_legrad() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()
            self.vit.blocks = nn.ModuleList([nn.Sequential(*self.vit.blocks[:2])])

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x)  # type: ignore[no-any-return]

    net = Double().eval()
    # each is still found in the innermost module that holds it alone
    assert attention_of(split(net, layer="vit.blocks.0.0"), vit_tiles()).blocks == (
        "vit.blocks.0.0",
        "vit.blocks.0.1",
    )
    shared = tiny_vit()
    shared.blocks = nn.ModuleList([shared.blocks[0], shared.blocks[0]])
    with pytest.raises(ModelError, match=r"not each time in a block of its own.*'rollout'"):
        explain(split(shared, layer="blocks.0#1"), vit_tiles(), classes(3), ["legrad"])
    explain(split(shared, layer="blocks.0#1"), vit_tiles(), classes(3), ["rollout", "attention_relevance"])
