"""The OME-Zarr metadata of a heatmap, its peak image and its coverage label."""

from __future__ import annotations

from schemas.heatmap import Coverage
from schemas.ngff import (
    Axis,
    Dataset,
    ImageAttributes,
    ImageLabel,
    LabelColor,
    Multiscale,
    Omero,
    OmeroChannel,
    Registration,
    Scale,
    Translation,
    Window,
)
from schemas.run import HeatmapInfo

_UNITS = {"um": "micrometer", "mm": "millimeter"}
_COLORS = ("FDE725", "FF6F61", "35B7FF", "7AD151", "E06CFF", "FFA62B", "40E0D0", "FF8AC4")
"""Ramp ends told apart on H&E and on grey; a viewer with colour maps ignores them."""
_COVERAGE_RGBA: dict[Coverage, tuple[int, int, int, int]] = {
    Coverage.EVALUATED: (0, 0, 0, 0),
    Coverage.FAILED: (220, 38, 127, 160),
    Coverage.BACKGROUND: (128, 128, 128, 40),
    Coverage.LEFT_OUT: (100, 143, 255, 80),
    Coverage.OUTSIDE: (0, 0, 0, 0),
}


def axis_names(info: HeatmapInfo, channels: bool) -> tuple[str, ...]:
    """Dimension names, array order."""
    return (("c",) if channels else ()) + ("z", "y", "x")[-len(info.spacing) :]


def multiscale(info: HeatmapInfo, name: str, kind: str, levels: range, channels: bool = True) -> Multiscale:
    """The pyramid of some heatmap levels; datasets bear the number of their heatmap level.

    A px of level `n` spans `downsample * 2**n` level-0 px from the corner of the source, hence its centre
    lies `(downsample * 2**n - 1) / 2` px from the centre of level-0 px 0, where NGFF's origin is.
    """
    unit = _UNITS[info.spacing_unit]
    axes = [Axis(name="c", type="channel")] if channels else []
    axes += [Axis.model_validate({"name": n, "type": "space", "unit": unit}) for n in axis_names(info, False)]
    datasets = []
    for level in levels:
        factors = [d * 2**level for d in info.grid.downsample]
        scale = [s * f for s, f in zip(info.spacing, factors, strict=True)]
        shift = [s * (f - 1) / 2 for s, f in zip(info.spacing, factors, strict=True)]
        datasets.append(
            Dataset(
                path=str(level),
                coordinateTransformations=(
                    Scale(scale=(*([1.0] if channels else []), *scale)),
                    Translation(translation=(*([0.0] if channels else []), *shift)),
                ),
            )
        )
    return Multiscale(
        name=name,
        type=kind,
        axes=tuple(axes),
        datasets=tuple(datasets),
        metadata={"method": "gigacam", "factor": 2, "sizes": "ceil", "fill": "NaN: nobody looked"},
    )


def omero(info: HeatmapInfo) -> Omero:
    """Channels with their windows: 0 to 1 until the value range is known."""
    ranges = info.value_range or ((0.0, 1.0),) * len(info.channels)
    shown = info.display or ranges
    return Omero(
        channels=tuple(
            OmeroChannel(
                label=channel.label,
                color=_COLORS[i % len(_COLORS)],
                window=Window(min=ranges[i][0], max=ranges[i][1], start=shown[i][0], end=shown[i][1]),
                active=i == 0,
            )
            for i, channel in enumerate(info.channels)
        )
    )


def image_attributes(info: HeatmapInfo, name: str) -> ImageAttributes:
    """`ome` of the heatmap."""
    scales = multiscale(info, name, "nanmean", range(len(info.grid.levels)))
    return ImageAttributes(multiscales=(scales,), omero=omero(info))


def peak_attributes(info: HeatmapInfo, name: str) -> ImageAttributes:
    """`ome` of `peak/`: from level 1 upward."""
    scales = multiscale(info, f"{name} peak", "absmax", range(1, len(info.grid.levels)))
    return ImageAttributes(multiscales=(scales,), omero=omero(info))


def coverage_attributes(info: HeatmapInfo, label: str) -> ImageAttributes:
    """`ome` of `labels/coverage` and its like."""
    order = "evaluated, failed, left out, background, pending, outside: the first of any child"
    scales = multiscale(info, label, order, range(len(info.grid.levels)), channels=False)
    colors = tuple(LabelColor(label_value=int(code), rgba=rgba) for code, rgba in _COVERAGE_RGBA.items())
    return ImageAttributes(multiscales=(scales,), image_label=ImageLabel(colors=colors))


def registration(info: HeatmapInfo) -> Registration:
    """The heatmap's place on the source, in px."""
    return Registration(
        slide_level0_size=info.grid.shape_l0,
        downsample=info.grid.downsample,
        origin_px=(0,) * len(info.grid.shape_l0),
    )
