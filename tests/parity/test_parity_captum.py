"""Grad-CAM and HiResCAM against captum: signed, summed over channels, at the layer's own resolution."""

from __future__ import annotations

import pytest
from captum.attr import LayerGradCam, LayerGradientXActivation

from tests.parity.anchors import CASES, agree, case, ours


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradcam(name: str, frozen: bool) -> None:
    net, layer, x, classes = case(name)
    net.requires_grad_(not frozen)
    expected = LayerGradCam(net, net.get_submodule(layer)).attribute(x, classes)[:, 0]
    agree(ours(net, layer, x, classes, "gradcam"), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_hirescam(name: str, frozen: bool) -> None:
    net, layer, x, classes = case(name)
    net.requires_grad_(not frozen)
    expected = LayerGradientXActivation(net, net.get_submodule(layer)).attribute(x, classes).sum(1)
    agree(ours(net, layer, x, classes, "hirescam"), expected)
