"""What planning an image comes to, before any tile is computed."""

from __future__ import annotations

from schemas.frozen import Frozen


class PlanSummary(Frozen):
    """What `plan` prints: cost before any tile is computed."""

    image: str
    image_id: str
    kind: str
    shape_l0: tuple[int, ...]
    spacing: tuple[float, ...]
    spacing_unit: str
    spacing_source: str
    level: int
    tile_l0: tuple[int, ...]
    stride_l0: tuple[int, ...]
    size_error: float
    tissue_fraction: float
    tissue_method: str
    tiles: int
    left_out: int
    units: int
    batches: int
    blocks: int
    heatmap_shape: tuple[int, ...]
    heatmap_downsample: tuple[int, ...]
    channels: tuple[str, ...]
    tiles_bytes: int
    heatmap_bytes: int
    """Uncompressed, all levels."""
    disk_free_bytes: int
    peak_memory_bytes: int
    """Estimated, for one worker."""
    seconds: float | None
    """From the last measured rate of this card on this device; None: unknown."""
    defaults: dict[str, str]
    """Every setting that was not given, and the value used."""
    notes: tuple[str, ...] = ()
