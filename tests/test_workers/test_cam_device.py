"""The same maps on a CPU and on a GPU: float32 on both, without TF32, so that only the order of sums differs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from tests.test_workers.tiny_networks import conv_net, monai_networks
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.targets import ResolvedTarget
from workers.models.fast import accelerate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

METHODS = (
    "gradcam", "hirescam", "layercam", "gradcampp", "xgradcam", "smoothgradcampp", "eigencam", "eigengradcam", "fem",
    "normgrad", "scorecam", "ablationcam",
)  # fmt: skip
CASES = ("conv-1d", "conv-2d", "conv-3d", "resnet-2d", "densenet-3d")
CLASSES = [ResolvedTarget(str(c), c) for c in range(3)]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TF32 keeps 10 bits of a product: another tier."""
    found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found


def case(name: str) -> tuple[torch.nn.Module, str, torch.Tensor]:
    shape: tuple[int, ...]
    if name.startswith("conv"):
        ndim = int(name[5])
        net, layer, shape = conv_net(ndim), "relu", (2, *(19, 14, 16)[:ndim])
    else:
        net, layer, shape = monai_networks()[name]  # type: ignore[assignment]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    return net.eval().requires_grad_(False), layer, x


@pytest.mark.parametrize("name", CASES)
def test_maps_agree(name: str) -> None:
    net, layer, x = case(name)
    on_cpu = explain(HookedNet(copy.deepcopy(net), layer), x, CLASSES, METHODS)
    on_gpu = explain(HookedNet(net.cuda(), layer), x.cuda(), CLASSES, METHODS)
    torch.testing.assert_close(on_gpu.scores.cpu(), on_cpu.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(on_gpu.target_index.cpu(), on_cpu.target_index)
    for method in METHODS:
        a, b = on_gpu.maps[method], on_cpu.maps[method]
        assert a.device.type == "cuda"
        scale = float(b.nan_to_num().abs().max())
        differ = (a.cpu() - b).abs() - 1e-3 * b.abs()
        assert torch.equal(a.isnan().cpu(), b.isnan()), method
        assert float(differ.nan_to_num().max()) <= 1e-4 * scale, method


@pytest.mark.parametrize("name", ["resnet-2d", "densenet-3d"])
def test_bfloat16_keeps_to_its_tolerance(name: str) -> None:
    net, layer, x = case(name)
    exact = explain(HookedNet(copy.deepcopy(net), layer), x, CLASSES, ["gradcam"]).maps["gradcam"]
    fast = accelerate(HookedNet(net.cuda(), layer), "fast-bf16", x[:2].cuda())
    found = explain(fast, x.cuda(), CLASSES, ["gradcam"]).maps["gradcam"].cpu()
    assert float((found - exact).norm() / exact.norm()) <= 2e-2


def test_calls_leave_memory_where_it_was() -> None:
    net, layer, x = case("resnet-2d")
    split, x = HookedNet(net.cuda(), layer), x.cuda()
    for _ in range(5):
        explain(split, x, CLASSES, ["gradcam", "gradcampp"])
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        explain(split, x, CLASSES, ["gradcam", "gradcampp"])
    assert torch.cuda.memory_allocated() == before
