"""Where tiles lie: the request (`GridSpec`) and the lattice it makes on one image (`Lattice`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.frozen import Frozen


class TissueSpec(Frozen):
    """How the part of an image worth computing is found."""

    method: Literal["auto", "none"] = "auto"
    """`auto`: saturation + Otsu for slides, threshold for volumes; `none`: every tile."""
    min_fraction: float = Field(default=0.02, ge=0, le=1)
    """A tile is kept when at least this share of it is tissue (and at least one mask pixel)."""
    mask_um: float = Field(default=8.0, gt=0)
    """Pixel size the mask is made at, where a level serves."""
    min_speck_um: float = Field(default=100.0, ge=0)
    """Tissue pieces narrower than this (as an area: squared) are removed."""
    max_hole_um: float = Field(default=150.0, ge=0)
    """Holes narrower than this (as an area: squared) are filled."""


class GridSpec(Frozen):
    """The tiling asked for; hashed into `tiles_id`."""

    tile_px: tuple[int, ...]
    """Model pixels, array order."""
    spacing: tuple[float, ...]
    """Physical size of a model pixel and axis (um or mm), array order."""
    overlap: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of a tile shared with its neighbour."""
    edge: Literal["shift", "pad"] = "shift"
    """The last tile of an axis is moved inward, or reaches past the image."""
    tissue: TissueSpec = TissueSpec()
    region_l0: tuple[tuple[tuple[float, float], ...], ...] = ()
    """Slides: polygons of level-0 `(y, x)` points. Only tiles that meet one are computed; the other tissue
    tiles are left out by choice."""
    mask_sha256: str = ""
    """Digest of the mask given in place of the tissue mask; empty when none was."""
    features_sha256: str = ""
    """Digest of the file that features and positions were imported from; empty when none was."""


class Lattice(Frozen):
    """The tiles of one image, by index; tuples are in array order, sizes whole level-0 px.

    Tile `i` of an axis starts at `min(i * stride_l0, shape_l0 - tile_l0)` for edge `shift`, at
    `i * stride_l0` for `pad`: positions come from the index, never from adding rounded strides.
    """

    shape_l0: tuple[int, ...]
    tile_l0: tuple[int, ...]
    stride_l0: tuple[int, ...]
    count: tuple[int, ...]
    edge: Literal["shift", "pad"]
    level: int
    """Source level that is read."""
    tile_px: tuple[int, ...]
    size_error: float
    """Largest relative error that rounding tile and stride to whole level-0 px makes."""
    upsampling: float
    """How much finer than the source the model's pixel is; above 1 pixels are invented."""
