"""The model card (`model.toml`): a network, what it was trained on, and what it may be used for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from schemas.explanation import CellGeometry, Precision, Reduction, Unit
from schemas.frozen import Frozen
from schemas.image import Kind

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_EAGER = ("monai", "factory", "lvm_med", "timm", "transformers")


class NetworkSpec(Frozen):
    """`[network]`: which architecture, and the weights to load into it."""

    adapter: Literal["monai", "factory", "export", "lvm_med", "timm", "transformers"]
    """`monai`: a class of `monai.networks.nets` by name; `factory`: an installed `package.module:function`;
    `export`: a `torch.export` program; `lvm_med`: `resnet50` or `vit_b`; `timm`, `transformers`: a model of these packages by
    name or type, where they are installed."""
    name: str = ""
    """Class name, factory path, model; unused for `export`."""
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str = ""
    """Path relative to the card: safetensors, or a `torch.save` state dict that loads with `weights_only`."""
    sha256: Sha256 | Literal[""] = ""
    leave_out: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Beginnings of entries of the weights that are no part of this network, such as another task's head: `head.`."""
    config: str = ""
    """`transformers`: the `config.json` of the model, path relative to the card."""
    config_sha256: Sha256 | Literal[""] = ""
    embedding: Literal["mean", "class", ""] = ""
    """Instead of the network's own output its embedding: the mean over cells or patches, or the class token, of what
    `embedding_layer` gives."""
    embedding_layer: str = ""
    """Empty: the network's own output."""
    trunk: str = ""
    tail: str = ""
    """TorchScript pair (`export` only): two files, since hooks on scripted submodules do not fire."""
    trunk_sha256: Sha256 | Literal[""] = ""
    tail_sha256: Sha256 | Literal[""] = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.adapter != "export" and not (self.name or self.config):
            msg = f"[network] name is missing; adapter {self.adapter!r} needs one"
            raise ValueError(msg)
        if self.adapter == "export" and not (self.weights or (self.trunk and self.tail)):
            msg = "[network] adapter 'export' needs weights = '<program>.pt2', or trunk and tail"
            raise ValueError(msg)
        for path, sha in (
            ("weights", "sha256"), ("trunk", "trunk_sha256"), ("tail", "tail_sha256"), ("config", "config_sha256")
        ):  # fmt: skip
            if getattr(self, path) and not getattr(self, sha):
                msg = f"[network] {path} is given without {sha}; a digest is needed to know what was run"
                raise ValueError(msg)
        for key, adapters in (("config", ("transformers",)), ("embedding", _EAGER), ("leave_out", _EAGER)):
            if getattr(self, key) and self.adapter not in adapters:
                msg = f"[network] {key} says nothing of adapter {self.adapter!r}; remove it"
                raise ValueError(msg)
        if self.embedding_layer and not self.embedding:
            msg = "[network] embedding_layer needs embedding = 'mean' or 'class'"
            raise ValueError(msg)
        return self


class InputSpec(Frozen):
    """`[input]`: the pixels the network expects, in its own scale."""

    kind: Kind
    channels: int = Field(ge=1)
    tile: tuple[int, ...]
    """Model pixels, array order (y, x) or (z, y, x)."""
    mpp: float | None = Field(default=None, gt=0)
    """Slides: micrometres a model pixel."""
    spacing_mm: tuple[float, float, float] | None = None
    """Volumes: mm a model voxel, array order (z, y, x)."""
    scale: tuple[float, float] = (0.0, 255.0)
    """Source values mapped to 0 and 1, before mean and std."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    window: tuple[float, float] | None = None
    """Intensity window: values are clipped to it and mapped to 0..1; replaces `scale`."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        ndim = 2 if self.kind == "slide" else 3
        if len(self.tile) != ndim or any(t < 1 for t in self.tile):
            msg = f"[input] tile = {list(self.tile)} does not fit kind {self.kind!r}: {ndim} sizes of at least 1"
            raise ValueError(msg)
        if self.kind == "slide" and (self.mpp is None or self.spacing_mm is not None):
            msg = "[input] kind 'slide' needs mpp (um a pixel) and no spacing_mm"
            raise ValueError(msg)
        if self.kind == "volume" and (self.spacing_mm is None or self.mpp is not None):
            msg = "[input] kind 'volume' needs spacing_mm = [z, y, x] and no mpp"
            raise ValueError(msg)
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            msg = f"[input] spacing_mm = {list(self.spacing_mm)}: every value must be above 0"
            raise ValueError(msg)
        lo, hi = self.window or self.scale
        if not lo < hi:
            msg = f"[input] window or scale = [{lo}, {hi}]: the first must be below the second"
            raise ValueError(msg)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) not in (1, self.channels):
                msg = f"[input] {name} has {len(values)} values; expected 1 or {self.channels} (channels)"
                raise ValueError(msg)
        if any(s <= 0 for s in self.std):
            msg = f"[input] std = {list(self.std)}: every value must be above 0"
            raise ValueError(msg)
        return self

    @property
    def spacing(self) -> tuple[float, ...]:
        """Physical size of a model pixel and axis, array order: um for slides, mm for volumes."""
        if self.spacing_mm is not None:
            return self.spacing_mm
        assert self.mpp is not None
        return (self.mpp, self.mpp)


BETWEEN = "~"
"""Parts the names of a contrast."""
MINUS = "minus"
"""Before it, one name: its score with the sign turned."""
RESERVED = ("predicted", "all", MINUS)
"""Targets by these names are no classes."""

_OTHER_UNIT: dict[Unit, Unit] = {"logit": "score", "logit/cell": "score/cell"}
_OF_KIND = {
    "region": ("mask",),
    "references": ("embedding",),
    "references_sha256": ("embedding",),
    "similarity": ("embedding",),
    "symbol_score": ("sequence",),
    "vocabulary": ("sequence",),
    "padding": ("sequence",),
    "prefix": ("sequence",),
}
"""Keys that say something of some kinds only."""


class OutputSpec(Frozen):
    """`[output]`: what the numbers that come out mean."""

    kind: Literal["logits", "logit", "regression", "embedding", "mask", "sequence"] = "logits"
    """`(B, C)` logits; `(B, 1)` one logit for two classes; `(B, C)` values; `(B, D)`; `(B, C, *S)` logits a voxel;
    `(B, T, V)` logits of V symbols at T positions."""
    classes: tuple[str, ...] = ()
    """Names of the scores: classes, outputs, mask channels, reference vectors, positions."""
    default_target: str = ""
    region: Literal["predicted", "positive", "tile"] = "predicted"
    """Masks: a class's score is the sum of its logits over the voxels it wins, over those where its logit is above 0
    (channels that are no alternatives), or over the whole tile."""
    references: str = ""
    """Embeddings: safetensors file, path relative to the card, with a vector for each of `classes`. None: the
    coordinates themselves are the scores."""
    references_sha256: Sha256 | Literal[""] = ""
    similarity: Literal["cosine", "dot"] = "cosine"
    symbol_score: Literal["logit", "log_prob"] = "logit"
    """Sequences: of the symbol emitted at each position."""
    vocabulary: tuple[str, ...] = ()
    """Sequences: names of the symbols, in order."""
    padding: int | None = Field(default=None, ge=0)
    """Sequences: index of a symbol that means nothing."""
    prefix: Literal["fixed", "free", ""] = ""
    """Sequences: whether earlier symbols are constants to later ones (teacher forcing, hard samples) or gradients pass
    through them (soft samples); recorded, and part of what a map means."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            msg = f"[output] classes = {list(self.classes)}: names must differ"
            raise ValueError(msg)
        reserved = (*RESERVED, "sum") if self.kind == "sequence" else RESERVED
        for name in self.classes:
            if not name or name in reserved or BETWEEN in name:
                msg = f"[output] classes: {name!r} means something else as a target; avoid {', '.join(reserved)} and {BETWEEN!r}"
                raise ValueError(msg)
        if self.kind == "logits" and not self.classes:
            msg = "[output] kind 'logits' needs classes = [...], one name a logit, in order"
            raise ValueError(msg)
        if self.kind == "logit" and len(self.classes) not in (0, 1, 2):
            msg = "[output] kind 'logit' takes at most two classes: [negative, positive] or [positive]"
            raise ValueError(msg)
        self._check_kind()
        known = (*self.classes, *RESERVED, "sum")
        if self.classes and not set(self.default_target.split(BETWEEN)) <= {"", *known}:
            msg = f"[output] default_target = {self.default_target!r} is none of {[*self.classes, 'predicted', 'all']}"
            raise ValueError(msg)
        return self

    def _check_kind(self) -> None:
        for key, kinds in _OF_KIND.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                msg = f"[output] {key} says nothing of kind {self.kind!r}, only of {kinds[0]!r}; remove it"
                raise ValueError(msg)
        if bool(self.references) and not self.references_sha256:
            msg = "[output] references is given without references_sha256; a digest is needed to know what was run"
            raise ValueError(msg)
        if self.references_sha256 and not self.classes:
            msg = "[output] references needs classes = [...], the names of its vectors to explain, in order"
            raise ValueError(msg)
        if self.kind == "sequence" and not self.prefix:
            msg = (
                "[output] kind 'sequence' needs prefix = 'fixed' (earlier symbols are constants: teacher forcing, hard "
                "samples) or 'free' (gradients pass through them)"
            )
            raise ValueError(msg)
        if self.padding is not None and self.vocabulary and self.padding >= len(self.vocabulary):
            msg = (
                f"[output] padding = {self.padding} is no symbol of the {len(self.vocabulary)} in vocabulary"
            )
            raise ValueError(msg)

    @property
    def each(self) -> str:
        """What the scores are, as a plural."""
        if self.kind == "embedding":
            return "references" if self.references_sha256 else "coordinates"
        return {"regression": "outputs", "sequence": "positions"}.get(self.kind, "classes")

    @property
    def quantity(self) -> str:
        """What one score is."""
        match self.kind:
            case "logits" | "logit":
                return "logit"
            case "regression":
                return "value"
            case "embedding" if self.references_sha256:
                return {
                    "cosine": "cosine similarity to the reference",
                    "dot": "dot product with the reference",
                }[self.similarity]
            case "embedding":
                return "coordinate of the embedding"
            case "mask":
                where = {
                    "predicted": "the pixels where the class is predicted",
                    "positive": "the pixels where it is above 0",
                    "tile": "the tile",
                }
                return f"sum of the logit over {where[self.region]}"
        score = "logit" if self.symbol_score == "logit" else "log probability"
        return f"{score} of the symbol emitted at the position"

    def unit(self, unit: Unit) -> Unit:
        """A method's unit where the scores of this output are what is explained."""
        logits = self.kind in ("logits", "logit", "mask") or (
            self.kind == "sequence" and self.symbol_score == "logit"
        )
        return unit if logits else _OTHER_UNIT.get(unit, unit)


class ChannelName(Frozen):
    """What a channel of the explained layer was found to answer to, and who says so."""

    name: str = Field(min_length=1)
    score: float
    """How well, by the measure that `provenance` states."""
    provenance: str = Field(min_length=1)
    """Measure, data and author of the finding, such as `IoU, network dissection, Broden`."""


class CamLayer(Frozen):
    """`[cam]`: the layer that is explained unless another is asked for."""

    layer: str
    layout: Literal["channels_first", "channels_last", "tokens", ""] = ""
    """How its output lies: `(B, K, *grid)`, `(B, *grid, K)` (Swin) or `(B, tokens, K)` (ViT). Empty: tokens where it has one
    axis for a tile of several, else channels first."""
    prefix_tokens: int | None = Field(default=None, ge=0)
    """Class and register tokens before the patches. None: inferred where only one number is possible."""
    token_grid: tuple[int, ...] = ()
    """Patches an axis, array order. Empty: inferred where only one grid of square patches is possible."""
    channels: dict[Annotated[int, Field(ge=0)], ChannelName] = Field(default_factory=dict)
    """`[cam.channels]`: names of channels of `layer`, by number; no part of what identifies the model."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if any(n < 1 for n in self.token_grid):
            msg = f"[cam] token_grid = {list(self.token_grid)}: every size must be at least 1"
            raise ValueError(msg)
        if self.layout.startswith("channels") and (self.prefix_tokens is not None or self.token_grid):
            msg = f"[cam] layout {self.layout!r} has neither prefix_tokens nor token_grid; remove them, or write layout = 'tokens'"
            raise ValueError(msg)
        return self


class BagSpec(Frozen):
    """`[bag]`: the head over a bag of tiles (MIL models only)."""

    head: str
    """`mean`, `max`, `abmil`, `abmil_gated`, `clam_sb`, `clam_mb`, `dsmil`, `transmil`, `additive` or `linear`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Of the head, beyond its features and classes."""
    weights: str
    """Path relative to the card: safetensors, or a `torch.save` state dict that loads with `weights_only`."""
    sha256: Sha256
    features: int = Field(ge=1)
    """Numbers a tile that the head reads."""
    order: Literal["any", "row_col"] = "any"
    """Whether the head must be given its tiles sorted by (row, column)."""
    encoder_digest: Sha256 | Literal[""] = ""
    """Of the encoder that the head was trained on."""


class ModelCard(Frozen):
    """A whole `model.toml`; unknown keys are an error, paths are relative to the card."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    version: str
    licence: str
    intended_use: str
    network: NetworkSpec
    input: InputSpec
    output: OutputSpec
    cam: CamLayer
    bag: BagSpec | None = None

    @property
    def tile_output(self) -> OutputSpec:
        """What the network says of one tile: under a bag head, its embedding; `output` is then the head's."""
        return self.output if self.bag is None else OutputSpec(kind="embedding")


class ModelFacts(Frozen):
    """What a loaded model turned out to be, as far as planning needs it."""

    card: dict[str, Any]
    """The resolved card: weights by digest, no path."""
    classes: tuple[str, ...]
    """Name of each score, in the network's order."""
    targets: tuple[str, ...]
    """Resolved: no index, no `all`."""
    target_index: tuple[int | None, ...]
    """Class of each target; None for `predicted`."""
    layer: str
    tile: tuple[int, ...]
    cells: CellGeometry
    """Of the explained layer."""
    grids: dict[str, CellGeometry]
    """Of each method asked for."""
    reductions: dict[str, Reduction] = Field(default_factory=dict)
    """Of each method asked for that sums over the image first."""
    bag_methods: tuple[str, ...] = ()
    """Asked for, of a model with a bag head."""
    embedding: int = 0
    """Numbers a tile of an encoder whose features are all that is asked."""
    precision: Precision = "fp32"
    """What is computed, `fast` resolved."""
    weights_bytes: int
    notes: tuple[str, ...] = ()
    """What a user should know, such as the licence of published weights."""
