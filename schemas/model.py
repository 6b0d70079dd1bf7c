"""The model card (`model.toml`): a network, what it was trained on, and what it may be used for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from schemas.explanation import CellGeometry, Reduction
from schemas.frozen import Frozen
from schemas.image import Kind

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class NetworkSpec(Frozen):
    """`[network]`: which architecture, and the weights to load into it."""

    adapter: Literal["monai", "factory", "export"]
    """`monai`: a class of `monai.networks.nets` by name; `factory`: an installed `package.module:function`;
    `export`: a `torch.export` program."""
    name: str = ""
    """Class name, factory path; unused for `export`."""
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str = ""
    """Path relative to the card: safetensors, or a `torch.save` state dict that loads with `weights_only`."""
    sha256: Sha256 | Literal[""] = ""
    trunk: str = ""
    tail: str = ""
    """TorchScript pair (`export` only): two files, since hooks on scripted submodules do not fire."""
    trunk_sha256: Sha256 | Literal[""] = ""
    tail_sha256: Sha256 | Literal[""] = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.adapter != "export" and not self.name:
            msg = f"[network] name is missing; adapter {self.adapter!r} needs one"
            raise ValueError(msg)
        if self.adapter == "export" and not (self.weights or (self.trunk and self.tail)):
            msg = "[network] adapter 'export' needs weights = '<program>.pt2', or trunk and tail"
            raise ValueError(msg)
        for path, sha in (("weights", "sha256"), ("trunk", "trunk_sha256"), ("tail", "tail_sha256")):
            if getattr(self, path) and not getattr(self, sha):
                msg = f"[network] {path} is given without {sha}; a digest is needed to know what was run"
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


class OutputSpec(Frozen):
    """`[output]`: what the numbers that come out mean."""

    kind: Literal["logits", "logit", "regression", "embedding", "mask"] = "logits"
    classes: tuple[str, ...] = ()
    default_target: str = ""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            msg = f"[output] classes = {list(self.classes)}: names must differ"
            raise ValueError(msg)
        if self.kind == "logits" and not self.classes:
            msg = "[output] kind 'logits' needs classes = [...], one name a logit, in order"
            raise ValueError(msg)
        if self.kind == "logit" and len(self.classes) not in (0, 1, 2):
            msg = "[output] kind 'logit' takes at most two classes: [negative, positive] or [positive]"
            raise ValueError(msg)
        if self.default_target and self.default_target not in (*self.classes, "predicted", "all"):
            msg = f"[output] default_target = {self.default_target!r} is none of {[*self.classes, 'predicted', 'all']}"
            raise ValueError(msg)
        return self


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
    weights: str
    sha256: Sha256
    features: int = Field(ge=1)
    order: Literal["any", "row_col"] = "any"
    encoder_digest: Sha256 | Literal[""] = ""


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
    weights_bytes: int
