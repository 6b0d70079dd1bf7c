"""OME-Zarr 0.5 metadata, in the specification's own spelling."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from schemas.frozen import Frozen


class Axis(Frozen):
    """One axis; `unit` for space only."""

    name: str
    type: Literal["channel", "space"]
    unit: Literal["micrometer", "millimeter"] | None = None


class Scale(Frozen):
    """Physical size of a px and axis."""

    type: Literal["scale"] = "scale"
    scale: tuple[float, ...]


class Translation(Frozen):
    """Physical place of the centre of px 0, from the centre of level-0 px 0 of the source."""

    type: Literal["translation"] = "translation"
    translation: tuple[float, ...]


class Dataset(Frozen):
    """One resolution."""

    path: str
    coordinateTransformations: tuple[Scale, Translation]


class Multiscale(Frozen):
    """A pyramid, finest dataset first."""

    name: str
    type: str
    """How a coarser px comes from finer ones."""
    axes: tuple[Axis, ...]
    datasets: tuple[Dataset, ...]
    metadata: dict[str, Any] = Field(default_factory=dict)


class Window(Frozen):
    """Display range: `min`-`max` the data's, `start`-`end` the one shown."""

    min: float
    max: float
    start: float
    end: float


class OmeroChannel(Frozen):
    """How a channel is shown."""

    label: str
    color: str = Field(pattern=r"^[0-9A-F]{6}$")
    window: Window
    active: bool


class Omero(Frozen):
    """How an image is shown."""

    channels: tuple[OmeroChannel, ...]


class LabelColor(Frozen):
    """Colour of one label value."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    label_value: int = Field(alias="label-value")
    rgba: tuple[int, int, int, int]


class LabelSource(Frozen):
    """The image that a label belongs to, relative to the label."""

    image: str = "../../"


class ImageLabel(Frozen):
    """Marks an image as a label."""

    colors: tuple[LabelColor, ...]
    source: LabelSource = LabelSource()


class ImageAttributes(Frozen):
    """`attributes.ome` of an image or a label."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    version: Literal["0.5"] = "0.5"
    multiscales: tuple[Multiscale]
    omero: Omero | None = None
    image_label: ImageLabel | None = Field(default=None, alias="image-label")


class LabelsAttributes(Frozen):
    """`attributes.ome` of the group of labels."""

    version: Literal["0.5"] = "0.5"
    labels: tuple[str, ...]


class Registration(Frozen):
    """Where heatmap px 0 lies on the source, free of any reader's reading of `translation`."""

    slide_level0_size: tuple[int, ...]
    """Shape of level 0, array order."""
    downsample: tuple[int, ...]
    origin_px: tuple[int, ...]
    """Level-0 px at which heatmap px 0 begins."""
    convention: Literal["corner"] = "corner"
