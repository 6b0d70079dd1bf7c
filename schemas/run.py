"""A run: what is asked (hashed), where it runs (never hashed), and what came of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.bag import AttributeTask, BagReport, InsideSpec
from schemas.evidence import Evidence
from schemas.explanation import AskedPrecision, CamSpec, CellGeometry, Reduction, SolvedState
from schemas.export import ExportReport
from schemas.frozen import Frozen, digest
from schemas.geometry import Box
from schemas.grid import GridSpec, Lattice
from schemas.heatmap import ChannelInfo, HeatmapGrid, HeatmapSpec
from schemas.image import ImageMeta, ReadOptions

ALGORITHM_VERSION = 1
"""Raised whenever the same request would give other numbers."""

ImageStatus = Literal["complete", "gaps", "failed", "duplicate", "interrupted", "not started"]


class TilesSpec(Frozen):
    """All that decides a tile map; its digest is `tiles_id`."""

    identity: str
    read: ReadOptions
    spacing: tuple[float, ...]
    """Physical size of a level-0 px that was used, array order (um or mm)."""
    card: dict[str, Any]
    """The resolved model card: weights by digest, no path."""
    cam: CamSpec
    grid: GridSpec
    unit: int = Field(ge=1)
    batch: int = Field(ge=1)
    algorithm: int = ALGORITHM_VERSION

    @property
    def tiles_id(self) -> str:
        # `spacing` is what was used, whoever said it.
        return digest(self.model_dump(mode="json", exclude={"read": {"mpp_um", "spacing_mm"}}))

    def run_id(self, heatmap: HeatmapSpec) -> str:
        """Digest of this and of how the tile maps are stitched."""
        return digest({"tiles_id": self.tiles_id, "heatmap": heatmap.model_dump(mode="json")})


class MapGrid(Frozen):
    """One method's grid of CAM cells a tile, in model px and in level-0 px (array order)."""

    shape: tuple[int, ...]
    cell_px: tuple[float, ...]
    first_centre_px: tuple[float, ...]
    cell_l0: tuple[float, ...]
    first_centre_l0: tuple[float, ...]
    """From the tile's own start; pixel `i` spans `[i, i + 1)`."""
    source: Literal["receptive_field", "grid"]

    @classmethod
    def of(cls, cells: CellGeometry, tile_l0: tuple[int, ...], tile_px: tuple[int, ...]) -> MapGrid:
        """`cells` carried from model px to level-0 px of a tile."""
        scale = tuple(a / b for a, b in zip(tile_l0, tile_px, strict=True))
        return cls(
            shape=cells.shape,
            cell_px=cells.cell_px,
            first_centre_px=cells.first_centre_px,
            cell_l0=tuple(c * s for c, s in zip(cells.cell_px, scale, strict=True)),
            first_centre_l0=tuple(c * s for c, s in zip(cells.first_centre_px, scale, strict=True)),
            source=cells.source,
        )


class TilesInfo(Frozen):
    """`attrs.gigacam` of `tiles.zarr`: all a worker needs to compute a unit, and a stitcher to place it."""

    tiles_id: str
    spec: TilesSpec
    image: ImageMeta
    lattice: Lattice
    grids: dict[str, MapGrid]
    reductions: dict[str, Reduction] = Field(default_factory=dict)
    """By method, of those that sum over all tiles first."""
    classes: tuple[str, ...]
    """Name of each score, in the network's order."""
    embedding: int = 0
    """Numbers a tile of an encoder without a bag head, whose features are all that is asked."""
    planned: int
    """Tiles to compute; the rows after them were left out by choice."""
    tiles: int
    units: int
    versions: dict[str, str]

    @property
    def features(self) -> int:
        """Numbers a tile that a bag head reads, or is trained on; 0 where there is no bag."""
        bag = self.spec.card.get("bag") or {}
        return int(bag.get("features", self.embedding))

    def bag_grid(self) -> MapGrid:
        """The one cell of a bag method: the tile itself."""
        cells = CellGeometry.whole(self.lattice.tile_px)
        return MapGrid.of(cells, self.lattice.tile_l0, self.lattice.tile_px)


class HeatmapInfo(Frozen):
    """`attrs.gigacam` of `heatmap.ome.zarr`."""

    run_id: str
    tiles_id: str
    spec: HeatmapSpec
    grid: HeatmapGrid
    channels: tuple[ChannelInfo, ...]
    spacing: tuple[float, ...]
    """Physical size of a level-0 px, array order."""
    spacing_unit: Literal["um", "mm"]
    partial: bool = False
    """Some tiles of the bag are not explained inside, by choice: the channels of inside maps have a coverage of their own."""
    complete: bool = False
    value_range: tuple[tuple[float, float], ...] = ()
    """Smallest and largest raw value of each channel, once complete."""
    display: tuple[tuple[float, float], ...] = ()
    """Display window of each channel: a view, the stored values stay raw."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that say why a px has a value or none."""
        return ("coverage", "inside") if self.partial else ("coverage",)

    def label_of(self, channel: ChannelInfo) -> str:
        """Which of them speaks for a channel: `coverage` but for maps inside some of the tiles."""
        return "inside" if self.partial and not channel.bag_method else "coverage"


class UnitTask(Frozen):
    """Compute one unit of tiles."""

    unit: int

    @property
    def key(self) -> str:
        return f"unit {self.unit}"


class GroupTask(Frozen):
    """Sum over one group of units, for the methods that need the whole image."""

    group: int

    @property
    def key(self) -> str:
        return f"group {self.group}"


class SolveTask(Frozen):
    """Solve the sums of one method."""

    method: str

    @property
    def key(self) -> str:
        return f"state of {self.method}"


class BlockTask(Frozen):
    """Write one block (shard) of one level."""

    level: int
    block: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"level {self.level} block {','.join(map(str, self.block))}"


class RankTask(Frozen):
    """Rank the channels of the explained layer over the tiles that score each target highest."""

    tiles: int = Field(ge=1)

    @property
    def key(self) -> str:
        return "channels"


class TileFailure(Frozen):
    """A tile that has no map, where it lies, and why."""

    tile: int
    box: Box
    reason: str


class Report(Frozen):
    """What a worker says of one task: small numbers, never arrays."""

    stage: str
    key: str
    task: UnitTask | BlockTask | GroupTask | SolveTask | AttributeTask | RankTask | None = None
    done: int = 0
    """Tiles computed."""
    failed: int = 0
    """Tiles that have no map."""
    seconds: float = 0.0
    seconds_by: dict[str, float] = Field(default_factory=dict)
    """Seconds of parts of the work: decode, forward, write..."""
    bytes_written: int = 0
    error: str = ""
    """Why the pool gave the task up; empty when it was done."""
    attempts: int = 1
    worker: str = ""
    device: str = ""
    """Kind of device a unit was computed on."""
    notes: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    """Of a task that ranks channels."""


class PoolSettings(Frozen):
    """Where work runs; never hashed."""

    kind: Literal["auto", "serial", "ray"] = "auto"
    address: str = ""
    """Ray address; empty starts a local Ray."""
    workers: int | None = Field(default=None, ge=1)
    """Actors; None: one a GPU where Ray offers any, else one a CPU."""
    threads: int | None = Field(default=None, ge=1)
    """torch threads of a worker; None: 1 for a CPU actor, all cores in serial."""
    images_in_flight: int = Field(default=2, ge=1)


class Counts(Frozen):
    """Tiles of an image by state."""

    planned: int
    done: int
    failed: int
    left_out: int


class Prediction(Frozen):
    """Tile scores over an image, by class or what else there is a score of: the mean, and the highest with its tile."""

    target: str
    quantity: str = "logit"
    """What the score is, in words."""
    mean: float
    highest: float
    highest_box: Box
    symbols: dict[str, int] = Field(default_factory=dict)
    """Of a sequence, for positions that were explained: how many tiles emitted each symbol there, most first."""


class ImageReport(Frozen):
    """`report.json` of one image."""

    image: str
    """The URI as asked."""
    image_id: str = ""
    status: ImageStatus
    error: str = ""
    output: str = ""
    counts: Counts | None = None
    failures: tuple[TileFailure, ...] = ()
    failed_tasks: tuple[str, ...] = ()
    """Units and blocks the pool gave up, each with the reason."""
    prediction: tuple[Prediction, ...] = ()
    channels: tuple[ChannelInfo, ...] = ()
    value_range: tuple[tuple[float, float], ...] = ()
    display: tuple[tuple[float, float], ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall seconds a stage, and summed worker seconds a part."""
    flags: dict[str, int] = Field(default_factory=dict)
    """How many tile maps carry a flag, such as `gradcam empty`."""
    states: tuple[SolvedState, ...] = ()
    """Of the methods that were solved once for the whole image."""
    bag: BagReport | None = None
    evidence: tuple[Evidence, ...] = ()
    """Channels that speak for and against each target, where they were asked for."""
    exports: tuple[ExportReport, ...] = ()
    """Made with the image (`--export`)."""
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)


class RunReport(Frozen):
    """`run.json`: the batch."""

    images: tuple[ImageReport, ...]
    pool: str
    seconds: float
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 when every image is complete (a duplicate is no failure) and exported as asked, else 1; 130 when interrupted."""
        if any(r.status == "interrupted" for r in self.images):
            return 130
        failed = any(r.status not in ("complete", "duplicate") for r in self.images)
        return int(failed or any(e.error for r in self.images for e in r.exports))


class ExplainRequest(Frozen):
    """The main job, as asked on the command line or by a schedule."""

    images: tuple[str, ...] = Field(min_length=1)
    model: str
    out: str
    methods: tuple[str, ...] = ("gradcam",)
    bag_methods: tuple[str, ...] = ()
    """Of a model with a bag head; empty: `contribution`, or `attention` where the head has no parts."""
    inside: InsideSpec = InsideSpec()
    features: str = ""
    """`.h5` file of the image's features, or a folder with one named like each image; empty: they are computed."""
    targets: tuple[str, ...] = ()
    layer: str = ""
    cell_centres: Literal["receptive_field", "grid"] = "receptive_field"
    precision: AskedPrecision = "fp32"
    read: ReadOptions = ReadOptions()
    tile: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Tile size in model px, array order; one number: the same on every axis. None: the card's."""
    overlap: float = Field(default=0.0, ge=0, lt=1)
    edge: Literal["shift", "pad"] = "shift"
    tissue: Literal["auto", "none"] = "auto"
    region: str = ""
    """GeoJSON file of level-0 polygons: only tiles that meet one are computed."""
    mask: str = ""
    """Image file whose non-zero pixels replace the tissue mask; it spans the whole slide."""
    batch: int = Field(default=32, ge=1)
    unit: int | None = Field(default=None, ge=1)
    """Tiles a task; None: 64 to 256 for slides, by their number of tiles, 8 for volumes."""
    words: int = Field(default=0, ge=0)
    """Tiles a target, those that score it highest, over which the layer's channels are ranked; 0: they are not."""
    heatmap: HeatmapSpec = HeatmapSpec()
    allow_upsampling: bool = False
    fresh: bool = False
    retry_failed: bool = False
    strict: bool = False
    image_id: Literal["stem", "hash"] = "stem"
    exports: tuple[str, ...] = ()
    """Formats each image is exported to once its heatmap is complete."""
