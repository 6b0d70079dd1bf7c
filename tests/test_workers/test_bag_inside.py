"""A slide's logit down to the cell: maps of a tile under its bag's gradient are those through encoder and head."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from tests.test_workers.tiny_heads import FEATURES, TINY, tiny_head
from tests.test_workers.tiny_networks import ConvNet, conv_net, tiles
from workers.cam.bag import bag_gradient
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.gradient import gradcam, hirescam, layercam, xgradcam
from workers.cam.head import linear_head
from workers.cam.targets import TileTarget
from workers.models.heads.registry import build_head

METHODS = {"hirescam": hirescam, "gradcam": gradcam, "layercam": layercam, "xgradcam": xgradcam}
TARGET = torch.tensor([1.0, -0.5, 2.0]).double()


def encoder(ndim: int, tail: str) -> ConvNet:
    """Embeddings of 6 numbers behind a convolution (`conv`), a layer on pooling (`gap`), or of 5 by pooling alone (`pool`)."""
    net = conv_net(ndim, head="conv" if tail == "conv" else "gap", classes=FEATURES).double()
    if tail == "pool":
        net.fc = nn.Identity()  # type: ignore[assignment]
    return net


def end_to_end(net: ConvNet, head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, their gradient through the rest of the encoder and the head, embeddings; one graph, one backward."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = net.relu.register_forward_hook(keep)
    h = net(x)
    handle.remove()
    (head(h) @ TARGET).backward()
    (a,) = kept
    assert a.grad is not None
    net.zero_grad()
    head.zero_grad()
    return a.detach().flatten(2), a.grad.flatten(2), h.detach()


@pytest.mark.parametrize("tail", ["conv", "gap", "pool"])
@pytest.mark.parametrize("name", ["abmil", "dsmil", "transmil", "clam_mb", "additive"])
def test_chained_is_end_to_end(name: str, tail: str) -> None:
    """Through 9 tiles that interact in the head, float64."""
    net, x = encoder(2, tail), tiles(2, batch=9).double()
    head = tiny_head(name)
    if tail == "pool":
        torch.manual_seed(3)
        head = build_head(name, 5, 3, TINY[name]).double().eval()
    a, g, h = end_to_end(net, head, x)
    v = bag_gradient(head, h, TARGET)
    found = []
    for rows in (slice(0, 4), slice(4, 9)):  # a tile at a time or many: the bag is not needed any more
        split = HookedNet(net, "relu")
        found.append(explain(split, x[rows], [TileTarget("slide", v[rows], 2)], list(METHODS)))
        assert (linear_head(split, x) is not None) == (tail != "conv")
        assert (found[-1].target_index == 2).all()
    for method, f in METHODS.items():
        maps = torch.cat([part.maps[method] for part in found]).flatten(1)
        assert maps.dtype == torch.float64
        assert (maps - f(a, g)).abs().max() <= 1e-10


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_pooled_encoder_needs_no_backward_and_its_cells_sum(
    ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail is proven to be the identity on the pooled cells; the raw HiResCAM of a tile then sums to `v_i . h_i`."""
    net, x = encoder(ndim, "pool"), tiles(ndim).double()
    split = HookedNet(net, "relu")
    proved = linear_head(split, x)
    assert proved is not None
    assert torch.equal(proved.weight, torch.eye(5).double())

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("differentiated")

    monkeypatch.setattr(split, "grad", refuse)
    v = torch.randn(len(x), 5, generator=torch.Generator().manual_seed(2)).double()
    found = explain(split, x, [TileTarget("slide", v), TileTarget("against", -v)], ["hirescam"])
    with torch.no_grad():
        h = net(x)
    cells = found.maps["hirescam"].flatten(2).sum(2)
    torch.testing.assert_close(cells[:, 0], (v * h).sum(1))
    assert torch.equal(cells[:, 1], -cells[:, 0])


def test_square_layer_after_pooling_is_not_taken_for_the_identity() -> None:
    net = encoder(2, "gap")
    net.fc = nn.Linear(5, 5).double()
    found = linear_head(HookedNet(net, "relu"), tiles(2).double())
    assert found is not None
    assert torch.equal(found.weight, net.fc.weight.detach())


def test_weights_of_another_width_are_refused() -> None:
    net, x = HookedNet(encoder(2, "gap"), "relu"), tiles(2).double()
    with pytest.raises(ModelError, match="as many as the network has scores"):
        explain(net, x, [TileTarget("slide", torch.zeros(len(x), 4))], ["gradcam"])
