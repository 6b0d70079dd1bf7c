"""CLAM's two heads (Lu et al., Nature Biomedical Engineering 2021): gated attention, one or one a class.

The clustering branch trains the attention and takes no part in the prediction: its weights are left out of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from workers.models.heads.abmil import AttentionHead
from workers.models.names import Names

_ATTENTION: Names = (
    (r"attention_net\.0\.(weight|bias)", r"projection.0.\1"),
    # the attention network comes after an activation and, in most editions, a dropout
    (r"attention_net\.[23]\.attention_a\.0\.(weight|bias)", r"attend.inner.\1"),
    (r"attention_net\.[23]\.attention_b\.0\.(weight|bias)", r"attend.gate.\1"),
    (r"attention_net\.[23]\.attention_c\.(weight|bias)", r"attend.outer.\1"),
    (r"attention_net\.[23]\.0\.(weight|bias)", r"attend.inner.\1"),
    (r"attention_net\.[23]\.[23]\.(weight|bias)", r"attend.outer.\1"),
    (r"instance_classifiers\.\d+\.(weight|bias)", None),
)


class ClamSB(AttentionHead):
    """One attention for all classes.

    Parameters
    ----------
    hidden, size
        512 and 256 in the published `small`, 512 and 384 in `big`.
    gated
        Published with and without.
    """

    published: ClassVar[Names] = (*_ATTENTION, (r"classifiers\.(weight|bias)", r"classifier.\1"))
    per_class: ClassVar[bool] = False

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 512,
        size: int = 256,
        gated: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(
            features,
            classes,
            hidden=hidden,
            dropout=dropout,
            size=size,
            gated=gated,
            attention_dropout=dropout,
            per_class=self.per_class,
        )


class ClamMB(ClamSB):
    """An attention a class, each read by a classifier of its own."""

    published: ClassVar[Names] = _ATTENTION
    per_class: ClassVar[bool] = True

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `BagHead.adapt`; the classifiers of the classes become the rows of one."""
        found = super().adapt(state)
        for kind in ("weight", "bias"):
            names = [f"classifiers.{c}.{kind}" for c in range(self.classes)]
            if all(n in found for n in names):
                found[f"classifier.{kind}"] = torch.cat([found.pop(n) for n in names])
        return found
