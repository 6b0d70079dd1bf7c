"""CAM, Grad-CAM, Layer-CAM, XGrad-CAM and Score-CAM against torch-cam, `normalized=False`.

torch-cam applies the final ReLU (but for CAM), so ours is rectified here. It keeps activations that alias the network's, so
DenseNet is explained after its in-place ReLU, and it needs parameters that require gradients. Its Grad-CAM++ divides
a copy of alpha, so that the denominator is never applied: no anchor (MONAI is).
"""

from __future__ import annotations

import pytest
import torch
from torchcam.methods import CAM, GradCAM, LayerCAM, ScoreCAM, XGradCAM

from tests.parity.anchors import CASES, agree, case, ours
from tests.test_workers.tiny_networks import conv_net

AFTER_RELU = {"densenet-2d": "class_layers.relu", "densenet-3d": "class_layers.relu"}


@pytest.mark.parametrize(
    ("method", "reference", "rtol"),
    [("gradcam", GradCAM, 1e-5), ("layercam", LayerCAM, 1e-4), ("xgradcam", XGradCAM, 1e-4)],
)
@pytest.mark.parametrize("name", CASES)
def test_gradient_methods(name: str, method: str, reference: type, rtol: float) -> None:
    net, layer, x, classes = case(name)
    layer = AFTER_RELU.get(name, layer)
    with reference(net, layer) as extractor:
        scores = net(x)
        (expected,) = extractor(classes, scores, normalized=False)
    agree(ours(net, layer, x, classes, method).relu(), expected, rtol)


@pytest.mark.parametrize("ndim", [2, 3])
def test_cam(ndim: int) -> None:
    net = conv_net(ndim, head="gap")
    x = torch.randn(4, 2, *(19, 14, 16)[:ndim], generator=torch.Generator().manual_seed(3))
    classes = [2, 0, 1, 2]
    with CAM(net, "relu", fc_layer="fc", input_shape=tuple(x.shape[1:])) as extractor:
        net(x)
        (expected,) = extractor(classes, normalized=False)
    found = ours(net, "relu", x, classes, "cam")
    # ours is divided by the number of cells, so that it sums to the score
    agree(found * found[0].numel(), expected)


@pytest.mark.parametrize("name", CASES)
def test_scorecam(name: str) -> None:
    net, layer, x, classes = case(name)
    layer = AFTER_RELU.get(name, layer)
    with ScoreCAM(net, layer, input_shape=tuple(x.shape[1:])) as extractor:
        net(x)
        (expected,) = extractor(classes, normalized=False)
    # hundreds of passes in chunks of other sizes, and a softmax
    agree(ours(net, layer, x, classes, "scorecam+mask=torchcam"), expected, 1e-4)
