"""`heatmap.ngff04.ome.zarr`: OME-Zarr 0.4 on Zarr v2, 8 bits, for viewers that read neither Zarr v3 nor floats.

0 is "nobody looked"; 1..255 run linearly over the display window, values beyond it take its ends. How to get raw
units back stands in the attributes and in `OME/METADATA.ome.xml`, from which Bio-Formats takes the pixel size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import zarr
from numpy.typing import NDArray

from workers.export import statement
from workers.export.context import ExportContext
from workers.export.overview import display_window
from workers.stitching.grid import all_blocks, block_box
from workers.store.ngff import axis_names, multiscale, omero

STEPS = 254
"""From the code of the window's start, 1, to that of its end, 255."""
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_COMPRESSOR: Mapping[str, Any] = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
"""All that jzarr, the reader in QuPath, knows beside zlib."""
_OME_UNITS: Mapping[str, str] = {"um": "µm", "mm": "mm"}


def write(context: ExportContext, path: Path) -> None:
    """Write the group `path`, a block of one channel at a time; the row `ngff04`."""
    heatmap, grid = context.heatmap, context.info.grid
    windows = [display_window(heatmap, c, 0) for c in context.channels]
    group = zarr.create_group(path, zarr_format=2, attributes=_attributes(context, windows))
    for level, shape in enumerate(grid.levels):
        codes: Any = group.create_array(
            str(level),
            shape=(len(windows), *shape),
            chunks=(1, *grid.chunk),
            dtype="uint8",
            fill_value=0,
            compressors=_COMPRESSOR,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        image = heatmap.image(level)
        for block in all_blocks(grid, level):
            start, stop = block_box(grid, level, block)
            region = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
            for at, (channel, window) in enumerate(zip(context.channels, windows, strict=True)):
                codes[(at, *region)] = coded(np.asarray(image[(channel, *region)]), window)
    group.create_group("OME")
    (path / "OME" / "METADATA.ome.xml").write_bytes(ome_xml(context))


def coded(values: NDArray[np.float32], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Raw values as codes: 0 for NaN, else 1..255 over the window.

    >>> coded(np.array([np.nan, -9, 0, 1, 2, 9], np.float32), (0.0, 2.0)).tolist()
    [0, 1, 1, 128, 255, 255]
    """
    start, stop = window
    share = np.clip((values.astype(np.float64) - start) / ((stop - start) or 1.0), 0, 1)
    codes: NDArray[np.uint8] = np.where(np.isfinite(values), np.rint(1 + STEPS * share), 0).astype(np.uint8)
    return codes


def decoding(window: tuple[float, float]) -> tuple[float, float]:
    """Scale and offset: a raw value is `offset + scale * (code - 1)`."""
    return (window[1] - window[0]) / STEPS, window[0]


def _attributes(context: ExportContext, windows: Sequence[tuple[float, float]]) -> dict[str, Any]:
    info = context.info
    scales = multiscale(info, context.image_id, "nanmean", range(len(info.grid.levels)))
    said = statement.facts(context)
    for row, window in zip(said["channels"], windows, strict=True):
        scale, offset = decoding(window)
        row["codes"] = {"window": list(window), "scale": scale, "offset": offset}
    said["codes"] = (
        "0: nobody looked. 1 to 255: raw value = offset + scale * (code - 1), values outside the window take its ends"
    )
    shown = omero(info).channels
    return {
        "multiscales": [{"version": "0.4", **scales.model_dump(mode="json", exclude_none=True)}],
        "omero": {
            "version": "0.4",
            "channels": [
                shown[c].model_dump() | {"window": {"min": 0, "max": 255, "start": 1, "end": 255}}
                for c in context.channels
            ],
        },
        "gigacam": said,
    }


def ome_xml(context: ExportContext) -> bytes:
    """OME-XML of level 0: sizes, physical pixel sizes, channels, and the statement as description."""
    info = context.info
    sizes = dict(zip(axis_names(info, False), info.grid.levels[0], strict=True))
    physical = {
        axis: s * d
        for axis, s, d in zip(axis_names(info, False), info.spacing, info.grid.downsample, strict=True)
    }
    ElementTree.register_namespace("", OME)
    ElementTree.register_namespace("xsi", _XSI)
    root = ElementTree.Element(f"{{{OME}}}OME", {f"{{{_XSI}}}schemaLocation": f"{OME} {OME}/ome.xsd"})
    image = ElementTree.SubElement(root, f"{{{OME}}}Image", {"ID": "Image:0", "Name": context.image_id})
    lines = [statement.text(context), "8 bits: 0 is nobody looked; raw value = offset + scale * (code - 1)"]
    for c in context.channels:
        scale, offset = decoding(display_window(context.heatmap, c, 0))
        lines.append(f"{info.channels[c].label}: scale {scale!r}, offset {offset!r}")
    ElementTree.SubElement(image, f"{{{OME}}}Description").text = "\n".join(lines)
    pixels = ElementTree.SubElement(
        image,
        f"{{{OME}}}Pixels",
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYZCT",
            "Type": "uint8",
            "SizeX": str(sizes["x"]),
            "SizeY": str(sizes["y"]),
            "SizeZ": str(sizes.get("z", 1)),
            "SizeC": str(len(context.channels)),
            "SizeT": "1",
            **{f"PhysicalSize{axis.upper()}": repr(float(size)) for axis, size in physical.items()},
            **{f"PhysicalSize{axis.upper()}Unit": _OME_UNITS[info.spacing_unit] for axis in physical},
        },
    )
    colours = omero(info).channels
    for at, c in enumerate(context.channels):
        rgba = int(colours[c].color + "FF", 16)
        ElementTree.SubElement(
            pixels,
            f"{{{OME}}}Channel",
            {
                "ID": f"Channel:0:{at}",
                "Name": info.channels[c].label,
                "SamplesPerPixel": "1",
                "Color": str(rgba - (1 << 32) if rgba >= 1 << 31 else rgba),
            },
        )
    ElementTree.SubElement(pixels, f"{{{OME}}}MetadataOnly")
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
