"""pytorch-grad-cam's own arithmetic, fed with the same activations and gradients; Ablation-CAM's and Score-CAM's weights.

It rectifies, scales and enlarges every map, so its `get_cam_image`, which comes before all that, is the anchor. Its
Grad-CAM++ adds 1e-6 to a denominator of the order of g^2: gradients of the order of 1 to 10, in float64, make that small.
Its Eigen family centres channels and leaves the sign to LAPACK. Its Grad-CAM++ and its whole runs are 2-D only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.parity.anchors import agree
from tests.parity.gradcam_library import INSTALL, pytorch_grad_cam
from tests.test_workers.tiny_networks import conv_net
from workers.cam.capture import HookedNet
from workers.cam.eigen import eigencam, eigengradcam
from workers.cam.explain import explain
from workers.cam.fem import fem
from workers.cam.gradient import gradcam, gradcam_elementwise, gradcampp, hirescam, layercam, xgradcam
from workers.cam.targets import ResolvedTarget

GRIDS = {"2d": (5, 7), "3d": (3, 4, 5)}
BATCH, CHANNELS = 3, 6


@pytest.fixture(scope="module")
def library() -> Any:
    try:
        return pytorch_grad_cam()
    except ImportError:
        pytest.skip(f"pytorch-grad-cam is missing: {INSTALL}")


def tensors(grid: tuple[int, ...], *, relu: bool = True) -> tuple[Tensor, Tensor]:
    """Activations and gradients `(B, K, *grid)`, float64."""
    generator = torch.Generator().manual_seed(len(grid))
    a = torch.randn(BATCH, CHANNELS, *grid, generator=generator, dtype=torch.float64)
    g = 5 * torch.randn(a.shape, generator=generator, dtype=torch.float64)
    return (a.relu() if relu else a), g


def theirs(library: Any, name: str, a: Tensor, g: Tensor) -> Tensor:
    """`get_cam_image` of the class `name`: before rectifying, scaling and enlarging."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    cam = getattr(library, name)(model=net, target_layers=[net[0]])
    image = cam.get_cam_image(None, net[0], None, a.numpy().copy(), g.numpy().copy(), False)
    return torch.as_tensor(np.asarray(image, dtype=np.float64)).flatten(1)


Ours = Callable[[Tensor, Tensor], Any]

PURE: list[tuple[str, Ours, float, tuple[str, ...]]] = [
    ("GradCAM", gradcam, 1e-6, ("2d", "3d")),
    ("HiResCAM", hirescam, 1e-6, ("2d", "3d")),
    ("LayerCAM", layercam, 1e-6, ("2d", "3d")),
    ("GradCAMElementWise", gradcam_elementwise, 1e-6, ("2d", "3d")),
    ("FEM", lambda a, _: fem(a, library=True), 1e-6, ("2d", "3d")),
    ("GradCAMPlusPlus", gradcampp, 1e-4, ("2d",)),
    ("XGradCAM", xgradcam, 1e-4, ("2d",)),
]


@pytest.mark.parametrize(
    ("name", "ours", "tolerance", "grid"), [(n, f, t, grid) for n, f, t, grids in PURE for grid in grids]
)
def test_pure_functions(library: Any, name: str, ours: Ours, tolerance: float, grid: str) -> None:
    a, g = tensors(GRIDS[grid])
    found = ours(a.flatten(2), g.flatten(2))
    found = found[0] if isinstance(found, tuple) else found
    expected = theirs(library, name, a, g)
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), check_dtype=False
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("EigenCAM", lambda a, _: eigencam(a, centred=True)),
        ("EigenGradCAM", lambda a, g: eigengradcam(a, g, centred=True)),
    ],
)
def test_projections_up_to_sign(library: Any, name: str, ours: Ours, grid: str) -> None:
    a, g = tensors(GRIDS[grid], relu=False)
    found, _ = ours(a.flatten(2), g.flatten(2))
    expected = theirs(library, name, a, g)
    sign = (found * expected).sum(1, keepdim=True).sign()
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, sign * expected, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "ours", "options"),
    [
        # A batch size of 1 and channels of minimum 0: beyond those its ablations add up along the batch.
        ("AblationCAM", "ablationcam+divisor=score", {"batch_size": 1}),
        ("ScoreCAM", "scorecam+mask=pgc", {}),
    ],
)
@pytest.mark.parametrize("head", ["gap", "conv"])
def test_weights_of_methods_that_run_the_network(
    library: Any, name: str, ours: str, options: dict[str, Any], head: str
) -> None:
    net = conv_net(2, head=head).eval()
    x = torch.randn(BATCH, 2, 18, 26, generator=torch.Generator().manual_seed(3))
    classes = [2, 0, 1]
    targets = [ResolvedTarget(str(c), c) for c in range(3)]
    split = HookedNet(copy.deepcopy(net).requires_grad_(False), "relu")
    found = explain(split, x, targets, [ours])
    (maps,) = found.maps.values()
    a = split.trunk(x)
    assert float(a.amin()) == 0
    wanted = [library.utils.model_targets.ClassifierOutputTarget(c) for c in classes]
    cam = getattr(library, name)(model=net, target_layers=[net.relu], **options)
    weights = torch.as_tensor(cam.get_cam_weights(x, net.relu, wanted, a.numpy().copy(), None))
    agree(maps[range(BATCH), classes], torch.einsum("bk,bkhw->bhw", weights, a), rtol=1e-4)
