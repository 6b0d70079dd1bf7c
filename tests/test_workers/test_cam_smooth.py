"""Smooth Grad-CAM++ against closed forms, Grad-CAM++, and a slow float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ModelError, SpecError
from tests.test_workers.tiny_networks import classes, conv_net, tiles
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.gradient import gradcampp
from workers.cam.methods import method
from workers.cam.smooth import smoothgradcampp

A = torch.tensor([[[1.0, 0, 0, 3], [0, 2, 1, 1]]], dtype=torch.float64)
G = torch.tensor([[[0.5] * 4, [-0.25] * 4]], dtype=torch.float64)


def random(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(7, 2, 5, 6, generator=generator, dtype=torch.float64)
    return (
        torch.rand(2, 5, 6, generator=generator, dtype=torch.float64),
        g.mean(0),
        (g**2).mean(0),
        (g**3).mean(0),
    )


def test_toy_of_both_numerators() -> None:
    corrected, _ = smoothgradcampp(A, G, G**2, G**3)
    np.testing.assert_allclose(corrected[0], [0.5, 0, 0, 1.5], atol=1e-12)  # w = (0.5, 0)
    paper, _ = smoothgradcampp(A, G, G**2, G**3, numerator="paper")
    np.testing.assert_allclose(paper[0], [1, 0, 0, 3], atol=1e-12)  # alpha = (0.5, -4), w = (1, 0)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_one_copy_without_noise_is_gradcampp(ndim: int) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim).double()
    name = "smoothgradcampp+n=1+spread=0"
    done = explain(HookedNet(net, "relu"), x, classes(3), ["gradcampp", name])
    torch.testing.assert_close(done.maps[name], done.maps["gradcampp"], rtol=1e-6, atol=1e-9)
    a, g, *_ = random()
    torch.testing.assert_close(smoothgradcampp(a, g, g**2, g**3)[0], gradcampp(a, g)[0], rtol=1e-12, atol=0)


def noise_of(seed: int, sample: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63)
    return torch.randn(like.shape, generator=generator).to(like)


@pytest.mark.parametrize("numerator", ["corrected", "paper"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_equals_its_slow_twin(ndim: int, numerator: str) -> None:
    n, spread, c = 3, 0.2, 1
    net, x = conv_net(ndim).double(), tiles(ndim, batch=2).double()
    seeds = torch.tensor([11, 5])
    name = f"smoothgradcampp+n={n}+spread={spread}+numerator={numerator}"
    found = explain(HookedNet(net, "relu"), x, classes(3), [name], seeds)
    (maps,) = found.maps.values()
    for b in range(len(x)):
        tile, derivatives = x[b : b + 1], []
        for i in range(n):
            std = spread * float(tile.max() - tile.min())
            kept: list[Tensor] = []
            handle = net.relu.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
            y = net((tile + std * noise_of(int(seeds[b]), i, tile[0])).requires_grad_())[0, c]
            handle.remove()
            derivatives.append(torch.autograd.grad(y, kept[0])[0][0].numpy())
        kept = []
        handle = net.relu.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out.detach()))
        net(tile)
        handle.remove()
        a = kept[0][0].numpy()
        out = np.zeros(a.shape[1:])
        for k in range(len(a)):
            weight = 0.0
            for u in np.ndindex(out.shape):
                d1, d2, d3 = (sum(g[k][u] ** p for g in derivatives) / n for p in (1, 2, 3))
                denominator = 2 * d2 + a[k].sum() * d3
                alpha = (d2 if numerator == "corrected" else d1) / (denominator if denominator else 1.0)
                weight += alpha * max(d1, 0.0)
            for u in np.ndindex(out.shape):
                out[u] += weight * a[k][u]
        np.testing.assert_allclose(maps[b, c].numpy(), out, rtol=1e-5, atol=1e-6 * abs(out).max())


def test_noise_changes_nothing_in_a_linear_network() -> None:
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.layer(x).flatten(2).mean(2))
            return out

    name = "smoothgradcampp+n=3+spread=0.5"
    done = explain(HookedNet(Linear().eval(), "layer"), tiles(2), classes(3), ["gradcampp", name])
    torch.testing.assert_close(done.maps[name], done.maps["gradcampp"], rtol=1e-4, atol=1e-6)


def test_variance_falls_with_the_number_of_copies() -> None:
    net = conv_net(1).double()
    x = tiles(1, batch=1).double().expand(150, -1, -1).contiguous()  # one tile, many seeds
    few, many = (
        explain(
            HookedNet(net, "relu"),
            x,
            classes(3)[:1],
            [f"smoothgradcampp+n={n}+spread=0.05"],
            torch.arange(150),
        ).maps
        for n in (4, 16)
    )
    ratio = next(iter(few.values())).double().var(0).sum() / next(iter(many.values())).double().var(0).sum()
    # an estimated variance of 150 draws is known to some 12 %
    assert 2.6 < float(ratio) < 6.2


def test_a_tile_has_its_noise_whichever_worker_computes_it() -> None:
    net, x, name = HookedNet(conv_net(2), "relu"), tiles(2), "smoothgradcampp+n=3"
    seeds = torch.tensor([7, 1, 3, 9])
    whole = explain(net, x, classes(3), [name], seeds).maps[name]
    halves = [explain(net, x[i], classes(3), [name], seeds[i]).maps[name] for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    other = explain(net, x, classes(3), [name], seeds + 1).maps[name]
    assert not torch.allclose(other, whole, rtol=1e-3)


def test_full_subsets_are_the_whole_map_and_parts_add_up() -> None:
    a, *d = random()
    whole, _ = smoothgradcampp(a, *d)
    full = torch.ones(5, 6, dtype=torch.bool)
    for kept in (
        smoothgradcampp(a, *d, channels="0-1-2-3-4"),
        smoothgradcampp(a, *d, channels="top5"),
        smoothgradcampp(a, *d, channels="top99"),
        smoothgradcampp(a, *d, region=full[0]),
        smoothgradcampp(a, *d, neurons=full),
    ):
        assert torch.equal(kept[0], whole)
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    for one, rest in (
        ({"channels": "0-3"}, {"channels": "1-2-4"}),
        ({"region": mask[:, 0]}, {"region": ~mask[:, 0]}),
        ({"neurons": mask}, {"neurons": ~mask}),
    ):
        parts = smoothgradcampp(a, *d, **one)[0], smoothgradcampp(a, *d, **rest)[0]
        torch.testing.assert_close(parts[0] + parts[1], whole)
        assert not torch.equal(parts[0], whole)


def test_top_channels_are_those_of_largest_weight_in_each_row() -> None:
    a, *d = random()
    for b in range(2):
        one = [t[b : b + 1] for t in (a, *d)]
        weight = []
        for k in range(5):
            alone, _ = smoothgradcampp(*one, channels=str(k))
            weight.append(float((alone / one[0][:, k]).mean()))
        best = "-".join(map(str, sorted(np.argsort(weight)[-2:])))
        assert torch.equal(
            smoothgradcampp(a, *d, channels="top2")[0][b], smoothgradcampp(*one, channels=best)[0][0]
        )


def test_doubt_where_a_denominator_that_counts_is_not_positive() -> None:
    a = torch.tensor([[[-4.0, 0.0]]])
    d = torch.ones(1, 1, 2)
    assert smoothgradcampp(a, d, d, d)[1].all()
    assert not smoothgradcampp(-a, d, d, d)[1].any()


def test_options() -> None:
    assert method("smoothgradcampp+channels=3-7-9").info.name == "smoothgradcampp+channels=3-7-9"
    net = HookedNet(conv_net(2), "relu")
    names = ["smoothgradcampp+n=1+channels=0-4", "smoothgradcampp+n=1+channels=top2"]
    done = explain(net, tiles(2), classes(3), names)
    assert not torch.equal(done.maps[names[0]], done.maps[names[1]])
    with pytest.raises(ModelError, match="5 channels"):
        explain(net, tiles(2), classes(3), ["smoothgradcampp+n=1+channels=5"])
    for bad in (
        "n=0",
        "spread=-1",
        "spread=nan",
        "numerator=other",
        "channels=top0",
        "channels=1-",
        "channels=a",
    ):
        with pytest.raises(SpecError, match="option"):
            method(f"smoothgradcampp+{bad}")
