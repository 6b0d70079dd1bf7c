"""Pictures of a report: the whole image under each channel's heat, and the strongest tiles without and with it.

Each is a data URI of its own: a report asks for nothing but itself.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.heatmap import Coverage
from schemas.image import ImageMeta
from workers.export.figure import colours
from workers.export.overlay import compose, heat_rgba, level_for, place
from workers.export.overview import display_window, rgb
from workers.export.planes import VIEWS, View, grey, oriented, physical_size, plane_shape, read_plane
from workers.readers.overview import choose_level, read_overview
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.store.tops import TopTile

MAP_PX = 900
"""Longest side of a picture of a whole slide."""
TILE_PX = 192
"""Longest side of a picture of a tile."""
JPEG_QUALITY = 80
BLANK = 236
"""Grey drawn in place of a source that is not there."""
BAR_PX = 256

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """One picture and what is drawn over it."""

    uri: str
    height: int
    width: int
    size: tuple[float, float]
    """Physical height and width."""
    name: str = ""
    edges: tuple[str, str, str, str] = ("", "", "", "")
    """Orientation letters: left, right, top, bottom."""
    marks: tuple[tuple[str, float, float, float, float], ...] = ()
    """Numbered boxes: label, x, y, width, height in px of the picture."""


def jpeg(picture: Picture) -> str:
    """`(H, W, 3)` as a data URI."""
    return _uri(picture, "JPEG", quality=JPEG_QUALITY, optimize=True)


def png(picture: Picture) -> str:
    """`(H, W, 3)` as a data URI, every pixel as it is."""
    return _uri(picture, "PNG", optimize=True)


def _uri(picture: Picture, format_: str, **options: Any) -> str:
    with io.BytesIO() as buffer:
        Image.fromarray(picture).save(buffer, format_, **options)
        data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{format_.lower()};base64,{data}"


def colour_bar(window: tuple[float, float], span: tuple[float, float], signed: bool) -> str:
    """The colours of the values from one end of `span` to the other, as they look over white, as a data URI."""
    values = np.linspace(*span, BAR_PX, dtype=np.float32)[None]
    rgba = heat_rgba(values, window, signed, colours(signed))
    return png(np.asarray(np.rint(255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])), np.uint8))


class SlidePictures:
    """Pictures of a slide's heatmap; without a reader, heat over an empty ground and no tiles.

    Parameters
    ----------
    meta
        What is known of the slide.
    reader
        The slide; None where it cannot be had.
    """

    def __init__(self, meta: ImageMeta, heatmap: HeatmapStore, reader: Reader | None) -> None:
        self._meta, self._heatmap, self._reader = meta, heatmap, reader
        spacing = heatmap.info.spacing
        step = math.ceil(max(meta.shape_l0) / MAP_PX)
        self.unreadable = 0
        """Places of the slide that could not be read for its picture."""
        if reader is None:
            shape = tuple(-(-n // step) for n in meta.shape_l0)
            self._ground, self._ground_l0 = np.full((*shape, 3), BLANK, np.uint8), (float(step),) * 2
        else:
            pixels, downsample, bad = read_overview(reader, spacing=tuple(s * step for s in spacing))
            self._ground, self._ground_l0 = rgb(pixels), cast("tuple[float, float]", downsample)
            self.unreadable = len(bad)
        self._size = _pair(
            n * d * s for n, d, s in zip(self._ground.shape[:2], self._ground_l0, spacing, strict=True)
        )

    def whole(self, marks: Sequence[tuple[str, Box]] = ()) -> list[Panel]:
        """The slide itself, with numbered boxes."""
        return [self._panel(self._ground, marks, "Slide")]

    def under_heat(self, channel: int, tops: Sequence[TopTile] = ()) -> list[Panel]:
        """The slide under a channel's heat, with its strongest tiles numbered."""
        heatmap, (height, width) = self._heatmap, self._ground.shape[:2]
        grid, row = heatmap.info.grid, heatmap.info.channels[channel]
        level = level_for(len(grid.levels), grid.downsample, self._ground_l0)
        heat_l0 = [d * 2**level for d in grid.downsample]
        at = (heat_l0, (height, width), self._ground_l0)
        values = place(np.asarray(heatmap.image(level)[channel]), *at)
        coverage = place(np.asarray(heatmap.coverage(level, channel)[...]), *at)
        picture = compose(self._ground, values, coverage, display_window(heatmap, channel, level), row.signed,
                          colours(row.signed))  # fmt: skip
        marks = [(str(i), top.box) for i, top in enumerate(tops, 1)]
        return [self._panel(picture, marks, row.label)]

    def _panel(self, picture: Picture, marks: Sequence[tuple[str, Box]], name: str) -> Panel:
        down, right = self._ground_l0
        boxes = tuple(
            (label, box.start[1] / right, box.start[0] / down, box.shape[1] / right, box.shape[0] / down)
            for label, box in marks
        )
        height, width = picture.shape[:2]
        return Panel(jpeg(picture), height, width, self._size, name, marks=boxes)

    def tile(self, channel: int, top: TopTile) -> list[tuple[Panel, Panel]]:
        """A tile without and with a channel's heat.

        Raises
        ------
        SourceError
            The tile cannot be read, or there is no source.
        """
        reader, box = self._source(), top.box
        shape = tuple(max(1, round(n * min(1.0, TILE_PX / max(box.shape)))) for n in box.shape)
        downsample = tuple(a / b for a, b in zip(box.shape, shape, strict=True))
        pixels, _ = reader.read(box, shape, choose_level(reader.meta, downsample))
        size = _pair(n * s for n, s in zip(box.shape, self._heatmap.info.spacing, strict=True))
        return [_pair_of_panels(self._heatmap, channel, rgb(pixels), _centres(box, shape), size)]

    def _source(self) -> Reader:
        if self._reader is None:
            msg = f"{self._meta.stem}: the slide is not there, so that no tile of it can be shown"
            raise SourceError(msg)
        return self._reader


class VolumePictures:
    """Pictures of a volume's heatmap: three planes each, as radiologists look at them."""

    def __init__(self, meta: ImageMeta, heatmap: HeatmapStore, reader: Reader | None) -> None:
        self._meta, self._heatmap, self._reader = meta, heatmap, reader
        self.unreadable = 0

    def whole(self, marks: Sequence[tuple[str, Box]] = ()) -> list[Panel]:
        """Planes through the middle of the volume, without heat."""
        middle = [n / 2 for n in self._meta.shape_l0]
        return [
            _flipped(picture, self._edges(view), self._size(view), self._name(view, middle))
            for view, picture in zip(VIEWS, self._planes(middle)[0], strict=True)
        ]

    def under_heat(self, channel: int, tops: Sequence[TopTile] = ()) -> list[Panel]:
        """Planes through the strongest cell under a channel's heat; through the middle where there is none."""
        at = self._inside(tops[0].centre_l0 if tops else [n / 2 for n in self._meta.shape_l0])
        grounds, values, codes = self._planes(at, channel)
        panels = []
        for view, ground, heat, code in zip(VIEWS, grounds, values, codes, strict=True):
            picture = _under(self._heatmap, channel, ground, heat, code)
            marks = [("1", tops[0].box)] if tops else []
            axes = (view.rows, view.columns)
            boxes = tuple(
                (label, *_shown_box(box, axes, ground.shape[:2], self._meta.shape_l0)) for label, box in marks
            )
            panels.append(_flipped(picture, self._edges(view), self._size(view), self._name(view, at), boxes))
        return panels

    def tile(self, channel: int, top: TopTile) -> list[tuple[Panel, Panel]]:
        """Three planes of a tile through its strongest cell, each without and with heat.

        Raises
        ------
        SourceError
            The tile cannot be read, or there is no source.
        """
        if self._reader is None:
            msg = f"{self._meta.stem}: the volume is not there, so that no tile of it can be shown"
            raise SourceError(msg)
        spacing, box, at = self._heatmap.info.spacing, top.box, self._inside(top.centre_l0)
        per_mm = TILE_PX / max(n * s for n, s in zip(box.shape, spacing, strict=True))
        grounds, heats, codes, sizes = [], [], [], []
        for view in VIEWS:
            start, stop, shape = list(box.start), list(box.stop), [1, 1, 1]
            start[view.normal], stop[view.normal] = int(at[view.normal]), int(at[view.normal]) + 1
            for axis in (view.rows, view.columns):
                shape[axis] = max(1, round((stop[axis] - start[axis]) * spacing[axis] * per_mm))
            plane = Box(frame="l0", start=tuple(start), stop=tuple(stop))
            pixels, _ = self._reader.read(plane, tuple(shape), 0)
            heat, code = heat_at(self._heatmap, channel, _centres(plane, shape))
            flat = (shape[view.rows], shape[view.columns])
            grounds.append(np.asarray(pixels[0], np.float32).reshape(flat))
            heats.append(heat.reshape(flat))
            codes.append(code.reshape(flat))
            sizes.append(_pair(box.shape[a] * spacing[a] for a in (view.rows, view.columns)))
        pictures = grey(grounds, [code == Coverage.EVALUATED for code in codes])
        return [
            (
                _flipped(ground, self._edges(view), size, view.name),
                _flipped(_under(self._heatmap, channel, ground, heat, code), self._edges(view), size,
                         f"{view.name} under heat"),
            )
            for view, ground, heat, code, size in zip(VIEWS, pictures, heats, codes, sizes, strict=True)
        ]  # fmt: skip

    def _planes(
        self, at: Sequence[float], channel: int | None = None
    ) -> tuple[list[Picture], list[NDArray[np.float32]], list[NDArray[np.uint8]]]:
        """Grey planes through a level-0 position, in array order, and the channel's values and coverage there."""
        heats, codes, grounds = [], [], []
        for view in VIEWS:
            shape = plane_shape(self._meta, view)
            centres: list[NDArray[np.float64]] = [np.array([a]) for a in at]
            for axis, n in zip((view.rows, view.columns), shape, strict=True):
                centres[axis] = (np.arange(n, dtype=np.float64) + 0.5) * (self._meta.shape_l0[axis] / n)
            heat, code = heat_at(self._heatmap, channel or 0, centres)
            heats.append(heat.reshape(shape))
            codes.append(code.reshape(shape))
            if self._reader is None:
                grounds.append(np.full(shape, np.nan, np.float32))
            else:
                grounds.append(read_plane(self._reader, view, [int(a) for a in at]))
        if self._reader is None:
            return [np.full((*g.shape, 3), BLANK, np.uint8) for g in grounds], heats, codes
        return grey(grounds, [code == Coverage.EVALUATED for code in codes]), heats, codes

    def _inside(self, at: Sequence[float]) -> list[float]:
        return [min(max(a, 0.0), n - 0.5) for a, n in zip(at, self._meta.shape_l0, strict=True)]

    def _edges(self, view: View) -> tuple[str, str, str, str]:
        return view.edges if self._meta.affine is not None else ("", "", "", "")

    def _size(self, view: View) -> tuple[float, float]:
        extent = physical_size(self._meta)
        return extent[view.rows], extent[view.columns]

    def _name(self, view: View, at: Sequence[float]) -> str:
        return f"{view.name}, slice {int(at[view.normal]) + 1} of {self._meta.shape_l0[view.normal]}"


def pictures_of(
    meta: ImageMeta, heatmap: HeatmapStore, reader: Reader | None
) -> SlidePictures | VolumePictures:
    """The pictures of an image's kind."""
    return (SlidePictures if meta.kind == "slide" else VolumePictures)(meta, heatmap, reader)


def heat_at(
    heatmap: HeatmapStore, channel: int, centres_l0: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Values and coverage of level 0 under level-0 positions, given an axis; NaN and `OUTSIDE` past the image.

    Returns
    -------
    values, coverage
        `(*S)`, one axis a member of `centres_l0`.
    """
    grid = heatmap.grid
    index = [
        np.clip((c / d).astype(np.int64), 0, n - 1)
        for c, d, n in zip(centres_l0, grid.downsample, grid.levels[0], strict=True)
    ]
    part = tuple(slice(int(i.min()), int(i.max()) + 1) for i in index)
    local = np.ix_(*(i - s.start for i, s in zip(index, part, strict=True)))
    values = np.asarray(heatmap.image(0)[(channel, *part)])[local]
    codes = np.asarray(heatmap.coverage(0, channel)[part])[local]
    axes = np.meshgrid(*centres_l0, indexing="ij", sparse=True)
    inside = np.array(True)
    for axis, n in zip(axes, grid.shape_l0, strict=True):
        inside = inside & (axis >= 0) & (axis < n)
    return np.where(inside, values, np.nan), np.where(inside, codes, np.uint8(Coverage.OUTSIDE))


def _centres(box: Box, shape: Sequence[int]) -> list[NDArray[np.float64]]:
    return [
        a + (np.arange(n, dtype=np.float64) + 0.5) * ((b - a) / n)
        for a, b, n in zip(box.start, box.stop, shape, strict=True)
    ]


def _under(
    heatmap: HeatmapStore,
    channel: int,
    ground: Picture,
    values: NDArray[np.float32],
    codes: NDArray[np.uint8],
) -> Picture:
    signed = heatmap.info.channels[channel].signed
    return compose(ground, values, codes, display_window(heatmap, channel, 0), signed, colours(signed))


def _pair_of_panels(
    heatmap: HeatmapStore, channel: int, ground: Picture, centres: list[NDArray[np.float64]],
    size: tuple[float, float],
) -> tuple[Panel, Panel]:  # fmt: skip
    height, width = ground.shape[:2]
    heated = _under(heatmap, channel, ground, *heat_at(heatmap, channel, centres))
    return (
        Panel(jpeg(ground), height, width, size, "as it is"),
        Panel(jpeg(heated), height, width, size, "under heat"),
    )


def _flipped(
    picture: Picture, edges: tuple[str, str, str, str], size: tuple[float, float], name: str,
    marks: tuple[tuple[str, float, float, float, float], ...] = (),
) -> Panel:  # fmt: skip
    shown = np.ascontiguousarray(oriented(picture))
    return Panel(jpeg(shown), shown.shape[0], shown.shape[1], size, name, edges, marks)


def _shown_box(
    box: Box, axes: tuple[int, int], shape: tuple[int, ...], shape_l0: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """x, y, width, height of a box in a plane whose both axes are turned round."""
    (down, right), (rows, columns) = (shape[n] / shape_l0[a] for n, a in enumerate(axes)), axes
    return (
        shape[1] - box.stop[columns] * right,
        shape[0] - box.stop[rows] * down,
        box.shape[columns] * right,
        box.shape[rows] * down,
    )


def _pair(values: Any) -> tuple[float, float]:
    first, second = values
    return float(first), float(second)
