"""Bag heads: what is published, exactly; sums that are the logits; order, size and precision of bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError
from tests.test_workers.published_heads import CLASSES, FEATURES, PUBLISHED, SMALL, Transmil, anywhere
from workers.models.heads.head import PartsHead
from workers.models.heads.registry import HEADS, build_head
from workers.models.heads.transmil import NystromAttention, TransmilHead

ARGS: dict[str, dict[str, Any]] = {
    "mean": {"hidden": 8, "dropout": 0.5},
    "max": {"hidden": 8, "dropout": 0.5},
    "abmil": {**SMALL, "dropout": 0.5, "attention_dropout": 0.5},
    "abmil_gated": {**SMALL, "per_class": True},
    "clam_sb": SMALL,
    "clam_mb": SMALL,
    "dsmil": {**SMALL, "value_dropout": 0.5},
    "transmil": {"hidden": 8, "heads": 2},
    "additive": {**SMALL, "layers": [5, 4], "dropout": 0.5},
    "linear": {},
}
SIZES = (1, 2, 5, 40, 70)
"""Of bags; 70 makes a square of 9 x 9, more than the least."""


def head(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_head(name, FEATURES, CLASSES, ARGS[name]).double().eval()


def bag(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_head_is_tested_here() -> None:
    assert list(ARGS) == list(HEADS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_state_dict_gives_the_published_logits(name: str) -> None:
    ours, args, build = PUBLISHED[name]
    torch.manual_seed(3)
    reference = build().double().eval()
    found = build_head(ours, FEATURES, CLASSES, args).double().eval()
    found.load_state_dict(found.adapt(anywhere(reference.state_dict())), strict=True)
    for n in SIZES:
        torch.testing.assert_close(found(bag(n)), reference(bag(n)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_a_bag_of_any_size(name: str) -> None:
    found = head(name)
    for n in SIZES:
        h = bag(n)
        logits = found(h)
        assert logits.shape == (CLASSES,)
        assert torch.equal(logits, found(h)), "nothing is random in eval mode"
        if isinstance(found, PartsHead):
            parts = found.parts(h)
            terms = parts.attention.T * (parts.values @ parts.weight.T)
            torch.testing.assert_close(terms.sum(0) + parts.bias, logits, rtol=0, atol=1e-10)
            assert parts.attention.shape in ((1, n), (CLASSES, n))
            if parts.energies is not None:
                torch.testing.assert_close(parts.energies.softmax(1), parts.attention)
                some = found.parts(h[n // 2 :])
                assert some.energies is not None
                torch.testing.assert_close(some.energies, parts.energies[:, n // 2 :])
                torch.testing.assert_close(some.values, parts.values[n // 2 :])
        if hasattr(found, "attention"):
            a = found.attention(h)
            assert a.shape in ((1, n), (CLASSES, n))
            if not found.ordered:
                torch.testing.assert_close(a.sum(1), torch.ones_like(a[:, 0]))
                assert bool((a > 0).all())
        if hasattr(found, "instances"):
            assert found.instances(h).shape == (n, CLASSES)


@pytest.mark.parametrize("name", HEADS)
def test_only_an_ordered_head_depends_on_the_order(name: str) -> None:
    found, h = head(name), bag(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    apart = (found(h) - found(h[order])).abs().max()
    if found.ordered:
        assert apart > 1e-3
        return
    assert apart <= 1e-12
    for what in ("attention", "instances"):
        if hasattr(found, what):
            each = getattr(found, what)
            axis = 1 if what == "attention" else 0
            torch.testing.assert_close(each(h[order]), each(h).index_select(axis, order))


@pytest.mark.parametrize("name", HEADS)
def test_weights_go_out_and_in_again(name: str) -> None:
    first, second = head(name), head(name, seed=5)
    assert not torch.allclose(first(bag(9)), second(bag(9)))
    second.load_state_dict(second.adapt(first.state_dict()), strict=True)
    assert torch.equal(first(bag(9)), second(bag(9)))


@pytest.mark.parametrize("name", HEADS)
def test_what_no_head_can_read(name: str) -> None:
    found = head(name)
    with pytest.raises(ModelError, match="the bag has no tile"):
        found(bag(0))
    with pytest.raises(ModelError, match=r"shape \(4, 11\).*\(tiles, 12\)"):
        found(bag(4)[:, :-1])


@pytest.mark.parametrize("name", HEADS)
def test_features_in_half_precision_are_read_in_the_heads_own(name: str) -> None:
    found, h = head(name).float(), bag(6).half()
    assert found(h).dtype == torch.float32
    assert torch.equal(found(h), found(h.float()))


def test_training_drops_and_reaches_every_weight() -> None:
    for name in HEADS:
        found, h = head(name).train(), bag(40)
        found(h)[1].backward()
        for key, p in found.named_parameters():
            assert p.grad is not None, f"{name}: {key}"
        if ARGS[name].get("dropout"):
            assert not torch.equal(found(h), found(h)), name


def test_max_and_mean_by_hand() -> None:
    h = bag(7)
    most, mean = head("max"), head("linear")
    single = torch.stack([most(t[None]) for t in h])
    torch.testing.assert_close(most(h), single.max(0).values)
    torch.testing.assert_close(most.instances(h), single)
    torch.testing.assert_close(mean(h), torch.stack([mean(t[None]) for t in h]).mean(0))


def test_additive_shares_by_hand() -> None:
    found, h = head("additive"), bag(6)
    f, a = found.project(h), found.attention(h)[0]
    shares = torch.stack([found.psi(a[i] * f[i]) for i in range(6)])
    torch.testing.assert_close(found(h), shares.sum(0))
    parts = found.parts(h)
    torch.testing.assert_close(parts.values @ parts.weight.T, shares)
    assert parts.energies is None


def transmil(padding: str) -> tuple[TransmilHead, Transmil]:
    torch.manual_seed(4)
    reference = Transmil(grid=padding == "grid").double().eval()
    found = (
        build_head("transmil", FEATURES, CLASSES, {**ARGS["transmil"], "padding": padding}).double().eval()
    )
    found.load_state_dict(found.adapt(reference.state_dict()))
    assert isinstance(found, TransmilHead)
    return found, reference


@pytest.mark.parametrize("padding", ["bag", "grid"])
@pytest.mark.parametrize("n", [1, 3, 30])
def test_attention_of_the_class_token(padding: str, n: int) -> None:
    found, reference = transmil(padding)
    h = bag(n)
    tokens = reference.tokens(h)
    x = reference.layer1.norm(tokens)
    attention, v, fill = reference.layer1.attn.matrices(x)
    row = attention[:, fill, fill + 1 :]
    own = torch.zeros(2, n, dtype=torch.float64)
    for place in range(row.shape[1]):
        own[:, place % n] += row[:, place]
    f = found.project(h)
    torch.testing.assert_close(found.head_attention(f), own, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.attention(h), own.mean(0, keepdim=True), rtol=0, atol=1e-12)

    linear = reference.layer1.attn.to_out[0]
    by_hand = torch.stack(
        [linear(torch.cat([own[k, i] * v[k, fill + 1 + i] for k in range(2)])) for i in range(n)]
    )
    torch.testing.assert_close(found.messages(f), by_hand, rtol=0, atol=1e-12)


def test_attention_through_as_many_landmarks_as_positions_is_attention() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, dtype=torch.float64)
    found = NystromAttention(8, heads=2, landmarks=6, iterations=40).double().eval()
    q, k, v = (t.reshape(6, 2, 4).transpose(0, 1) for t in found.to_qkv(x).chunk(3, dim=1))
    whole = (q @ k.transpose(1, 2) / 2).softmax(2) @ v + found.res_conv(v[None])[0]
    expected = found.to_out(whole.transpose(0, 1).reshape(6, 8))
    torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "args", "complaint"),
    [
        ("abmill", {}, "none of mean, max.*did you mean abmil"),
        ("clam_sb", {"gates": 2}, "takes no argument gates; it takes hidden, size, gated, dropout"),
        ("abmil_gated", {"gated": False}, "takes no argument gated"),
        ("abmil", {"activation": "swish"}, "'swish' is none of relu"),
        ("abmil", {"hidden": "many"}, "cannot be built with args"),
        ("transmil", {"hidden": 8, "heads": 3}, "cannot be shared by 3 heads"),
        ("transmil", {"padding": "none"}, "padding 'none' is none of"),
    ],
)
def test_a_head_that_cannot_be_built_says_why(name: str, args: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        build_head(name, FEATURES, CLASSES, args)
