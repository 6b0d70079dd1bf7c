"""Small bag heads of every family, in float64, and bags for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.cam.bag import BagView
from workers.models.heads.registry import build_head

FEATURES = 6
TINY: dict[str, dict[str, Any]] = {
    "mean": {"hidden": 8},
    "max": {"hidden": 8},
    "abmil": {"hidden": 8, "size": 4},
    "abmil_gated": {"hidden": 8, "size": 4},
    "clam_sb": {"hidden": 8, "size": 4},
    "clam_mb": {"hidden": 8, "size": 4},
    "dsmil": {"hidden": 8, "size": 4},
    "transmil": {"hidden": 8, "heads": 2, "landmarks": 4},
    "additive": {"hidden": 8, "size": 4, "layers": (5,)},
    "linear": {},
}
CLOSED = ("mean", "abmil", "abmil_gated", "clam_sb", "clam_mb", "linear")
"""Whose logits, of any part of a bag, are a sum over its tiles."""


def tiny_head(name: str, classes: int = 3, seed: int = 0, sharp: float = 3.0) -> nn.Module:
    """A head whose biases are not 0 and whose attention is not flat."""
    torch.manual_seed(seed)
    head = build_head(name, FEATURES, classes, TINY[name]).double().eval()
    for n, p in head.named_parameters():
        if n.endswith("bias"):
            nn.init.normal_(p, 0, 0.3)
        elif "attend.outer" in n:
            p.data *= sharp
    return head


def features(n: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed)).abs().double()


def view(name: str, n: int = 11, classes: int = 3) -> BagView:
    """A bag under a tiny head, every class a target."""
    return BagView(tiny_head(name, classes), features(n), torch.eye(classes))
