"""What a reader knows of an image before any pixel is asked for."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from schemas.frozen import Frozen

Kind = Literal["slide", "volume"]

MPP_PLAUSIBLE_UM = (0.05, 20.0)
"""Pixel sizes taken from metadata outside this range are refused."""
MPP_EXPLICIT_UM = (0.01, 100.0)
"""Pixel sizes given by the user outside this range are refused."""
WHOLE_IMAGE_LIMIT_PX = 64_000_000
"""An image that can only be read whole is refused above this many pixels."""


class ReadOptions(Frozen):
    """What the user settles about a source that its metadata leaves open or gets wrong."""

    mpp_um: float | None = None
    """Pixel size of a slide in micrometres; overrides metadata."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size of a volume in mm, array order (z, y, x) of the RAS frame; overrides metadata."""
    channel: int | None = None
    """Which index of the channel axis of a 4-D volume."""
    time: int | None = None
    """Which index of the time axis of a 4-D volume."""


class LevelMeta(Frozen):
    """One resolution of a source."""

    shape: tuple[int, ...]
    """Array order."""
    downsample: tuple[float, ...]
    """Level-0 pixels per level pixel and axis; a float (4.002), never to be cast to int."""


class ImageMeta(Frozen):
    """Frame, scale and identity of an opened image; spatial tuples are in array order."""

    uri: str
    stem: str
    """File name without its image suffix, only `[A-Za-z0-9._-]`, at most 64 characters."""
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 of the content (contract: size and samples), never of a path or a time."""
    kind: Kind
    format: str
    """Reader and vendor, such as `openslide:aperio`, `tifffile:ome`, `nifti`, `dicom:CT`."""
    channels: int
    dtype: str
    levels: tuple[LevelMeta, ...]
    spacing: tuple[float, ...] | None
    """Level-0 pixel size: um for slides, mm for volumes; None where the source does not say."""
    spacing_source: str
    """Where `spacing` was read: `openslide.mpp-x`, `tiff resolution tags`, `--mpp`, `nifti header`..."""
    affine: tuple[tuple[float, ...], ...] | None = None
    """Volumes: 4 x 4, from (x, y, z) voxel index of the internal RAS array to mm."""
    source_orientation: str = ""
    """Volumes: axis codes of the file as stored, such as `LAS`."""
    background: float = 255.0
    """Value read outside the image."""
    notes: tuple[str, ...] = ()
    """What a user should know, such as "no objective power"."""
    pixels: bool = True
    """False: features alone stand for the slide; nothing of it can be read."""

    @property
    def shape_l0(self) -> tuple[int, ...]:
        return self.levels[0].shape

    @property
    def ndim(self) -> int:
        return len(self.levels[0].shape)

    @property
    def axes(self) -> tuple[str, ...]:
        return ("z", "y", "x")[-self.ndim :]

    @property
    def spacing_unit(self) -> str:
        return "um" if self.kind == "slide" else "mm"

    def image_id(self, style: Literal["stem", "hash"] = "stem") -> str:
        """Folder name of the outputs: `<stem>-<8 hex>`, or the hex alone (file names can be patients' names)."""
        return self.identity[:8] if style == "hash" else f"{self.stem}-{self.identity[:8]}"


_SUFFIXES = (".nii.gz", ".ome.tiff", ".ome.tif", ".ome.zarr")


def stem_of(name: str) -> str:
    """File name -> stem: image suffix removed, only `[A-Za-z0-9._-]`, at most 64 characters.

    >>> stem_of("CMU 1.ome.tiff")
    'CMU_1'
    """
    lower = name.lower()
    for suffix in _SUFFIXES:
        if lower.endswith(suffix):
            name = name[: -len(suffix)]
            break
    else:
        head, dot, _ = name.rpartition(".")
        name = head if dot and head else name
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64] or "image"


class ImageRequest(Frozen):
    """One image to open: what the listing of a folder, a glob or a CSV comes to."""

    uri: str
    options: ReadOptions = ReadOptions()
    target: str = ""
    """Class to explain in this image; empty: as the run says."""
