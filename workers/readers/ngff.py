"""Zarr arrays and OME-Zarr images (0.4 and 0.5) as sources, read chunk by chunk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.image import WHOLE_IMAGE_LIMIT_PX, Kind, LevelMeta, ReadOptions, stem_of
from workers.readers.arrays import ArrayReader, array_meta, array_reader, channels_first, lowest
from workers.readers.identity import folder_identity

TO_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr array or group."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def open_zarr(folder: Path, options: ReadOptions) -> ArrayReader:
    """Open a Zarr array, or an OME-Zarr image with all its levels.

    Raises
    ------
    SourceError
        Not an image, axes that cannot be placed, or no pixel size.
    """
    try:
        node = zarr.open(folder, mode="r")
    except Exception as error:  # zarr raises many types on damaged metadata
        msg = f"{folder}: its Zarr metadata cannot be read ({error}); write it again"
        raise SourceError(msg) from error
    if isinstance(node, zarr.Array):
        return _plain(folder, node, options)
    try:
        attributes = _image_attributes(node)
        if attributes is None and "0" in node and isinstance(node["0"], zarr.Group):
            node = node["0"]  # bioformats2raw's layout: a group of images
            attributes = _image_attributes(node)
        if attributes is None:
            msg = f"{folder}: a Zarr group without OME-Zarr 'multiscales'; expected an OME-Zarr 0.4 or 0.5 image"
            raise SourceError(msg)
        return _multiscale(folder, node, attributes, options)
    except SourceError:
        raise
    except Exception as error:  # whatever a missing or misplaced value leads to
        msg = f"{folder}: its OME-Zarr metadata are incomplete ({type(error).__name__}: {error}); check them with a validator"
        raise SourceError(msg) from error


def _sliced(uri: str, level: int, array: Any, index: tuple[Any, ...]) -> NDArray[Any]:
    try:
        return np.asarray(array[index])
    except Exception as error:  # codecs raise many types on a damaged chunk
        where = ", ".join(
            f"{i.start}:{i.stop}"
            if isinstance(i, slice) and i.stop
            else "all"
            if isinstance(i, slice)
            else str(i)
            for i in index
        )
        msg = f"{uri}: level {level} cannot be read at [{where}] ({error}); a chunk is damaged or missing its codec"
        raise SourceError(msg) from error


def _image_attributes(group: zarr.Group) -> dict[str, Any] | None:
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, dict) or not ome.get("multiscales"):
        return None
    first: dict[str, Any] = ome["multiscales"][0]
    return first


def _plain(folder: Path, array: zarr.Array[Any], options: ReadOptions) -> ArrayReader:
    if math.prod(array.shape) <= WHOLE_IMAGE_LIMIT_PX:
        whole = _sliced(str(folder), 0, array, (slice(None),) * array.ndim)
        return array_reader(whole, options, uri=str(folder), identity=folder_identity(folder), format_="zarr")
    # A view with the array's shape and type tells the axes without reading it.
    stand_in = np.broadcast_to(np.zeros((), dtype=array.dtype), array.shape)
    kind, viewed = channels_first(str(folder), stand_in)
    last = kind == "slide" and len(array.shape) == 3 and viewed.shape[1:] == array.shape[:2]
    first = not last and len(array.shape) == viewed.ndim

    def take(level: int, window: tuple[slice, ...]) -> NDArray[Any]:
        index = (*window, slice(None)) if last else (slice(None), *window) if first else window
        pixels = _sliced(str(folder), level, array, index)
        if last:
            return np.moveaxis(pixels, -1, 0)
        return pixels if first else pixels[None]

    meta = array_meta(
        uri=str(folder),
        stem=stem_of(folder.name),
        identity=folder_identity(folder),
        format_="zarr",
        kind=kind,
        channels=viewed.shape[0],
        dtype=array.dtype,
        levels=(LevelMeta(shape=viewed.shape[1:], downsample=(1.0,) * (viewed.ndim - 1)),),
        options=options,
    )
    return ArrayReader(meta, take)


def _multiscale(
    folder: Path, group: zarr.Group, multiscale: dict[str, Any], options: ReadOptions
) -> ArrayReader:
    uri = str(folder)
    axes = [a if isinstance(a, dict) else {"name": a} for a in multiscale["axes"]]
    names = [str(a["name"]) for a in axes]
    arrays: list[Any] = [group[d["path"]] for d in multiscale["datasets"]]
    shape = dict(zip(names, arrays[0].shape, strict=True))
    if not {"y", "x"} <= set(names) or not set(names) <= set("tczyx"):
        msg = f"{uri}: axes {names}; expected y and x, and at most t, c, z besides"
        raise SourceError(msg)
    kind: Kind = "volume" if shape.get("z", 1) > 1 else "slide"
    spatial = ("z", "y", "x") if kind == "volume" else ("y", "x")
    time = _pick(uri, "time", shape.get("t", 1), options.time)
    channel = options.channel
    if channel is not None and not 0 <= channel < shape.get("c", 1):
        msg = f"{uri}: --channel {channel} is out of range; the image has {shape.get('c', 1)}"
        raise SourceError(msg)

    overall = _scale(multiscale, len(names))
    scales = [
        dict(zip(names, (a * b for a, b in zip(_scale(d, len(names)), overall, strict=True)), strict=True))
        for d in multiscale["datasets"]
    ]
    levels = []
    for array, scale in zip(arrays, scales, strict=True):
        sizes = dict(zip(names, array.shape, strict=True))
        downsample = tuple(scale[a] / scales[0][a] for a in spatial)
        level = LevelMeta(shape=tuple(sizes[a] for a in spatial), downsample=downsample)
        for a, d in zip(spatial, downsample, strict=True):
            if abs(sizes[a] * d - shape[a]) > 2 * max(d, 1.0):
                msg = (
                    f"{uri}: level of shape {level.shape} says a downsample of {downsample}, which does not fit "
                    f"{tuple(shape[b] for b in spatial)} at level 0; correct the scale in coordinateTransformations"
                )
                raise SourceError(msg)
        levels.append(level)

    units = {str(a["name"]): TO_UM.get(str(a.get("unit", "")).lower()) for a in axes}
    found = None
    if all(units[a] is not None for a in spatial):
        to = 1.0 if kind == "slide" else 1e-3
        found = ("OME-Zarr scale", tuple(scales[0][a] * (units[a] or 0.0) * to for a in spatial))

    def take(level: int, window: tuple[slice, ...]) -> NDArray[Any]:
        where = dict(zip(spatial, window, strict=True))
        index: list[Any] = []
        for name in names:
            if name == "t":
                index.append(time)
            elif name == "c":
                index.append(slice(None) if channel is None else slice(channel, channel + 1))
            else:
                index.append(where.get(name, 0))
        pixels = _sliced(uri, level, arrays[level], tuple(index))
        kept = [n for n in names if n == "c" or n in spatial]
        wanted = (["c"] if "c" in kept else []) + list(spatial)
        pixels = np.transpose(pixels, [kept.index(n) for n in wanted])
        return pixels if "c" in kept else pixels[None]

    coarsest = levels[-1].shape
    background = None
    if kind == "volume" and math.prod(coarsest) <= WHOLE_IMAGE_LIMIT_PX:
        background = lowest(take(len(levels) - 1, tuple(slice(0, n) for n in coarsest)))
    meta = array_meta(
        uri=uri,
        stem=stem_of(folder.name),
        identity=folder_identity(folder),
        format_="ome-zarr",
        kind=kind,
        channels=1 if channel is not None else shape.get("c", 1),
        dtype=arrays[0].dtype,
        levels=levels,
        options=options,
        found=found,
        background=background,
        notes=("OME-Zarr states no orientation; axes taken as RAS",) if kind == "volume" else (),
    )
    return ArrayReader(meta, take)


def _scale(holder: dict[str, Any], ndim: int) -> list[float]:
    for transform in holder.get("coordinateTransformations", ()):
        if transform["type"] == "scale":
            return [float(v) for v in transform["scale"]]
    return [1.0] * ndim


def _pick(uri: str, name: str, size: int, given: int | None) -> int:
    if size > 1 and given is None:
        msg = f"{uri}: has {size} {name} points; choose one with --{name} 0..{size - 1}"
        raise SourceError(msg)
    if given is not None and not 0 <= given < size:
        msg = f"{uri}: --{name} {given} is out of range; the image has {size}"
        raise SourceError(msg)
    return given or 0
