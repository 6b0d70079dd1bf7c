"""What each tile gave to its bag's logits: closed forms, real forwards, relevance, against the plainest way to compute them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ModelError, SpecError
from tests.test_workers.tiny_heads import CLOSED, FEATURES, TINY, features, tiny_head, view
from workers.cam import bag as bag_module
from workers.cam.bag import BagParts, BagView, bag_gradient
from workers.cam.bag_methods import BAG_METHODS, attribute, bag_method, probabilities
from workers.cam.bag_patching import agreement, estimated_patching, patching
from workers.cam.relevance_rules import LinearRule, RelevanceRules
from workers.models.heads.head import BagHead

PARTS = (*CLOSED, "additive")


def able(name: str) -> list[str]:
    """Methods that a head can have."""
    head, methods = tiny_head(name), []
    for method, row in BAG_METHODS.items():
        try:
            row.check(head)
        except ModelError:
            continue
        methods.append(method)
    return methods


@pytest.mark.parametrize("name", TINY)
def test_every_method_of_every_head(name: str) -> None:
    """One column a target, finite; tiles in another order have the same values; the caller's features are as they were."""
    methods = [m.replace("gradients", "gradients+steps=2") for m in able(name)]
    assert {"gradient_input", "integrated_gradients+steps=2", "lrp", "keep_one", "drop_one"} <= set(methods)
    assert ("contribution" in methods) == (name in PARTS)
    bag = view(name)
    before = bag.h.clone()
    found = attribute(bag, methods)
    assert torch.equal(bag.h, before)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    turned = attribute(BagView(bag.head, bag.h[order], bag.targets), methods)
    for method, one in found.items():
        assert one.relevance.shape == (11, 3)
        assert one.relevance.dtype == torch.float32
        assert one.relevance.isfinite().all()
        if not getattr(bag.head, "ordered", False):
            torch.testing.assert_close(turned[method].relevance, one.relevance[order], atol=1e-6, rtol=1e-5)
    if not BAG_METHODS["attention"].info.signed and "attention" in found and name != "transmil":
        torch.testing.assert_close(found["attention"].relevance.sum(0), torch.ones(3))
    assert not any(p.grad is not None for p in bag.head.parameters())


@pytest.mark.parametrize("name", TINY)
def test_one_tile_and_one_class(name: str) -> None:
    """A bag of one tile has no rest; a single logit has its probability."""
    bag = BagView(tiny_head(name, classes=1), features(1), torch.tensor([[1.0], [-1.0]]))
    found = attribute(bag, [m.replace("gradients", "gradients+steps=2") for m in able(name)])
    for method, one in found.items():
        relevance = one.relevance[0]
        if method == "drop_one":
            assert relevance.isnan().all()
        elif method in ("attention", "instance_probability"):
            assert (relevance >= -0.5).all()
        else:
            assert relevance[0] == -relevance[1]
    torch.testing.assert_close(
        found["keep_one"].relevance[0, 0].double(), bag.logits[0], atol=1e-6, rtol=1e-6
    )
    if "instance_probability" in found:
        torch.testing.assert_close(found["instance_probability"].relevance.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", PARTS)
def test_contributions_sum_to_the_logit_minus_its_bias(name: str) -> None:
    bag = view(name)
    one, logits = attribute(bag, ["contribution"])["contribution"], bag.head(bag.h).detach()
    total = one.relevance.double().sum(0) + torch.tensor(one.facts["bias"])
    torch.testing.assert_close(total, logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sharp", [3.0, 3000.0])
def test_keeping_and_dropping_are_forward_passes(name: str, sharp: float) -> None:
    """Also where one tile has all the attention: `(S - e_i u_i) / (1 - a_i)` would be 0 / 0 there."""
    head, h = tiny_head(name, sharp=sharp), features()
    bag = BagView(head, h, torch.eye(3))
    keep, drop = BAG_METHODS["keep_one"].run(bag, None)[0], BAG_METHODS["drop_one"].run(bag, None)[0]
    if name == "abmil" and sharp > 3:
        assert bag.sums is not None
        assert bag.sums.attention.max() > 1 - 1e-9
    with torch.no_grad():
        for i in range(len(h)):
            rest = torch.cat([h[:i], h[i + 1 :]])
            torch.testing.assert_close(keep[i], head(h[i : i + 1]), atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(drop[i], head(h) - head(rest), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_gradient_is_autograd_in_whatever_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_module, "CHUNK", 4)
    head, h, target = tiny_head(name), features(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    leaf = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(head(leaf) @ target, leaf)
    torch.testing.assert_close(bag_gradient(head, h, target), expected, atol=1e-12, rtol=1e-12)
    slope = BagView(head, h, target[None]).slope()[:, 0]
    torch.testing.assert_close(slope, (h * expected).sum(1), atol=1e-12, rtol=1e-12)


def test_values_do_not_hang_on_what_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision in the store, float32 in the head; slopes and sums come of one reading where both are asked."""
    monkeypatch.setattr(bag_module, "CHUNK", 200)
    head, h = tiny_head("abmil_gated").float(), features(500).half()
    together = attribute(BagView(head, h, torch.eye(3)), ["drop_one", "contribution", "gradient_input"])
    for name, one in together.items():
        alone = attribute(BagView(head, h, torch.eye(3)), [name])[name]
        assert torch.equal(alone.relevance, one.relevance)
    with torch.no_grad():
        rest = head(h[1:]) - head(h)
    torch.testing.assert_close(together["drop_one"].relevance[0], -rest, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["abmil_gated", "clam_mb", "dsmil"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients_make_up_the_rise_from_the_baseline(name: str, baseline: str) -> None:
    """The path has corners (ReLU), so the gap closes as steps are added, to below 0.5 % at 64."""
    bag = view(name)
    base = torch.zeros_like(bag.h) if baseline == "zero" else bag.h.mean(0).expand_as(bag.h)
    method = f"integrated_gradients+baseline={baseline}+steps=64"
    one = attribute(bag, [method])[method]
    with torch.no_grad():
        rise = bag.head(bag.h) - bag.head(base)
    assert (torch.tensor(one.facts["gap"]).abs() < 5e-3 * (1 + rise.abs())).all()
    torch.testing.assert_close(
        one.relevance.double().sum(0) + torch.tensor(one.facts["gap"]), rise, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "options", ["", "+rule=epsilon", "+rule=gamma", "+biases=drop", "+rule=gamma+epsilon=0+biases=drop"]
)
def test_relevance_is_conserved(name: str, options: str) -> None:
    """Tiles, class token and biases together are the logit; without biases' shares, tiles and class token are."""
    bag = view(name)
    one = attribute(bag, [f"lrp{options}"])[f"lrp{options}"]
    size = one.relevance.abs().sum(0).double() + torch.tensor(one.facts["bias"]).abs() + bag.logits.abs()
    assert (torch.tensor(one.facts["rest"]).abs() < 1e-5 * size).all(), one.facts
    assert any(one.facts["cls"]) == (name == "transmil")
    if options.endswith("drop"):
        assert not any(one.facts["bias"])


@pytest.mark.parametrize("name", ["linear", "mean", "abmil", "abmil_gated", "clam_mb"])
def test_relevance_without_biases_is_the_contribution(name: str) -> None:
    """Attention a constant, a ReLU layer without bias: `R_i = a_i (v_i . w_c)` (xMIL, section 3)."""
    head: Any = tiny_head(name)
    if hasattr(head, "projection") and not isinstance(head.projection, nn.Identity):
        nn.init.zeros_(head.projection[0].bias)
    bag = BagView(head, features(), torch.eye(3))
    relevance, _ = BAG_METHODS["lrp"].run(bag, BAG_METHODS["lrp"].options)
    expected, _ = BAG_METHODS["contribution"].run(bag, None)
    torch.testing.assert_close(relevance, expected, atol=1e-13, rtol=1e-12)


class Layers(nn.Module):
    """ReLU layers of known weights on the sum of the bag."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, h: Tensor) -> Tensor:
        inner = nn.functional.linear(h.sum(0), self.first).relu()
        return nn.functional.linear(inner, self.second)


def lrp(head: nn.Module, h: Tensor, options: str = "") -> Tensor:
    row = bag_method(f"lrp{options}")
    relevance, _ = row.run(BagView(head, h, torch.eye(1)), row.options)
    return relevance[:, 0]


def test_relevance_by_hand() -> None:
    first = torch.tensor([[1.0, 2.0], [1.0, -1.0], [-1.0, -1.0]]).double()
    second = torch.tensor([[1.0, 3.0, 5.0]]).double()
    h = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    # z = (5, 2, dead); y = 5 + 6: R of tile 0 = 3 + 3 * 3, of tile 1 = 2 - 3
    torch.testing.assert_close(lrp(Layers(first, second), h), torch.tensor([12.0, -1.0]).double())
    # gamma 1: z' = (10, 6 - 1 = 5): tile 0 gets 5 * 6/10 + 6 * 6/5, tile 1 the rest, 5 * 4/10 - 6 * 1/5
    hand = torch.tensor([10.2, 0.8]).double()
    torch.testing.assert_close(lrp(Layers(first, second), h, "+rule=gamma+gamma=1+epsilon=0"), hand)
    # a unit scaled up before and down after is the same unit
    scaled = Layers(first * 7, second / 7)
    for options in ("", "+rule=gamma+epsilon=0"):
        torch.testing.assert_close(lrp(scaled, h, options), lrp(Layers(first, second), h, options))
    assert (lrp(Layers(-first.abs(), second), h) == 0).all()


class Parts(nn.Module):
    """Operations that have rules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, h: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.linear(h)))
        x = torch.softmax(x @ x.T, 1) @ x
        x = torch.einsum("nd,nd->nd", x, self.linear(x)) * x.tanh()
        return x.sum()[None]


@pytest.mark.parametrize("kind", ["0", "epsilon", "gamma"])
@pytest.mark.parametrize("biases", ["share", "drop"])
def test_rules_leave_the_forward_pass_alone(kind: str, biases: str) -> None:
    """The same numbers, hence the same attention, whatever the rule; and relevance is conserved through every operation."""
    torch.manual_seed(0)
    net, h = Parts().double(), features()
    nn.init.normal_(net.norm.bias)
    options = f"+rule={kind}+biases={biases}" if (kind, biases) != ("0", "share") else ""
    row = bag_method(f"lrp{options}")
    bag = BagView(net, h, torch.eye(1))
    with RelevanceRules(row.options.linear), torch.no_grad():  # type: ignore[attr-defined]
        torch.testing.assert_close(net(h), bag.head(h), rtol=1e-14, atol=0)
    relevance, facts = row.run(bag, row.options)
    size = relevance.abs().sum() + facts["bias"].abs() + bag.logits.abs()
    assert (facts["rest"].abs() < 1e-4 * size).all()


def test_layer_norm_keeps_its_own_forward_with_a_constant_deviation() -> None:
    norm = nn.LayerNorm(8).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with RelevanceRules(LinearRule()):
        y = norm(x)
    assert torch.equal(y, norm(x))
    (c,) = torch.autograd.grad(y[:, 0].sum(), x)
    expected = (torch.eye(8).double()[0] - 1 / 8) / (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(c, expected.detach())


def test_attention_in_one_piece_is_refused() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

        def forward(self, h: Tensor) -> Tensor:
            out: Tensor = self.attention(h[None], h[None], h[None], need_weights=True)[0]
            return out.sum()[None]

    with pytest.raises(ModelError, match="multi_head_attention_forward"):
        lrp(Fused().double(), features())


def test_probabilities_of_classes_contrasts_and_single_logits() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    targets = torch.tensor([[0.0, 0, 1], [1, -1, 0], [0, -1, 0]])
    p = probabilities(logits, targets)[0]
    torch.testing.assert_close(p[0], logits.softmax(1)[0, 2])
    torch.testing.assert_close(p[1], torch.tensor(1.3).sigmoid())
    torch.testing.assert_close(p[2], torch.tensor(1.0).sigmoid())
    torch.testing.assert_close(
        probabilities(logits[:, :1], torch.ones(1, 1)), torch.tensor([[0.3]]).sigmoid()
    )


def test_instance_probability_of_an_instance_classifier() -> None:
    bag = view("dsmil")
    found = attribute(bag, ["instance_probability"])["instance_probability"].relevance
    assert isinstance(bag.head, BagHead)
    torch.testing.assert_close(found, bag.head.instances(bag.h).softmax(1).detach().float())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["abmil", "clam_mb", "dsmil", "additive"])
@pytest.mark.parametrize("rows", [1, 11])
def test_patching_exchanges_one_tile(name: str, rows: int) -> None:
    bag, control = view(name), features(rows, seed=9)
    found = patching(bag, control)
    with torch.no_grad():
        for i in (0, 4, 10):
            patched = bag.h.clone()
            patched[i] = control[i % rows]
            torch.testing.assert_close(found[i], bag.head(bag.h) - bag.head(patched), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(patching(bag, control, [4, 2]), found[[4, 2]])
    assert patching(bag, bag.h).abs().max() < 1e-12


def test_patching_is_exact_to_first_order_where_the_head_is_linear() -> None:
    bag, control = view("linear"), features(seed=9)
    for rule in (None, LinearRule()):
        torch.testing.assert_close(estimated_patching(bag, control, rule), patching(bag, control))
        torch.testing.assert_close(agreement(bag, control, [1, 3, 8], rule), torch.ones(3).double())
    curved = view("dsmil")
    assert (agreement(curved, control, range(11)) < 1 - 1e-9).all()


class Wrong(nn.Module):
    """Says that a tile's numbers are its own, which they are not; or leaves the bias out."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.linear, self.fault = nn.Linear(FEATURES, 2).double(), fault

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.linear((h - h.mean(0)).relu().mean(0))
        return out

    def parts(self, h: Tensor) -> BagParts:
        n, bias = len(h), self.linear.bias * (self.fault != "bias")
        values = (h - h.mean(0)).relu()
        attention = h.new_full((1, n), 1 / n)
        return BagParts(attention, values, self.linear.weight, bias, h.new_zeros(1, n))


@pytest.mark.parametrize("fault", ["bias", "others"])
def test_parts_that_are_not_the_forward_pass_are_refused(fault: str) -> None:
    with pytest.raises(ModelError, match=r"parts\(\) is not what forward\(\) computes"):
        attribute(BagView(Wrong(fault), features(), torch.eye(2)), ["contribution"])


def test_what_cannot_be_asked_is_said_before_any_work() -> None:
    class Silent(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            raise AssertionError("ran")

    bag = BagView(Silent(), features(), torch.eye(2))
    with pytest.raises(ModelError, match="needs a head with parts"):
        attribute(bag, ["gradient_input", "contribution"])
    with pytest.raises(SpecError, match="did you mean contribution"):
        attribute(bag, ["contributions"])
    with pytest.raises(SpecError, match="has no option 'rules'"):
        attribute(bag, ["lrp+rules=0"])
    with pytest.raises(ModelError, match="at least one tile"):
        BagView(Silent(), features(0), torch.eye(2))


def test_rows_say_what_they_are() -> None:
    unsigned = {name for name, row in BAG_METHODS.items() if not row.info.signed}
    assert unsigned == {"attention", "instance_probability"}
    assert [name for name, row in BAG_METHODS.items() if not row.info.class_specific] == ["attention"]
    for row in BAG_METHODS.values():
        assert (row.info.unit == "1") == (row.info.name in unsigned)
        assert row.info.citation
    assert math.isclose(float(bag_method("lrp+gamma=0.5").options.gamma), 0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["abmil", "clam_mb", "dsmil"])
def test_a_gradient_with_the_attention_held_constant(name: str) -> None:
    """That of what the tiles contribute under the attention they have; of DSMIL, of a pass with that attention put in."""
    bag = view(name)
    h = bag.h.clone().requires_grad_()
    if name == "dsmil":
        held = bag.head.attention(bag.h).detach()
        hook = bag.head.softmax.register_forward_hook(lambda *_: held)
        value = bag.head(h) @ bag.targets[0]
        hook.remove()
    else:
        parts = bag.head.parts(h)
        value = (parts.attention.detach().T * (parts.values @ parts.weight.T)).sum(0) @ bag.targets[0]
    (expected,) = torch.autograd.grad(value, h)
    torch.testing.assert_close(bag.gradient(0, constant=True), expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(bag.gradient(0), bag_gradient(bag.head, bag.h, bag.targets[0]))
    through = bag.gradient(0)
    assert name == "dsmil" or (expected - through).abs().max() > 1e-3 * through.abs().max()
    assert not any(module._forward_hooks for module in bag.head.modules())
