"""Attention-based multiple instance learning, plain and gated (Ilse, Tomczak and Welling, ICML 2018)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from workers.cam.bag import BagParts
from workers.models.heads.head import PartsHead, activation_module
from workers.models.names import Names


class Attend(nn.Module):
    """`(N, M)` -> energies `(G, N)`: `outer(act(inner f))`, with a gate `outer(act(inner f) * sigmoid(gate f))`.

    Parameters
    ----------
    width
        M.
    size
        Of the layer between.
    branches
        G, attentions side by side.
    """

    def __init__(
        self,
        width: int,
        size: int,
        branches: int = 1,
        *,
        gated: bool = False,
        activation: str = "tanh",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(width, size, bias=bias)
        self.activation = activation_module(activation)
        self.gate = nn.Linear(width, size, bias=bias) if gated else None
        self.sigmoid = nn.Sigmoid()
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(size, branches, bias=bias)

    def forward(self, f: Tensor) -> Tensor:
        a: Tensor = self.dropout(self.activation(self.inner(f)))
        if self.gate is not None:
            a = a * self.dropout(self.sigmoid(self.gate(f)))
        energies: Tensor = self.outer(a)
        return energies.T


class AttentionHead(PartsHead):
    """Logits of the attention-weighted mean of the projected features.

    Parameters
    ----------
    features, classes, hidden, activation, dropout
        See `BagHead`.
    size
        Width of the attention network.
    gated
        With the sigmoid gate.
    attention_activation
        `tanh` as published; `relu` in the MHIM-MIL baselines.
    attention_bias
        Whether the attention network has biases (as in the code published with it; the paper's formula has none).
    attention_dropout
        While training.
    per_class
        An attention a class (G = C): class c is read from its own weighted mean.
    """

    published: ClassVar[Names] = (
        (
            r"(?:feature|feature_extractor_part2|patch_to_emb)\.0\.(weight|bias)",
            r"projection.0.\1",
        ),
        (r"(?:online_encoder\.attention\.)?attention(?:_a|_V)?\.0\.(weight|bias)", r"attend.inner.\1"),
        (r"(?:online_encoder\.attention\.)?attention_[bU]\.0\.(weight|bias)", r"attend.gate.\1"),
        (
            r"(?:online_encoder\.attention\.)?(?:attention\.[23]|attention_c|attention_w|attention_weights)\.(weight|bias)",
            r"attend.outer.\1",
        ),
        (r"(?:classifier\.0|classifier|predictor)\.(weight|bias)", r"classifier.\1"),
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
        gated: bool = False,
        attention_activation: str = "tanh",
        attention_bias: bool = True,
        attention_dropout: float = 0.0,
        per_class: bool = False,
    ) -> None:
        super().__init__(features, classes, hidden, activation, dropout)
        self.attend = Attend(
            self.width,
            size,
            classes if per_class else 1,
            gated=gated,
            activation=attention_activation,
            bias=attention_bias,
            dropout=attention_dropout,
        )
        self.softmax = nn.Softmax(-1)
        self.classifier = nn.Linear(self.width, classes)

    def pool(self, f: Tensor) -> Tensor:
        """`(N, M)` -> `(G, M)`."""
        pooled: Tensor = self.softmax(self.attend(f)) @ f
        return pooled

    def classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pooled)
        return logits[0] if len(pooled) == 1 else logits.diagonal()

    def attention(self, h: Tensor) -> Tensor:
        found: Tensor = self.softmax(self.attend(self.project(h)))
        return found

    def parts(self, h: Tensor) -> BagParts:
        f = self.project(h)
        energies = self.attend(f)
        return BagParts(
            attention=self.softmax(energies),
            values=f,
            weight=self.classifier.weight,
            bias=self.classifier.bias,
            energies=energies,
        )
