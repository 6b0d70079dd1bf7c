"""What the CAM benchmark compares: networks, and each library's Grad-CAM at its best settings on a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from schemas.explanation import Precision
from tests.parity.gradcam_library import pytorch_grad_cam
from tests.test_workers.tiny_networks import lively
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.presets import picture
from workers.cam.targets import ResolvedTarget
from workers.cam.tokens import AS_FOUND, TokenLayout
from workers.models.fast import accelerate, tiers

CLASSES = 10
TARGET = 3
Run = Callable[[], Tensor | None]
"""One call of a contender; gives its maps, where it has any."""


class First(nn.Module):
    """The scores of a network that gives more than scores."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)[0]
        return scores


def resnet(block: str, layers: list[int]) -> nn.Module:
    from monai.networks.nets.resnet import ResNet

    widths = [64, 128, 256, 512]
    return ResNet(
        block,
        layers,
        widths,
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_size=7,
        conv1_t_stride=2,
        num_classes=CLASSES,
    )


def densenet(ndim: int) -> nn.Module:
    from monai.networks.nets.densenet import DenseNet121

    return DenseNet121(spatial_dims=ndim, in_channels=3 if ndim == 2 else 1, out_channels=CLASSES)


def vit() -> nn.Module:
    from monai.networks.nets.vit import ViT

    net = ViT(
        3, (224, 224), (16, 16), hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12, proj_type="conv",
        classification=True, num_classes=CLASSES, spatial_dims=2,
    )  # fmt: skip
    return First(net)


@dataclass(frozen=True)
class Case:
    """A network, the layer explained, a batch."""

    build: Callable[[], nn.Module]
    layer: str
    tile: tuple[int, ...]
    batch: int
    tokens: TokenLayout = AS_FOUND

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return lively(self.build()).eval()

    def x(self, batch: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch or self.batch, *self.tile, generator=generator)


CASES = {
    "resnet18": Case(lambda: resnet("basic", [2, 2, 2, 2]), "layer4", (3, 224, 224), 32),
    "resnet18-layer3": Case(lambda: resnet("basic", [2, 2, 2, 2]), "layer3", (3, 224, 224), 32),
    "resnet50": Case(lambda: resnet("bottleneck", [3, 4, 6, 3]), "layer4", (3, 224, 224), 32),
    "densenet121": Case(lambda: densenet(2), "class_layers.relu", (3, 224, 224), 32),
    "densenet121-3d": Case(lambda: densenet(3), "class_layers.relu", (1, 64, 64, 64), 4),
    "vit-b": Case(vit, "net.blocks.11.norm1", (3, 224, 224), 8, TokenLayout("tokens", 1, (14, 14))),
}


def ours(net: nn.Module, case: Case, x: Tensor, *, every: bool = False, precision: Precision = "fp32") -> Run:
    """Our Grad-CAM of one class, or of all of them."""
    split = HookedNet(net.requires_grad_(False), case.layer, tokens=case.tokens)
    if precision != "fp32":
        accelerate(split, precision, x[:2])
    targets = [ResolvedTarget(str(c), c) for c in (range(CLASSES) if every else [TARGET])]
    row = TARGET if every else 0
    return lambda: explain(split, x, targets, ["gradcam"]).maps["gradcam"][:, row]


def bare(net: nn.Module, _case: Case, x: Tensor) -> Run:
    """The forward pass and nothing else."""

    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def captum(net: nn.Module, case: Case, x: Tensor) -> Run:
    """Frozen, so that the trunk keeps no graph."""
    from captum.attr import LayerGradCam

    method = LayerGradCam(net.requires_grad_(False), net.get_submodule(case.layer))
    return lambda: method.attribute(x, TARGET)[:, 0].detach()


def torchcam(net: nn.Module, case: Case, x: Tensor) -> Run:
    """Frozen but for the explained layer, which needs a graph; no normalisation, no upsampling."""
    from torchcam.methods import GradCAM

    extractor = GradCAM(net, case.layer)
    return lambda: extractor([TARGET] * len(x), net(x), normalized=False)[0].detach()


def monai(net: nn.Module, case: Case, x: Tensor) -> Run:
    """`compute_map`: before its upsampling and scaling."""
    from monai.visualize.class_activation_maps import GradCAM

    method = GradCAM(nn_module=net, target_layers=case.layer)
    return lambda: method.compute_map(x, class_idx=TARGET)[:, 0].detach()


def pgc(net: nn.Module, case: Case, x: Tensor, method: str = "GradCAM", **options: Any) -> Run:
    """The call, which is all there is: maps come scaled and enlarged."""
    library = pytorch_grad_cam()
    target = library.utils.model_targets.ClassifierOutputTarget(TARGET)
    if case.tokens.layout:
        options["reshape_transform"] = lambda t: t[:, 1:].mT.reshape(len(t), -1, 14, 14)
    cam = getattr(library, method)(model=net, target_layers=[net.get_submodule(case.layer)], **options)
    return lambda: torch.from_numpy(cam(input_tensor=x, targets=[target] * len(x)))


def fast_tier(x: Tensor) -> Precision:
    """As the driver settles it: MONAI's 3-D DenseNet has a pooling that CPUs lack in bfloat16."""
    found = tiers("fast", x.device.type)
    return found[-1] if x.ndim == 5 and x.device.type == "cpu" else found[0]


Make = Callable[[nn.Module, Case, Tensor], Run]

CONTENDERS: dict[str, Make] = {
    "bare": bare,
    "ours": ours,
    "ours, all classes": lambda net, case, x: ours(net, case, x, every=True),
    "ours, fast": lambda net, case, x: ours(net, case, x, precision=fast_tier(x)),
    "captum": captum,
    "torch-cam": torchcam,
    "MONAI": monai,
    "pytorch-grad-cam": pgc,
}


def contenders(case: Case) -> list[str]:
    """Those that can explain it: only pytorch-grad-cam rearranges tokens."""
    return [
        n
        for n in CONTENDERS
        if not case.tokens.layout or n not in ("captum", "torch-cam", "MONAI", "ours, all classes")
    ]


def prepared(name: str, case: Case, net: nn.Module, x: Tensor) -> Run:
    """A contender on its own copy of `net`."""
    return CONTENDERS[name](copy.deepcopy(net), case, x)


def difference(name: str, theirs: Tensor, mine: Tensor, size: tuple[int, ...]) -> float | None:
    """Largest difference from our maps, as a share of the largest value, both post-processed as `name` does."""
    scale = float(mine.abs().max())
    match name:
        case "torch-cam" | "MONAI":
            mine = mine.relu()
        case "pytorch-grad-cam":
            if len(size) == 3:
                return None  # enlarged by a cubic spline: compared before that in tests/parity
            mine, scale = picture(mine, size, "pgc"), 1.0
    return float((theirs - mine).abs().max()) / scale
