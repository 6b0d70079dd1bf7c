"""What is trained on bags, and how; and what came of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from schemas.frozen import Frozen
from schemas.model import Sha256

LossName = Literal["cross_entropy", "any_accuracy", "any_f1", "any_gmean", "any_balanced_accuracy"]
Share = Field(default=0.0, ge=0, lt=1)


class MhimSpec(Frozen):
    """Masked hard instance mining: which tiles a student does not see, and what it learns from its teacher.

    Tang et al., "Multiple Instance Learning Framework with Masked Hard Instance Mining for Whole Slide Image
    Classification", ICCV 2023 (v1), and its extension, IJCV 2025 (v2).
    """

    edition: Literal["v1", "v2"]
    """v1 scores tiles by the teacher's attention; v2 by its class-aware probability of each tile, and recycles tiles."""
    random: float = Share
    """Share of the tiles masked at random."""
    low: float = Share
    """Share masked that score lowest."""
    high: float = Share
    """Share masked among those that score highest."""
    high_random: float = Field(default=1.0, gt=0, le=1)
    """`high` is drawn at random from this many times fewer of the highest: of the `high / high_random` share."""
    decay_high: bool = False
    """`high` falls to 0 by half a cosine over the epochs."""
    alpha: float = Field(default=0.1, ge=0)
    """Weight of agreement with the teacher's bag feature."""
    momentum: float = Field(default=0.9999, ge=0, le=1)
    """Share of itself that the teacher keeps in each step."""
    momentum_to_one: bool = False
    """`momentum` rises to 1 by half a cosine over the epochs."""
    tokens: int = Field(default=0, ge=0)
    """Into how many tokens the recycled tiles are compressed; 0: none are."""
    keep: float = Field(default=1.0, gt=0, le=1)
    """Share of the unmasked tiles that is not recycled."""
    query_momentum: float = Field(default=0.9999, ge=0, le=1)
    """Of the queries that ask for those tokens."""


MHIM: dict[str, MhimSpec] = {
    "v1": MhimSpec(edition="v1", random=0.5, high=0.01, high_random=0.5, alpha=0.1),
    "v1-tcga": MhimSpec(edition="v1", random=0.7, low=0.2, high=0.02, high_random=0.5, alpha=0.5),
    "v1-transmil": MhimSpec(edition="v1", low=0.8, high=0.03, high_random=0.5, alpha=0.1),
    "v1-tcga-transmil": MhimSpec(edition="v1", random=0.6, low=0.2, high=0.02, high_random=0.5, alpha=0.5),
    "v2": MhimSpec(edition="v2", high=0.03, alpha=0.5, momentum=0.9997, tokens=5, keep=0.9),
}
"""Published settings: of v1 for CAMELYON16 and TCGA, with ABMIL and TransMIL; of v2 the middle of its ranges."""


class FitSpec(Frozen):
    """How a head is fitted: Adam, cosine learning rate, early stopping by the loss of held-out slides."""

    loss: LossName = "cross_entropy"
    epochs: int = Field(default=200, ge=1)
    patience: int = Field(default=20, ge=1)
    """Epochs without a lower validation loss before it stops."""
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=1e-5, ge=0)
    bags: int | None = Field(default=None, ge=1)
    """Bags a step. None: 1; with an `any_*` loss, which needs every class in each step, 16."""
    class_weights: Literal["balanced", "none"] = "balanced"
    seed: int = Field(default=0, ge=0)


class HeadSpec(Frozen):
    """Which head, and what it is built with."""

    head: str = "abmil"
    args: dict[str, Any] = Field(default_factory=dict)
    mhim: MhimSpec | None = None


class TrainRequest(Frozen):
    """A training from a CSV of slides and labels."""

    csv: str
    model: str
    """Card of the encoder that the features come from."""
    out: str
    features: str = ""
    """Folder with the features of each slide, where the CSV has no column of that name."""
    classes: tuple[str, ...] = ()
    """Order of the labels; empty: as they sort."""
    head: HeadSpec = HeadSpec()
    fit: FitSpec = FitSpec()
    folds: int = Field(default=5, ge=1)
    """Of the cross-validation; 1: one part of the patients is held out."""


class Figure(Frozen):
    """A metric with its 95 % interval from resampled patients; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


class TrainReport(Frozen):
    """`train.json`: what was trained on what, and how well it does on patients it has not seen."""

    request: TrainRequest
    identity: Sha256
    """Of the request, the slides, their labels and features, without their places: equal ones train equal heads."""
    classes: tuple[str, ...]
    slides: int
    patients: int
    tiles: int
    features: int
    tested: tuple[str, ...]
    """Slides that the figures are of: each by a head that saw no slide of its patient."""
    figures: dict[str, Figure]
    epochs: dict[str, int]
    """Of each fit: the epoch whose weights were kept, from 1."""
    card: str
    """Path of the model card."""
    sha256: Sha256
    """Of the head's weights."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know: slides with tiles that have no features."""
