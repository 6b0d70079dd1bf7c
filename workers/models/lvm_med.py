"""LVM-Med's two encoders (Nguyen et al., NeurIPS 2023), for checkpoints that the user has.

Published keys, from the authors' repository duyhominhnguyen/LVM-Med: `lvmmed_resnet.torch` is a flat state dict of torchvision's
ResNet-50 without `fc`; `lvmmed_vit.pth` that of the image encoder of Segment Anything (ViT-B) without `pos_embed`. The authors' own
classification code loads both without checking; here every key finds its place or an error lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.models.names import Names, renamed
from workers.models.networks import monai_network
from workers.models.sam import SamEncoder

LICENCE = "LVM-Med's weights are for non-commercial research (Creative Commons BY-NC; the edition is in the README of duyhominhnguyen/LVM-Med)"
RESNET: Names = (
    # the classifier that the authors' code puts on it
    (r"(?:backbone\.)?fc\.(?:weight|bias)", None),
    (r"backbone\.(.+)", r"\1"),
)
VIT: Names = (
    # what serves Segment Anything's mask decoder, and that; the authors' classifier does not run the neck
    (r"(?:model\.|image_encoder\.)?neck\..+", None),
    (r"(?:prompt_encoder|mask_decoder)\..+", None),
    (r"fc\.(?:weight|bias)", None),
    (r"(?:model|image_encoder)\.(.+)", r"\1"),
)
_COUNTER = ".num_batches_tracked"


def lvm_med(name: str, args: Mapping[str, Any]) -> nn.Module:
    """`resnet50` (2048 numbers a tile) or `vit_b` (768), with random weights.

    Parameters
    ----------
    args
        `vit_b`: `positions` (whether the file has `pos_embed`; the published one has none), and sizes of `SamEncoder`.

    Raises
    ------
    ModelError
        Another name, or arguments that it does not take.
    """
    if name == "resnet50" and not args:
        return monai_network(
            "resnet50",
            {
                "spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 7, "conv1_t_stride": 2, "shortcut_type": "B",
                "bias_downsample": False, "feed_forward": False,
            },
        )  # fmt: skip
    if name == "vit_b":
        try:
            return SamEncoder(**{"positions": False, **args})
        except TypeError as error:
            msg = f"[network] vit_b of LVM-Med cannot be built with args = {dict(args)}: {error}"
            raise ModelError(msg) from error
    msg = (
        f"[network] name = {name!r} with args {dict(args)}; LVM-Med has 'resnet50', without args, and 'vit_b'"
    )
    raise ModelError(msg)


def lvm_med_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under the names of `network`.

    Batches that a norm has counted serve training only; files older than that count have none, and get 0.
    """
    published = VIT if isinstance(network, SamEncoder) else RESNET
    found = renamed(state, published, "LVM-Med")
    for name in network.state_dict():
        if name.endswith(_COUNTER) and name.removesuffix(_COUNTER) + ".running_var" in found:
            found.setdefault(name, torch.tensor(0))
    return found
