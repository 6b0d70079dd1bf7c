"""DOEI (reconstruction): what must hold of it whatever its numbers, and its equations once more in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from tests.test_workers.tiny_networks import classes
from tests.test_workers.tiny_transformers import PATCH, TinyViT, swin, tiny_vit, vit_tiles
from workers.cam.capture import HookedNet, Split
from workers.cam.doei import Decoupling, DoeiOptions, affinity, changed_pass, confidence, rating
from workers.cam.explain import explain
from workers.cam.methods import METHODS, method
from workers.cam.softmax import attention_of, recorded
from workers.cam.tokens import TokenLayout

LAYER = "blocks.2.norm1"


def split(net: TinyViT, layer: str = LAYER) -> HookedNet:
    return HookedNet(net, layer, tokens=TokenLayout("tokens", net.prefix))


def changed(net: TinyViT, x: Tensor, **options: Any) -> tuple[Split, Decoupling]:
    """A changed pass with a class map made up, read from the class token or the patches."""
    tokens = net.prefix + net.position.shape[1]
    read = torch.zeros(len(x), tokens)
    if net.pool == "class":
        read[:, 0] = 1
    else:
        read[:, net.prefix :] = 1 / (tokens - net.prefix)
    cam = torch.randn(len(x), tokens - net.prefix, generator=torch.Generator().manual_seed(3))
    return changed_pass(split(net), x, slice(net.prefix, None), read, cam, DoeiOptions(**options))


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("how", ["softmax", "sdpa"])
def test_without_weight_the_network_is_itself_to_the_bit(pool: str, how: str) -> None:
    net, x = tiny_vit(pool=pool, how=how), vit_tiles()
    # attention step by step rounds as it likes: the base of 'sdpa' is the pass in which it is watched
    with torch.enable_grad(), recorded(len(x)):
        base = split(net).forward(x)
    found, state = changed(net, x, lam=0)
    assert torch.equal(found.scores, base.scores)
    assert torch.equal(found.activations, base.activations)
    assert all((r == 1).all() for r in state.ratings)
    weighted, state = changed(net, x, lam=0.5)
    assert not torch.equal(weighted.scores, base.scores)
    assert [float(r.max()) - 1 for r in state.ratings] == pytest.approx([0.5 / 3, 1 / 3, 0.5])


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_attention_still_sums_to_one(pool: str) -> None:
    net, x = tiny_vit(pool=pool), vit_tiles()
    seen: list[Tensor] = []
    attend = Decoupling.attend

    def keep(self: Decoupling, p: Tensor) -> Tensor:
        seen.append(attend(self, p))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoupling, "attend", keep)
        changed(net, x)
    assert len(seen) == 3
    for p in seen:
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))
        assert (p >= 0).all()


def test_the_rating_rises_with_confidence() -> None:
    conf = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    r = rating(conf, 0.5, DoeiOptions())
    order = conf.argsort(1)
    assert (r.gather(1, order).diff(dim=1) >= 0).all()
    # of 12: quantile .8 is at place 8.8, quantile .3 at place 3.3
    assert r.gather(1, order).tolist() == [[0.5] * 4 + [1] * 5 + [1.5] * 3] * 4
    assert (rating(torch.ones(1, 5), 0.5, DoeiOptions()) == 1).all(), "none stands out"


def test_confidence_by_hand() -> None:
    found = confidence(torch.tensor([[0.1, 0.2, 0.4, 0.3]]), torch.tensor([[1.0, 2.0, -5.0, 1.0]]))
    # products .1, .4, 0, .3 from 0 to 1
    torch.testing.assert_close(found, torch.tensor([[0.25, 1.0, 0.0, 0.75]]))
    assert (confidence(torch.full((1, 3), 0.2), -torch.ones(1, 3)) == 0).all()


def test_affinity_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    rgb, tokens = torch.randn(1, 5, 3, generator=generator), torch.randn(1, 5, 4, generator=generator)
    attention = torch.rand(1, 5, 5, generator=generator)
    found = affinity(rgb, tokens, attention, DoeiOptions(rgb=2, emb=1, att=1, sigma=0.7))[0].numpy()
    c, t, p = (v[0].double().numpy() for v in (rgb, tokens, attention))
    expected = np.zeros((5, 5))
    for n in range(5):
        for m in range(5):
            colour = np.exp(-((c[n] - c[m]) ** 2).sum() / (2 * 0.7**2))
            cosine = t[n] @ t[m] / np.linalg.norm(t[n]) / np.linalg.norm(t[m])
            expected[n, m] = 0.5 * colour + 0.25 * max(cosine, 0) + 0.25 * (p[n, m] + p[m, n]) / 2
        expected[n] /= expected[n].sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_permuted_patches_permute_the_map() -> None:
    # without position embedding a ViT does not know the order of its patches
    net, x = tiny_vit(position=False), vit_tiles()
    net.position.data.zero_()
    order = torch.tensor([7, 2, 11, 0, 5, 9, 1, 3, 10, 8, 4, 6])
    cut = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    moved = cut.flatten(2, 3)[:, :, order].reshape(cut.shape)
    y = moved.transpose(3, 4).reshape(x.shape)
    found, permuted = (explain(split(net), v, classes(3), ["doei"]).maps["doei"].flatten(2) for v in (x, y))
    assert found.abs().max() > 0
    scale = float(found.abs().max())
    torch.testing.assert_close(permuted, found[..., order], rtol=0, atol=1e-4 * scale)


def test_a_planted_patch_gains_and_the_least_loses() -> None:
    """One head, one block: patch 2 has the most attention and the most evidence, patch 0 the least; no two are alike."""
    tokens = torch.eye(5)[None]
    cam = torch.tensor([[0.1, 0.5, 2.0, 0.6, 0.7]])
    attention = torch.zeros(1, 1, 6, 6) + torch.eye(6)
    attention[0, 0, 0] = torch.tensor([0.1, 0.05, 0.15, 0.4, 0.15, 0.15])
    read = torch.eye(6)[:1]
    state = Decoupling(1, slice(1, None), read, cam, 100 * tokens, DoeiOptions())
    state.enter(torch.nn.Identity(), (torch.cat([torch.zeros(1, 1, 5), tokens], 1),), {})
    after = state.attend(attention)
    assert state.ratings[0][0].tolist()[2] == 1.5
    assert state.ratings[0][0].tolist()[0] == 0.5
    assert after[0, 0, 0, 3] / after[0, 0, 0, 4] > attention[0, 0, 0, 3] / attention[0, 0, 0, 4]
    assert after[0, 0, 0, 1] / after[0, 0, 0, 4] < attention[0, 0, 0, 1] / attention[0, 0, 0, 4]
    assert torch.equal(after[0, 0, 1:], attention[0, 0, 1:]), "rows that are not read stay"
    left = state.leave(torch.nn.Identity(), None, torch.ones(1, 6, 5))
    assert left[0, :, 0].tolist()[:4] == [1, 0.5, *state.ratings[0][0].tolist()[1:3]]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_map_equals_its_definition(ndim: int, pool: str) -> None:
    """Step by step from the parts tested above, differentiating the whole changed network."""
    net, x = tiny_vit(ndim, pool=pool).double(), vit_tiles(ndim, batch=2).double()
    options = DoeiOptions(lam=0.4, blocks=2)
    found = explain(split(net), x, classes(3), ["doei+lam=0.4+blocks=2"]).maps["doei+lam=0.4+blocks=2"]
    for c in range(3):
        before = (
            explain(split(net), x, classes(3)[c : c + 1], ["hirescam"]).maps["hirescam"].flatten(1).double()
        )
        read = torch.zeros(2, 3 + before.shape[1], dtype=torch.float64)
        read[:, :1] = 1 if pool == "class" else 0
        read[:, 3:] = 0 if pool == "class" else 1 / before.shape[1]
        with torch.enable_grad():
            after, state = changed_pass(split(net), x, slice(3, None), read, before, options)
            (g,) = torch.autograd.grad(after.scores[:, c].sum(), after.activations)
        cam = (g * after.activations).sum(1).flatten(1).detach().numpy().clip(0)
        for b in range(2):
            a = np.mean([m[b].numpy() for m in state.attention[-2:]], axis=0)
            a = a / a.sum(1, keepdims=True)
            expected = a @ a @ cam[b]
            np.testing.assert_allclose(
                found[b, c].numpy().ravel(), expected, rtol=1e-4, atol=1e-6 * expected.max() + 1e-12
            )


def test_rows_are_independent() -> None:
    net, x = tiny_vit(), vit_tiles(batch=4)
    whole = explain(split(net), x, classes(3), ["doei"]).maps["doei"]
    for b in range(4):
        alone = explain(split(net), x[b : b + 1], classes(3), ["doei"]).maps["doei"]
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-3, atol=1e-6 * float(whole.abs().max()))


def test_it_is_marked_wherever_it_is_named() -> None:
    info = METHODS["doei"].info
    assert info.title == "DOEI (reconstruction)"
    assert "reconstruction" in info.edition
    assert "not the paper's" in info.edition
    assert "reconstruction" in method("doei+lam=0.2").info.edition
    with pytest.raises(SpecError, match=r"low = 0\.9 must not be above high = 0\.8"):
        method("doei+low=0.9")
    with pytest.raises(SpecError, match="at least one"):
        method("doei+rgb=0+emb=0+att=0")


def test_windows_are_refused() -> None:
    with pytest.raises(ModelError, match=r"over windows \(Swin\)"):
        explain(HookedNet(swin(), "swin.layers4.0"), torch.randn(1, 2, 64, 64), classes(3), ["doei"])
    assert attention_of(split(tiny_vit()), vit_tiles()).tokens == 15
