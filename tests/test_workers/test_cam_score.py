"""Score-CAM, SS-CAM and IS-CAM against slow twins: one mask, one pass, NumPy's own interpolation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.errors import SpecError
from schemas.explanation import MapFlag
from tests.test_workers.tiny_networks import ConvNet, classes, conv_net, tiles
from workers.cam.capture import HookedNet, PairNet
from workers.cam.explain import explain
from workers.cam.methods import method
from workers.cam.score import constant_channels, masks

Array = NDArray[np.float64]
SMALL = {1: (13,), 2: (8, 10), 3: (6, 8, 7)}
SEEDS = torch.tensor([11, 5, 2**40])


def slow_enlarge(low: Array, size: tuple[int, ...], corners: bool) -> Array:
    """Linear interpolation, one output value at a time."""
    out = np.zeros(size)
    for at in np.ndindex(size):
        value = 0.0
        sides = []
        for i, n, m in zip(at, low.shape, size, strict=True):
            where = i * (n - 1) / (m - 1) if corners else max((i + 0.5) * n / m - 0.5, 0)
            before = int(where)
            sides.append([(before, 1 - (where - before)), (min(before + 1, n - 1), where - before)])
        for corner in itertools.product(*sides):
            value += np.prod([w for _, w in corner]) * low[tuple(i for i, _ in corner)]
        out[at] = value
    return out


def slow_stretch(m: Array, epsilon: float) -> Array:
    stretched: Array = (m - m.min()) / (m.max() - m.min() + epsilon)
    return stretched


def slow_mask(low: Array, size: tuple[int, ...], preset: str) -> Array:
    if low.max() == low.min():
        return np.zeros(size)
    if preset == "torchcam":
        return slow_enlarge(slow_stretch(low, 1e-8), size, False)
    if preset == "pgc":
        return slow_stretch(slow_enlarge(low, size, True), 1e-8)
    return slow_stretch(slow_enlarge(low, size, False), 0)


def slow_map(
    net: nn.Module, a: Array, x: Tensor, c: int, preset: str, inputs: Callable[[Tensor], list[Tensor]]
) -> Array:
    """One tile: `a` `(K, *grid)`, `x` `(C_in, *S)`; `inputs` makes the inputs whose scores are averaged from a mask."""
    scores = []
    for channel in a:
        mask = torch.from_numpy(slow_mask(channel, tuple(x.shape[1:]), preset))
        scores.append(np.mean([float(net(i[None])[0, c].detach()) for i in inputs(mask)]))
    weights = np.exp(scores) / np.sum(np.exp(scores))
    out = np.zeros(a.shape[1:])
    for w, channel in zip(weights, a, strict=True):
        out += w * channel
    return out


def twins(x: Tensor, noise: list[Tensor]) -> list[Callable[[Tensor], list[Tensor]]]:
    """Inputs that a mask makes: Score-CAM, SS-CAM on the mask and on the input, IS-CAM of three steps."""
    return [
        lambda m: [x * m],
        lambda m: [x * (m + 0.3 * e[:1]) for e in noise],
        lambda m: [x * m + 0.3 * e for e in noise],
        lambda m: [x * m * i / 3 for i in (1, 2, 3)],
    ]


def slow_noise(seed: int, sample: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % 2**63)
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "pgc", "torchcam"])
def test_every_method_equals_its_slow_twin(ndim: int, preset: str) -> None:
    net, x = conv_net(ndim).double(), tiles(ndim, batch=3).double()
    x = x[(slice(None), slice(None), *(slice(n) for n in SMALL[ndim]))]
    with torch.no_grad():  # one channel dead, one constant and not 0
        assert net.body.bias is not None
        net.body.weight[1:3] = 0
        net.body.bias[1], net.body.bias[2] = -1, 0.7
        net.fc.weight.mul_(20)  # so that the softmax is far from uniform
    split = HookedNet(net, "relu")
    score = f"scorecam+mask={preset}"
    names = [
        score,
        f"sscam+mask={preset}+samples=2+sigma=0.3",
        f"sscam+mask={preset}+samples=2+sigma=0.3+on=input",
    ]
    names.append(f"iscam+mask={preset}+samples=3")
    done = explain(split, x, classes(3), names, SEEDS)
    a = split.trunk(x).numpy()
    for b, c in [(0, 0), (1, 2), (2, 1)] if ndim < 3 else [(1, 2)]:
        tile, seed = x[b], int(SEEDS[b])
        noise = [slow_noise(seed, s, tile.shape) for s in range(2)]
        for name, inputs in zip(names, twins(tile, noise), strict=True):
            expected = slow_map(net, a[b], tile, c, preset, inputs)
            np.testing.assert_allclose(
                done.maps[name][b, c].numpy(), expected, rtol=1e-5, atol=1e-6 * expected.max(), err_msg=name
            )


@pytest.mark.parametrize("size", [(9,), (8, 13), (5, 9, 7)])
@pytest.mark.parametrize("preset", ["paper", "pgc", "torchcam"])
def test_masks(size: tuple[int, ...], preset: str) -> None:
    low = torch.rand(
        4, 1, *(3, 4, 2)[: len(size)], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    low[1] = 0.1  # enlarging this is not exact: stretched, its rounding would fill the whole range
    found = masks(low, size, preset)  # type: ignore[arg-type]
    for n in range(4):
        np.testing.assert_allclose(
            found[n, 0].numpy(), slow_mask(low[n, 0].numpy(), size, preset), atol=1e-12
        )
    assert (found[1] == 0).all()
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-12
    if preset != "torchcam":
        assert found[0].max() == pytest.approx(1, abs=1e-6)


class Counting(ConvNet):
    """Counts the tiles it sees."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


def counting() -> Counting:
    torch.manual_seed(0)
    return Counting(2).eval()


def test_constant_channels_cost_one_pass_a_tile_whatever_the_number_of_targets() -> None:
    net, x = counting(), tiles(2, batch=3)
    whole = explain(HookedNet(net, "relu"), x, classes(3), ["scorecam"])
    assert net.seen == 3 + 3 * 5
    net.seen = 0
    explain(HookedNet(net, "relu"), x, classes(3), ["iscam+samples=2"])
    assert net.seen == 3 + 2 * 3 * 5
    with torch.no_grad():
        assert net.body.bias is not None
        net.body.weight[1:4] = 0  # three of five constant: 0, 0.7, 0.2
        net.body.bias[:] = torch.tensor([0.5, -1, 0.7, 0.2, 0.5])
    net.seen = 0
    split = HookedNet(net, "relu")
    assert constant_channels(split.trunk(x).flatten(2)).sum(1).tolist() == [3, 3, 3]
    net.seen = 0
    explain(split, x, classes(3), ["scorecam"])
    assert net.seen == 3 + 3 * 3
    assert whole.maps["scorecam"].shape == (3, 3, 9, 13)


@pytest.mark.parametrize("name", ["scorecam", "sscam+samples=2", "iscam+samples=2"])
def test_the_chunk_changes_rounding_only(name: str) -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=3)
    whole = explain(net, x, classes(3), [name], SEEDS).maps[name]
    for chunk in (1, 7):
        found = explain(net, x, classes(3), [f"{name}+chunk={chunk}"], SEEDS).maps
        torch.testing.assert_close(
            next(iter(found.values())), whole, rtol=1e-5, atol=1e-6 * float(whole.max())
        )


@pytest.mark.parametrize("name", ["scorecam", "sscam+samples=2", "iscam+samples=2"])
def test_a_tile_does_not_hang_on_its_neighbours(name: str) -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=3)
    whole = explain(net, x, classes(3), [name], SEEDS)
    alone = explain(net, x[1:2], classes(3), [name], SEEDS[1:2])
    torch.testing.assert_close(alone.maps[name][0], whole.maps[name][1], rtol=1e-5, atol=1e-7)
    bad = x.clone()
    bad[0, 0, 3, 3] = torch.nan
    spoiled = explain(net, bad, classes(3), [name], SEEDS)
    assert spoiled.maps[name][0].isnan().all()
    assert (spoiled.flags[name][0] == MapFlag.NOT_FINITE).all()
    torch.testing.assert_close(spoiled.maps[name][1:], whole.maps[name][1:], rtol=1e-5, atol=1e-7)


def test_noise_belongs_to_the_seed() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2, batch=1).repeat(3, 1, 1, 1)
    maps = explain(net, x, classes(3), ["sscam+samples=2"], torch.tensor([1, 1, 2])).maps["sscam+samples=2"]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-6, atol=1e-8)
    assert (maps[0] - maps[2]).abs().max() > 1e-6 * maps.abs().max()


def test_without_noise_or_steps_they_are_scorecam() -> None:
    net, x = HookedNet(conv_net(2), "relu"), tiles(2)
    done = explain(net, x, classes(3), ["scorecam", "sscam+sigma=0.0+samples=3", "iscam+samples=1"])
    first, *others = done.maps.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-7)


def test_weights_are_a_mean_of_channels() -> None:
    # the softmax sums to 1: where all channels are alike, the map is that channel whatever the scores
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.relu(x.expand(-1, 4, -1, -1)).mean((2, 3)))
            return out

    x = torch.rand(2, 1, 5, 7)
    done = explain(HookedNet(Same().eval(), "relu"), x, classes(2), ["scorecam", "iscam"])
    for maps in done.maps.values():
        torch.testing.assert_close(maps, x.expand(-1, 2, -1, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scorecam", "sscam+samples=1", "iscam+samples=1"])
def test_edges(name: str) -> None:
    net = conv_net(2)
    single = explain(HookedNet(conv_net(2, head="gap"), "relu"), torch.randn(2, 2, 2, 2), classes(3), [name])
    assert (single.flags[name] & MapFlag.SINGLE_CELL).all()
    with torch.no_grad():
        net.body.weight.zero_()
        assert net.body.bias is not None
        net.body.bias.fill_(-1)
    dead = explain(HookedNet(net, "relu"), tiles(2), classes(3), [name])
    assert (dead.maps[name] == 0).all()
    # all masks are empty: none moves the score
    assert (dead.flags[name] == MapFlag.EMPTY | MapFlag.CONSTANT | MapFlag.DOUBTFUL).all()


def test_a_pair_of_modules_gives_the_same() -> None:
    net, x = conv_net(2), tiles(2)
    trunk = nn.Sequential(net.stem, net.pool, net.body, net.relu)
    tail = nn.Sequential(net.tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    expected = explain(HookedNet(net, "relu"), x, classes(3), ["scorecam"]).maps["scorecam"]
    found = explain(PairNet(trunk, tail, "cut"), x, classes(3), ["scorecam"]).maps["scorecam"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_options() -> None:
    assert "masks as pgc has them" in method("scorecam+mask=pgc").info.edition
    assert "noise on the mask" in method("sscam").info.edition
    assert "noise on the input" in method("sscam+on=input+mask=pgc").info.edition
    assert "i / n" in method("iscam+mask=torchcam").info.edition
    for wrong in ("scorecam+mask=cubic", "scorecam+chunk=0", "sscam+samples=0", "sscam+sigma=nan"):
        with pytest.raises(SpecError, match="option"):
            method(wrong)
