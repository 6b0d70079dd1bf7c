"""What the rest of the project sees of a model."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.explanation import CellGeometry
from schemas.model import ModelCard
from workers.cam.capture import SplitNet


class ModelAdapter(Protocol):
    """A loaded network, in eval mode, frozen, split at its target layer and checked against its card."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def target_layer(self) -> str:
        """Where the network is split."""
        ...

    @property
    def net(self) -> SplitNet:
        """What `workers.cam` explains."""
        ...

    @property
    def cells(self) -> CellGeometry:
        """Where the target layer's cells lie in a tile."""
        ...

    @property
    def n_outputs(self) -> int:
        """C, columns of the scores."""
        ...

    def prepare(self, pixels: NDArray[Any] | Tensor) -> Tensor:
        """Pixels as read `(B, C_in, *S)` -> float32 input of the network, on its device."""
        ...

    def scores(self, x: Tensor) -> Tensor:
        """Raw outputs `(B, C)` for prepared input, without a graph."""
        ...
