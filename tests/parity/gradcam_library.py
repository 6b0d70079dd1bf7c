"""pytorch-grad-cam, imported beside a torch that its torchvision was not built for."""

from __future__ import annotations

import importlib
from typing import Any

import torch

INSTALL = "pip install --no-deps -c deploy/constraints.txt -r tests/bench/requirements.txt"

_DECLARED: list[torch.library.Library] = []
"""Operators live as long as the library that declares them."""


def declare_torchvision_operators() -> None:
    """What torchvision's Python part needs to be imported where its compiled part does not load, beside a CPU build of torch.

    It registers shapes for two operators that nothing here calls: declaring them is enough.
    """
    if not _DECLARED and not hasattr(torch.ops.torchvision, "nms"):
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def pytorch_grad_cam() -> Any:
    """The package; ImportError, naming the install line, where it is missing."""
    declare_torchvision_operators()
    try:
        return importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        msg = f"pytorch-grad-cam is not installed ({error}): {INSTALL}"
        raise ImportError(msg) from error
