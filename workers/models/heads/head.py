"""What every bag head is: features of a bag of tiles in, one logit a class out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.bag import BagParts
from workers.models.names import Names, renamed

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class BagHead(nn.Module, ABC):
    """`(N, D)` features of one bag -> `(C,)` logits, in three steps: `classify(pool(project(h)))`.

    One bag at a time; in eval mode nothing is random. Every non-linearity and every softmax over tiles is a module of its
    own, so that a rule of attribution can be attached to it: attention is what an `nn.Softmax` gives. A head that can say
    more has `attention(h) -> (G, N)`, `parts(h) -> BagParts` or `instances(h) -> (N, C)` besides.

    Parameters
    ----------
    features
        D, numbers a tile.
    classes
        C, logits.
    hidden
        M, width behind the projection `Linear, activation, dropout`; 0: none, M = D.
    activation
        A name of `ACTIVATIONS`.
    dropout
        Share of the projected numbers dropped while training.
    """

    ordered: ClassVar[bool] = False
    """Whether the logits depend on the order of the tiles."""
    published: ClassVar[Names] = ()

    def __init__(
        self, features: int, classes: int, hidden: int = 0, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.features = features
        self.classes = classes
        self.width = hidden or features
        self.projection: nn.Module = nn.Identity()
        if hidden:
            self.projection = nn.Sequential(
                nn.Linear(features, hidden), activation_module(activation), nn.Dropout(dropout)
            )

    def project(self, h: Tensor) -> Tensor:
        """`(N, D)` features in any precision -> `(N, M)` in the head's own; each tile by itself.

        Raises
        ------
        ModelError
            No tile, or another number of features than the head reads.
        """
        if h.ndim != 2 or h.shape[1] != self.features:
            msg = (
                f"the features have shape {tuple(h.shape)}; the bag head {type(self).__name__} expected (tiles, "
                f"{self.features}): they come from another encoder than it was trained on"
            )
            raise ModelError(msg)
        if not len(h):
            msg = f"the bag has no tile; the bag head {type(self).__name__} needs at least one"
            raise ModelError(msg)
        like = next(self.parameters())
        found: Tensor = self.projection(h.to(like.device, like.dtype))
        return found

    @abstractmethod
    def pool(self, f: Tensor) -> Any:
        """`(N, M)` projected features -> what the classes are read from."""

    @abstractmethod
    def classify(self, pooled: Any) -> Tensor:
        """What `pool` gave -> `(C,)` logits."""

    def forward(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(C,)`."""
        return self.classify(self.pool(self.project(h)))

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published checkpoint's state dict under this head's names; what has no place here keeps its own name.

        Raises
        ------
        ModelError
            Two entries that mean the same.
        """
        return renamed(state, self.published, type(self).__name__)


class PartsHead(BagHead):
    """A head whose logits are a sum over tiles, and which says so."""

    @abstractmethod
    def attention(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(G, N)`, each row a softmax over the tiles: unsigned, and no evidence for a class."""

    @abstractmethod
    def parts(self, h: Tensor) -> BagParts:
        """`(N, D)` -> the sum whose value the logits are."""


def activation_module(name: str) -> nn.Module:
    """A new module of `ACTIVATIONS`; ModelError for another name."""
    if name not in ACTIVATIONS:
        msg = f"activation {name!r} is none of {', '.join(ACTIVATIONS)}"
        raise ModelError(msg)
    return ACTIVATIONS[name]()
