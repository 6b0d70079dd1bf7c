"""Mean and maximum over the tiles."""

from __future__ import annotations

from torch import Tensor, nn

from workers.cam.bag import BagParts
from workers.models.heads.head import BagHead, PartsHead


class MeanHead(PartsHead):
    """Logits of the mean of the tiles' features, which is the mean of the tiles' logits."""

    def __init__(
        self, features: int, classes: int, *, hidden: int = 0, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        self.classifier = nn.Linear(self.width, classes)

    def pool(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(1, M)`."""
        return f.mean(0, keepdim=True)

    def classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pooled)[0]
        return logits

    def attention(self, h: Tensor) -> Tensor:
        """`(1, N)`: 1 / N everywhere."""
        return self.parts(h).attention

    def parts(self, h: Tensor) -> BagParts:
        f = self.project(h)
        return BagParts(
            attention=f.new_full((1, len(f)), 1 / len(f)),
            values=f,
            weight=self.classifier.weight,
            bias=self.classifier.bias,
            energies=f.new_zeros(1, len(f)),
        )


class MaxHead(BagHead):
    """Of each class the logit of the tile where it is largest."""

    def __init__(
        self, features: int, classes: int, *, hidden: int = 0, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        self.classifier = nn.Linear(self.width, classes)

    def pool(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(N, C)`, a logit a tile."""
        scores: Tensor = self.classifier(f)
        return scores

    def classify(self, pooled: Tensor) -> Tensor:
        return pooled.max(0).values

    def instances(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(N, C)`, the logits of each tile."""
        return self.pool(self.project(h))
