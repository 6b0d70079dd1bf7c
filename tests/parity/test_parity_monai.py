"""Grad-CAM, Grad-CAM++ and CAM against MONAI's `compute_map`.

MONAI applies the final ReLU to Grad-CAM and Grad-CAM++, needs parameters that require gradients and a class as an int; its
backward hooks cannot stand before an in-place ReLU, so DenseNet is explained after its own. Its Grad-CAM++ weighs the
gradient by exp(score), row by row only for a batch of one, and sums A g^3 where the paper has g^3 times the sum of A: the
same thing where the gradient is the same in every cell, that is before global average pooling. It adds 1e-7 to a denominator
of the order of g^2: a head 200 times as steep, in float64, makes that small.
"""

from __future__ import annotations

import pytest
import torch
from monai.visualize.class_activation_maps import CAM, GradCAM, GradCAMpp

from tests.parity.anchors import CASES, agree, case, ours
from tests.test_workers.tiny_networks import conv_net

POOLED = {"resnet-2d": "layer4", "densenet-2d": "class_layers.relu", "densenet-3d": "class_layers.relu"}


@pytest.mark.parametrize("name", CASES)
def test_gradcam(name: str) -> None:
    net, layer, x, _ = case(name)
    layer = POOLED.get(name, layer)
    for c in range(3):
        expected = GradCAM(nn_module=net, target_layers=layer).compute_map(x, class_idx=c)[:, 0]
        net_again, *_ = case(name)  # MONAI leaves its hooks in the network
        agree(ours(net_again, layer, x, [c] * len(x), "gradcam").relu(), expected)


@pytest.mark.parametrize("name", POOLED)
def test_gradcampp(name: str) -> None:
    net, _, x, classes = case(name)
    layer = POOLED[name]
    net, x = net.double(), x.double()
    with torch.no_grad():
        net.get_parameter("fc.weight" if name == "resnet-2d" else "class_layers.out.weight").mul_(200)
    found = ours(net, layer, x, classes, "gradcampp").relu()
    for b, c in enumerate(classes):
        row = x[b : b + 1]
        expected = GradCAMpp(nn_module=net, target_layers=layer).compute_map(row, class_idx=c)[:, 0]
        agree(found[b : b + 1], (expected / net(row)[0, c].exp()).float(), rtol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_cam(ndim: int) -> None:
    net = conv_net(ndim, head="gap")
    x = torch.randn(4, 2, *(19, 14, 16)[:ndim], generator=torch.Generator().manual_seed(3))
    for c in range(3):
        cam = CAM(nn_module=net, target_layers="relu", fc_layers="fc")
        expected = cam.compute_map(x, class_idx=[c] * 4)[:, 0]
        found = ours(net, "relu", x, [c] * 4, "cam")
        # MONAI puts every cell through the whole linear layer, its bias included
        agree(found * found[0].numel(), expected - net.fc.bias[c])
