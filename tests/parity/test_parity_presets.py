"""Presets `torchcam` and `monai` against what those libraries hand to their users."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.visualize.class_activation_maps import CAM as MonaiCam
from monai.visualize.class_activation_maps import GradCAM as MonaiGradCam
from torchcam.methods import CAM, GradCAM, LayerCAM

from tests.parity.anchors import case, ours
from tests.test_workers.tiny_networks import conv_net
from workers.cam.presets import picture

CASES = ("conv-2d", "conv-3d", "resnet-2d", "densenet-3d")
LAYERS = {"densenet-3d": "class_layers.relu"}


@pytest.mark.parametrize(("method", "reference"), [("gradcam", GradCAM), ("layercam", LayerCAM)])
@pytest.mark.parametrize("name", CASES)
def test_torchcam(name: str, method: str, reference: type) -> None:
    net, layer, x, classes = case(name)
    layer = LAYERS.get(name, layer)
    with reference(net, layer) as extractor:
        (expected,) = extractor(classes, net(x))
    found = picture(ours(net, layer, x, classes, method), x.shape[2:], "torchcam")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.max() > 0.9


@pytest.mark.parametrize("name", CASES)
def test_monai(name: str) -> None:
    net, layer, x, _ = case(name)
    layer = LAYERS.get(name, layer)
    found = picture(ours(net, layer, x, [2] * len(x), "gradcam"), x.shape[2:], "monai")
    hooked = copy.deepcopy(net)
    expected = MonaiGradCam(nn_module=hooked, target_layers=layer)(x, class_idx=2)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert expected.min() < 0.1


def test_cam_is_not_rectified_there() -> None:
    net = conv_net(2, head="gap")
    x = torch.randn(3, 2, 19, 14, generator=torch.Generator().manual_seed(3))
    maps = ours(net, "relu", x, [1] * 3, "cam")
    expected = MonaiCam(nn_module=copy.deepcopy(net), target_layers="relu", fc_layers="fc")(
        x, class_idx=[1] * 3
    )[:, 0]
    torch.testing.assert_close(picture(maps, (19, 14), "monai", relu=False), expected, rtol=0, atol=2e-5)
    with CAM(net, "relu", fc_layer="fc", input_shape=tuple(x.shape[1:])) as extractor:
        net(x)
        (torch_cam,) = extractor([1] * 3)
    torch.testing.assert_close(picture(maps, (19, 14), "torchcam", relu=False), torch_cam, rtol=0, atol=1e-5)
