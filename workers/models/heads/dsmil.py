"""Dual-stream multiple instance learning (Li, Li and Eliceiri, CVPR 2021), as the MHIM-MIL baselines run it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from workers.models.heads.head import BagHead
from workers.models.names import Names


class Streams(NamedTuple):
    """What the two streams make of a bag."""

    critical: Tensor
    """`(C,)` largest instance score of each class."""
    bag: Tensor
    """`(C, M)` attention-weighted values, attention by likeness to the critical instance."""


class DsmilHead(BagHead):
    """Half the bag stream's logits, half the largest instance score.

    Where two tiles share the largest score of a class, the first is the critical one.

    Parameters
    ----------
    features, classes, hidden, activation, dropout
        See `BagHead`.
    size
        Width of the queries.
    nonlinear
        Queries by two layers, `Linear, ReLU, Linear, tanh`; else by one.
    passing_values
        Values by `dropout, Linear, ReLU`; else the projected features themselves.
    value_dropout
        While training.
    """

    published: ClassVar[Names] = (
        (r"(?:i_classifier\.embed|patch_to_emb)\.0\.(weight|bias)", r"projection.0.\1"),
        (r"(?:online_encoder\.)?i_classifier(?:\.fc)?(?:\.0)?\.(weight|bias)", r"instance.\1"),
        (r"(?:online_encoder\.)?b_classifier\.q\.([02])\.(weight|bias)", r"query.\1.\2"),
        (r"(?:online_encoder\.)?b_classifier\.q\.(weight|bias)", r"query.0.\1"),
        (r"(?:online_encoder\.)?b_classifier\.v\.1\.(weight|bias)", r"value.1.\1"),
        (r"(?:online_encoder\.)?b_classifier\.fcc\.(weight|bias)", r"mix.\1"),
    )

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 512,
        activation: str = "relu",
        dropout: float = 0.0,
        size: int = 128,
        nonlinear: bool = True,
        passing_values: bool = True,
        value_dropout: float = 0.0,
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        self.instance = nn.Linear(self.width, classes)
        query: list[nn.Module] = [nn.Linear(self.width, size)]
        if nonlinear:
            query += [nn.ReLU(), nn.Linear(size, size), nn.Tanh()]
        self.query = nn.Sequential(*query)
        self.value: nn.Module = nn.Identity()
        if passing_values:
            self.value = nn.Sequential(
                nn.Dropout(value_dropout), nn.Linear(self.width, self.width), nn.ReLU()
            )
        self.softmax = nn.Softmax(-1)
        self.mix = nn.Conv1d(classes, classes, kernel_size=self.width)

    def pool(self, f: Tensor) -> Streams:
        scores: Tensor = self.instance(f)
        critical = scores.max(0)
        bag: Tensor = self._attend(f, critical.indices) @ self.value(f)
        return Streams(critical.values, bag)

    def classify(self, pooled: Streams) -> Tensor:
        bag: Tensor = self.mix(pooled.bag[None])[0, :, 0]
        return 0.5 * bag + 0.5 * pooled.critical

    def instances(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(N, C)`, the instance stream's score of each tile."""
        scores: Tensor = self.instance(self.project(h))
        return scores

    def attention(self, h: Tensor) -> Tensor:
        """`(N, D)` -> `(C, N)`, of the bag stream; its row c also reaches other logits, through `mix`."""
        f = self.project(h)
        return self._attend(f, self.instance(f).argmax(0))

    def _attend(self, f: Tensor, critical: Tensor) -> Tensor:
        q: Tensor = self.query(f)
        attention: Tensor = self.softmax(q[critical] @ q.T / q.shape[1] ** 0.5)
        return attention
