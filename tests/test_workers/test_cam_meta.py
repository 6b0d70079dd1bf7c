"""Meta-saliency: the step taken is the one of plain SGD, the map the one there, and the network what it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.errors import ModelError
from schemas.explanation import MapFlag
from schemas.model import OutputSpec
from tests.test_workers.tiny_networks import ConvNet, classes, conv_net, monai_networks, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.meta import after_step, correlation, order, sign, stepped
from workers.cam.normgrad import NormGradOptions, of_view
from workers.cam.targets import resolve
from workers.cam.view import Batch, View


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def view_of(net: HookedNet, x: Tensor, c: int = 1) -> View:
    target = torch.zeros(1, 3)
    target[0, c] = 1
    with torch.no_grad():
        return View(Batch(net, x, net.forward(x), torch.arange(len(x))), target)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_no_step_gives_the_plain_map(ndim: int) -> None:
    net, x = HookedNet(conv_net(ndim), "relu"), tiles(ndim, batch=3)
    done = explain(net, x, classes(3), ["normgrad", "normgrad_meta+lr=0"])
    # a tile alone may round differently than in company
    torch.testing.assert_close(done.maps["normgrad_meta+lr=0"], done.maps["normgrad"], rtol=1e-5, atol=1e-9)


def slow_meta(net: ConvNet, x: Tensor, c: int, lr: float, uphill: bool = False) -> Tensor:
    """A copy of the network, `torch.optim.SGD`, and NormGrad by end-to-end autograd; of one logit class 1 is the positive."""
    net = copy.deepcopy(net).eval()
    for p in net.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    scores = net(x)
    if scores.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(scores, torch.tensor([[float(c)]]))
    else:
        loss = F.cross_entropy(scores, torch.tensor([c]))
    torch.autograd.backward(-loss if uphill else loss)
    optimizer.step()
    kept: list[Tensor] = []
    net.relu.register_forward_hook(lambda _m, _i, out: kept.append(out))
    y = net(x)[0, min(c, scores.shape[1] - 1)]
    (g,) = torch.autograd.grad(y, kept[0])
    norm: Tensor = torch.linalg.vector_norm(kept[0], dim=1) * torch.linalg.vector_norm(g, dim=1)
    return norm.detach()[0]


@pytest.mark.parametrize("uphill", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_step_equals_that_of_an_optimizer(ndim: int, uphill: bool) -> None:
    net, x = conv_net(ndim), tiles(ndim, batch=2)
    name = f"normgrad_meta+lr=0.5+adversarial={str(uphill).lower()}"
    done = explain(HookedNet(net, "relu"), x, classes(3), [name, "normgrad"])
    for b in range(2):
        for c in range(3):
            expected = slow_meta(net, x[b : b + 1], c, 0.5, uphill)
            np.testing.assert_allclose(
                done.maps[name][b, c], expected, rtol=1e-4, atol=1e-6 * float(expected.max())
            )
    assert not torch.allclose(done.maps[name], done.maps["normgrad"], rtol=1e-2)


def test_one_logit_learns_by_the_cross_entropy_of_two() -> None:
    net, x = conv_net(2, classes=1), tiles(2, batch=1)
    targets = resolve(["all"], OutputSpec(kind="logit", classes=("no", "yes")), 1)
    found = explain(HookedNet(net, "relu"), x, targets, ["normgrad_meta+lr=0.5"]).maps["normgrad_meta+lr=0.5"]
    for c in range(2):
        expected = slow_meta(net, x, c, 0.5)
        np.testing.assert_allclose(found[0, c], expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_the_network_is_left_bit_for_bit() -> None:
    module, layer, shape = monai_networks()["densenet-2d"]
    module.train()
    module.class_layers.out.bias.requires_grad_(False)  # type: ignore[union-attr]
    before = state(module)
    storage = [p.data_ptr() for p in module.parameters()]
    flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]
    x = torch.randn(2, *shape)
    done = explain(HookedNet(module, layer), x, classes(3), ["normgrad_meta+lr=1", "normgrad"])
    assert not torch.equal(done.maps["normgrad_meta+lr=1"], done.maps["normgrad"])
    assert same(module, before), "weights and running statistics"
    assert [p.data_ptr() for p in module.parameters()] == storage
    assert ([p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]) == flags
    assert all(p.grad is None for p in module.parameters())


def test_the_network_is_left_as_it_was_when_something_breaks() -> None:
    net, x = conv_net(2), tiles(2)
    before = state(net)
    view = view_of(HookedNet(net, "relu"), x)

    def breaks(view: View, _: object) -> tuple[Tensor, None]:
        assert not same(net, before), "the step is taken"
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        after_step(view, breaks, None, 0.1)
    assert same(net, before)
    with pytest.raises(KeyboardInterrupt), stepped(net, {p: torch.ones_like(p) for p in net.parameters()}):
        raise KeyboardInterrupt
    assert same(net, before)
    # a step that does not fit breaks half-way through being taken
    wrong = {
        p: torch.ones(7, 7, 7, 7, 7) if p is net.fc.weight else torch.ones_like(p) for p in net.parameters()
    }
    with pytest.raises(RuntimeError), stepped(net, wrong):
        pass
    assert same(net, before)


def test_tied_weights_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.b.weight = self.a.weight
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))
            return out

    net, x = Tied(), tiles(2, batch=1)
    before = state(net)

    def tied(view: View, _: object) -> tuple[Tensor, None]:
        assert torch.equal(net.a.weight, net.b.weight)
        assert not torch.equal(net.a.weight, before["a.weight"])
        return view.a.sum(1), None

    after_step(view_of(HookedNet(net, "b"), x), tied, None, 0.1)
    assert same(net, before)


def test_tiles_do_not_learn_from_each_other() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    together = explain(net, x, classes(3), ["normgrad_meta+lr=1"]).maps["normgrad_meta+lr=1"]
    for b in range(len(x)):
        alone = explain(net, x[b : b + 1], classes(3), ["normgrad_meta+lr=1"]).maps["normgrad_meta+lr=1"]
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-8)
    x[1, 0, 3, 3] = torch.nan
    done = explain(net, x, classes(3), ["normgrad_meta+lr=1"])
    assert (done.flags["normgrad_meta+lr=1"][1] == MapFlag.NOT_FINITE).all()
    torch.testing.assert_close(done.maps["normgrad_meta+lr=1"][2], together[2], rtol=1e-5, atol=1e-8)


def test_order_and_sign() -> None:
    view = view_of(HookedNet(conv_net(2), "relu"), tiles(2))
    options = NormGradOptions()
    for metric in (order, sign):
        still = metric(view, of_view, options, 0.0)
        torch.testing.assert_close(still, torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    small, large = (order(view, of_view, options, lr) for lr in (1e-4, 2.0))
    assert (small > 0.999).all()
    assert (large < small).all()
    # steps down and up part further than a step and none
    assert (sign(view, of_view, options, 0.5) < order(view, of_view, options, 0.5)).any()


def test_correlation() -> None:
    a = torch.rand(3, 4, 5)
    np.testing.assert_allclose(correlation(a, 2 * a - 1), 1)
    np.testing.assert_allclose(correlation(a, -a), -1)
    assert correlation(a, torch.ones_like(a)).isnan().all()
    b = torch.rand(3, 4, 5)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(correlation(a, b), expected, rtol=1e-5)


def test_networks_without_weights_to_move() -> None:
    net, x = conv_net(2), tiles(2)
    pair = PairNet(nn.Sequential(net.stem, net.pool, net.body, net.relu), Tail(net), "cut")
    with pytest.raises(ModelError, match="eager network"):
        explain(pair, x, classes(3), ["normgrad_meta"])
    with pytest.raises(ModelError, match="precision fp32"):
        explain(HookedNet(conv_net(2).bfloat16(), "relu"), x.bfloat16(), classes(3), ["normgrad_meta"])
    bare = HookedNet(Bare(), "relu")
    with pytest.raises(ModelError, match="scores that depend on parameters"):
        explain(bare, x, classes(2), ["normgrad_meta"])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x).mean((2, 3))
        return out


class Tail(nn.Module):
    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor) -> Tensor:
        out: Tensor = self.net.fc(self.net.tail(a).flatten(2).mean(2))
        return out
