"""What a heatmap can be exported to: one row a format, one function that runs a row.

To add a format, write a module `workers/export/<module>.py` with ::

    def write(context: ExportContext, path: Path) -> None

that writes `path` (a file, or a folder it makes), and add a row to `EXPORTS`. `path` lies in a draft folder and is
moved to `OUT/<image_id>/export/<file>` when `write` returns: nothing half-written is ever seen there, and whatever
else is left in the draft folder is dropped. The module is imported only when its format is asked for, so it may
import optional libraries at its top; name the extra in the row. What a writer has to say to the user (what was cut,
what was approximated) goes to `logging.getLogger("gigacam").warning`; what it has to say to the reader of the file
is in `workers.export.statement`: intended use, run, method, target, units, and that a heatmap is partial. A writer
takes `context.channels`, never all channels, and raises SpecError where a request cannot be met.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from schemas.errors import SpecError, StoreError
from schemas.image import Kind
from workers.export.context import ExportContext

SLIDE: tuple[Kind, ...] = ("slide",)
VOLUME: tuple[Kind, ...] = ("volume",)
BOTH: tuple[Kind, ...] = ("slide", "volume")

Writer = Callable[[ExportContext, Path], None]


@dataclass(frozen=True)
class Export:
    """One format."""

    name: str
    title: str
    file: str
    """Name of the file or folder in `export/`."""
    kinds: tuple[Kind, ...]
    module: str
    """Of `workers.export`; has `write`."""
    needs: tuple[str, ...] = ()
    """Exports this one refers to; they are written first, with the same options."""
    extra: str = ""
    """Optional extra of the package that has its libraries."""


EXPORTS: dict[str, Export] = {
    row.name: row
    for row in (
        Export("csv", "Table of tiles: places, scores, map statistics, flags", "tiles.csv", BOTH, "tile_table"),
        Export("ome-tiff", "OME-TIFF pyramid of the raw values: QuPath, Fiji, OMERO", "heatmap.ome.tif", SLIDE, "ome_tiff"),
        Export("rgba", "Coloured TIFF pyramids with opacity, one a channel", "rgba", SLIDE, "rgba"),
        Export("geojson", "Regions as polygons, tiles as detections: QuPath", "regions.geojson", SLIDE, "geojson"),
        Export("qupath", "Groovy script that overlays the OME-TIFF in QuPath", "qupath_overlay.groovy", SLIDE, "qupath",
               needs=("ome-tiff",)),
        Export("large_image", "Annotation for the Digital Slide Archive", "large_image.json", SLIDE, "large_image"),
        Export("png", "Report figure at print resolution", "figure.png", BOTH, "report_figure"),
        Export("dicom", "DICOM Parametric Maps matching a DICOM source, and an overview", "dicom", BOTH, "parametric_map",
               extra="dicom"),
        Export("nifti", "NIfTI, float32 on the grid of the source file", "heatmap.nii.gz", VOLUME, "nifti"),
        Export("ngff04", "OME-Zarr 0.4 of 8 bits, for viewers without Zarr v3", "heatmap.ngff04.ome.zarr", BOTH, "ngff04"),
        Export("neuroglancer", "State of Neuroglancer; needs --url", "neuroglancer.json", BOTH, "neuroglancer"),
        Export("vitessce", "View configuration of Vitessce; needs --url", "vitessce.json", BOTH, "vitessce"),
    )
}  # fmt: skip


def resolve(names: Sequence[str]) -> tuple[Export, ...]:
    """Rows by name, those they need first, each once.

    Raises
    ------
    SpecError
        A name is unknown, or there is none.
    """
    known = ", ".join(sorted(EXPORTS))
    if not names:
        msg = f"no export format is named; the formats are {known}"
        raise SpecError(msg)
    rows: dict[str, Export] = {}
    for name in names:
        if name not in EXPORTS:
            msg = f"export {name!r}: unknown; the formats are {known}"
            raise SpecError(msg)
        for needed in (*EXPORTS[name].needs, name):
            rows.setdefault(needed, EXPORTS[needed])
    return tuple(rows.values())


def destination(context: ExportContext, row: Export) -> Path:
    """Where an export lies once it is whole."""
    return context.folder / "export" / row.file


def run_export(row: Export, context: ExportContext) -> list[Path]:
    """Write one export of one image, in place of an earlier one.

    Returns
    -------
    list of Path
        The file, or the files of the folder.

    Raises
    ------
    SpecError
        The format is not for such an image, its extra is not installed, or an option does not fit.
    StoreError
        The heatmap is not complete and `partial` was not asked for, or a store that is needed is gone.
    SourceError
        The source is needed and is gone.
    """
    if context.kind not in row.kinds:
        msg = f"{context.image_id}: a {context.kind} has no {row.name} export; it is for {row.kinds[0]}s"
        raise SpecError(msg)
    if not (context.info.complete or context.options.partial):
        msg = (
            f"{context.heatmap.path}: is not complete yet; run gigacam explain again to complete it, or export it "
            "as it is with --partial"
        )
        raise StoreError(msg)
    write = _writer(row)
    path = destination(context, row)
    draft = path.with_name(f".{row.file}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        made = draft / row.file
        write(context, made)
        if path.is_dir():  # a folder is not replaced in one step: the old one goes first
            os.rename(path, draft / ".old")
        os.replace(made, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _writer(row: Export) -> Writer:
    try:
        return cast(Writer, import_module(f"workers.export.{row.module}").write)
    except ModuleNotFoundError as error:
        if not row.extra or (error.name or "").startswith("workers."):
            raise
        msg = f"export {row.name!r}: {error.name} is not installed; install it with pip install 'gigacam[{row.extra}]'"
        raise SpecError(msg) from error
