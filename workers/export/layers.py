"""The source and its heatmap as napari's layers: lazy pyramids, registered in um or mm, coloured as everywhere here.

napari places the centre of px 0 at `translate`; so does OME-Zarr, hence the centre of level-0 px 0 is the origin.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError, SpecError
from schemas.geometry import Box
from schemas.heatmap import Coverage
from schemas.image import ImageMeta
from workers.export import statement
from workers.export.context import ExportContext
from workers.export.figure import colours
from workers.export.overlay import heat_rgba
from workers.export.overview import display_window, rgb
from workers.readers.overview import choose_level, value_window
from workers.readers.reader import Reader

LayerData = tuple[Any, dict[str, Any], str]
"""Data, arguments of the layer, its type: napari's own seam."""

CHUNK_PX = 1024
SMALLEST_PX = 1024
"""The pyramid of a slide ends when its longest side is not longer."""
_COVERAGE_RGBA = {
    None: (0.0, 0.0, 0.0, 0.0),
    int(Coverage.FAILED): (0.86, 0.15, 0.5, 0.6),
    int(Coverage.BACKGROUND): (0.5, 0.5, 0.5, 0.25),
    int(Coverage.LEFT_OUT): (0.39, 0.56, 1.0, 0.35),
}


def heat_layers(context: ExportContext) -> list[LayerData]:
    """A layer a channel, the first one shown, and why there is no value, hidden: a layer a label, as channels may differ in it.

    Values stay raw and NaN stays NaN, so that napari shows "nan" where nobody looked.
    """
    info, heatmap = context.info, context.heatmap
    where = _placement(context.image, info.spacing, info.grid.downsample)
    levels = range(len(info.grid.levels))
    layers: list[LayerData] = []
    for i, channel in enumerate(context.channels):
        row = info.channels[channel]
        window = display_window(heatmap, channel, 0)
        layers.append(
            (
                pyramid([heatmap.as_dask(level, channel) for level in levels]),
                {
                    "name": row.label,
                    "colormap": colour_map(row.signed),
                    "contrast_limits": window,
                    "blending": "translucent_no_depth",
                    "interpolation2d": "nearest",
                    "visible": i == 0,
                    "metadata": {"gigacam": statement.facts(context, [channel])},
                    **where,
                },
                "image",
            )
        )
    for label in info.labels:
        codes = [heatmap.label(label, level) for level in levels]
        layers.append(
            (
                pyramid([da.from_array(array, chunks=array.shards) for array in codes]),
                {
                    "name": f"{label}: why there is no value",
                    "colormap": _COVERAGE_RGBA,
                    "visible": False,
                    **where,
                },
                "labels",
            )
        )
    return layers


def source_layer(reader: Reader, name: str) -> LayerData:
    """The source as one layer: a slide as 8-bit RGB pyramid, a volume whole.

    Nothing is read before it is shown, but for the window of a slide that is not of 8 bits.

    Parameters
    ----------
    reader
        Kept open for as long as the layer lives, one read at a time.

    Raises
    ------
    SourceError
        It has no pixels, or its window cannot be read.
    """
    meta = reader.meta
    if not meta.pixels:
        msg = f"{meta.uri}: features alone have no pixels to show; explain the slide, with this file by --features, to see it"
        raise SourceError(msg)
    window = value_window(reader) if meta.kind == "slide" else None
    lock = threading.Lock()
    factors = list(_factors(meta))
    data = [_lazy(reader, factor, lock, window) for factor in factors]
    arguments: dict[str, Any] = {"name": name, "blending": "translucent_no_depth"}
    if meta.kind == "slide":
        arguments |= {"rgb": True}
    else:
        arguments |= {"colormap": "gray"}
    spacing = meta.spacing or (1.0,) * meta.ndim
    arguments |= _placement(meta, spacing, (1,) * meta.ndim)
    return pyramid(data), arguments, "image"


def pyramid(levels: list[da.Array]) -> Any:
    """What napari takes for a pyramid: a list of at least two, else the one array."""
    return levels if len(levels) > 1 else levels[0]


def colour_map(signed: bool) -> dict[str, Any]:
    """Arguments of napari's Colormap: this project's table with its opacity; NaN is transparent."""
    at = np.linspace(0, 1, 256, dtype=np.float32)[None]
    rgba: NDArray[np.float32] = heat_rgba(at, (0.0, 1.0), signed, colours(signed))[0]
    return {
        "colors": rgba,
        "name": "gigacam signed" if signed else "gigacam",
        "nan_color": (0.0, 0.0, 0.0, 0.0),
    }


def show(layers: Sequence[LayerData], title: str) -> None:
    """Open napari with these layers, and wait until it is closed.

    Raises
    ------
    SpecError
        napari is not installed.
    """
    try:
        import napari
    except ModuleNotFoundError as error:
        msg = f"gigacam napari: {error.name} is not installed; install it with pip install 'gigacam[napari]'"
        raise SpecError(msg) from error
    viewer = napari.Viewer(title=title)
    for layer in layers:
        viewer.add_layer(napari.layers.Layer.create(*layer))
    viewer.scale_bar.visible = True
    viewer.text_overlay.text = title
    viewer.text_overlay.visible = True
    napari.run()


def _placement(meta: ImageMeta, spacing: Sequence[float], downsample: Sequence[int]) -> dict[str, Any]:
    """Where px lie: `scale` and `translate`, of volumes with an affine its rotation and origin, too."""
    shift = [(d - 1) / 2 for d in downsample]
    unit = {"um": "um", "mm": "mm"}[meta.spacing_unit]
    placed: dict[str, Any] = {"units": (unit,) * len(spacing), "axis_labels": meta.axes}
    if meta.affine is None:
        placed["scale"] = tuple(s * d for s, d in zip(spacing, downsample, strict=True))
        placed["translate"] = tuple(s * t for s, t in zip(spacing, shift, strict=True))
        return placed
    turn = np.eye(4)[[2, 1, 0, 3]]  # from (x, y, z) to (z, y, x), both of index and of world
    own = np.diag([*downsample, 1.0]).astype(np.float64)
    own[:3, 3] = shift
    placed["affine"] = turn @ np.asarray(meta.affine) @ turn @ own
    return placed


def _factors(meta: ImageMeta) -> Iterator[int]:
    """Level-0 px a px of each level shown: whole powers of two, whatever levels the file has."""
    factor = 1
    yield factor
    while meta.kind == "slide" and max(meta.shape_l0) / factor > SMALLEST_PX:
        factor *= 2
        yield factor


def _lazy(reader: Reader, factor: int, lock: threading.Lock, window: tuple[float, float] | None) -> da.Array:
    """A level of the source as a dask array: `(h, w, 3)` of a slide, `(z, y, x)` of a volume."""
    meta = reader.meta
    shape = tuple(math.ceil(n / factor) for n in meta.shape_l0)
    level = choose_level(meta, (float(factor),) * meta.ndim)
    tail = (3,) if meta.kind == "slide" else ()
    dtype = np.uint8 if meta.kind == "slide" or meta.dtype == "uint8" else np.float32

    def read(block_info: Any = None) -> NDArray[Any]:
        location = block_info[None]["array-location"][: meta.ndim]
        start, stop = [a for a, _ in location], [b for _, b in location]
        box = Box(frame="l0", start=tuple(a * factor for a in start), stop=tuple(b * factor for b in stop))
        with lock:
            pixels, _ = reader.read(box, tuple(b - a for a, b in zip(start, stop, strict=True)), level)
        if meta.kind == "volume":
            return np.asarray(pixels[0], dtype)
        return rgb(pixels, window)

    chunks = tuple(
        tuple(min(CHUNK_PX, n - a) for a in range(0, n, CHUNK_PX)) if meta.kind == "slide" else (n,)
        for n in shape
    )
    lazy: da.Array = da.map_blocks(
        read,
        chunks=(*chunks, *((t,) for t in tail)),
        dtype=dtype,
        meta=np.empty((0,) * (meta.ndim + len(tail)), dtype),
    )
    return lazy
