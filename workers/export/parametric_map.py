"""`dicom/`: each channel as a Parametric Map on the grid of its DICOM source, and an overview as Secondary Capture.

Of a slide the frames are those of one instance of the source's own pyramid: same matrix, same tiles in the same
order, same pixel spacing, orientation, origin and frame of reference, since viewers misplace maps of any other
resolution. Of a CT, MR or PET series there is one frame a slice. Values are the heatmap's own float32; NaN stands
where nobody looked, and Float Pixel Padding Value says so (PS3.3 C.7.6.24 allows it). The files belong to the
study of the source and name its patient, as DICOM requires.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from nibabel import orientations
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.uid import ExplicitVRLittleEndian

from schemas.errors import SourceError, SpecError
from schemas.explanation import Unit
from schemas.image import ImageMeta
from workers.export import statement
from workers.export.context import ExportContext
from workers.export.nifti import on_source_grid, turn_from_ras
from workers.export.overlay import level_for, place
from workers.export.overview import display_window, overview_figure
from workers.readers.dicom import headers_of, placed
from workers.readers.reader import Reader

MOST_PX = 32_000_000
"""Pixels of a slide's map: floats cannot be compressed in DICOM, and are held some five times over while they are written."""
SERIES_NUMBER = 9000
"""Added to the source's, so that maps stand below it in a list."""
SCHEME = "99GIGACAM"
_UCUM: dict[Unit, tuple[str, str]] = {
    "logit": ("{logit}", "logit"),
    "logit/cell": ("{logit}/{cell}", "logit per cell"),
    "score": ("{score}", "unit of the score"),
    "score/cell": ("{score}/{cell}", "unit of the score, per cell"),
    "1": ("1", "no units"),
}
"""UCUM annotations: all of these are dimensionless."""
_TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
"""What every file of a study has, though perhaps empty; some sources leave it out."""


@dataclass(frozen=True)
class _Grid:
    """The frames of the source that a map matches."""

    headers: list[Dataset]
    """Of the one instance, or of the slices in their order."""
    frames: Callable[[int], NDArray[np.float32]]
    """Channel to `(frames, rows, columns)`."""
    words: str


def write(context: ExportContext, path: Path) -> None:
    """Write the folder `path`: `<index>-<channel>.dcm` a channel, and `overview.dcm`; the row `dicom`.

    Raises
    ------
    SpecError
        The source is no DICOM, or no level of it is small enough.
    SourceError
        The source is gone or changed, or lies in a way that no map can match.
    """
    if "dicom" not in context.image.format:
        remedy = (
            "convert the slide to DICOM, for example with wsidicomizer, and explain that, or export it to ome-tiff"
            if context.kind == "slide"
            else "export it to nifti"
        )
        msg = (
            f"{context.image_id}: its source is {context.image.format}, and a DICOM map has to match frames of a DICOM "
            f"source; {remedy}"
        )
        raise SpecError(msg)
    # Sources break rules of their own (a UID of 66 characters, a name of one part): they are matched, not mended.
    with disable_value_validation(), warnings.catch_warnings(), context.source() as reader:
        warnings.filterwarnings(
            "ignore", message="The string .* is unlikely to represent the intended person"
        )
        grid = (_slide_grid if context.kind == "slide" else _series_grid)(context, reader.meta)
        series = str(hd.UID())
        path.mkdir()
        for number, channel in enumerate(context.channels, start=1):
            found = _parametric_map(context, grid, channel, series, number)
            found.save_as(path / f"{channel:02d}-{_file_name(context.info.channels[channel].label)}.dcm")
        _overview(context, grid, reader).save_as(path / "overview.dcm")


def _slide_grid(context: ExportContext, meta: ImageMeta) -> _Grid:
    levels = sorted(
        (h for h in headers_of(Path(meta.uri)) if "VOLUME" in h.ImageType),
        key=lambda h: -h.TotalPixelMatrixColumns,
    )
    if not levels or _matrix(levels[0]) != meta.shape_l0:
        found = _matrix(levels[0]) if levels else "no instance of the slide itself"
        msg = f"{meta.uri}: the series holds {found} (rows, columns), the heatmap was made for {meta.shape_l0}; keep the files of the series together"
        raise SourceError(msg)
    info = context.info
    fitting = [h for h in levels if math.prod(_matrix(h)) <= MOST_PX]
    if not fitting:
        msg = (
            f"{meta.uri}: its smallest level has {math.prod(_matrix(levels[-1])) / 1e6:.0f} M px; a map holds at most "
            f"{MOST_PX / 1e6:.0f} M. Add coarser levels to the series, or export to ome-tiff"
        )
        raise SpecError(msg)
    size = {id(h): [a / b for a, b in zip(_spacing(h), _spacing(levels[0]), strict=True)] for h in fitting}
    # The coarsest level that shows every heatmap px; else the finest there can be.
    fine = [
        h
        for h in fitting
        if all(s <= 1.01 * d for s, d in zip(size[id(h)], info.grid.downsample, strict=True))
    ]
    header = fine[-1] if fine else fitting[0]
    picture_l0 = size[id(header)]
    level = level_for(len(info.grid.levels), info.grid.downsample, [0.99 * s for s in picture_l0])
    heat_l0 = [d * 2**level for d in info.grid.downsample]
    rows, columns = int(header.Rows), int(header.Columns)
    shape, starts = _matrix(header), _frame_starts(header, meta.uri)

    def frames(channel: int) -> NDArray[np.float32]:
        heat = np.asarray(context.heatmap.image(level)[channel], np.float32)
        matrix = place(heat, heat_l0, shape, picture_l0)
        margins = [(0, max(0, max(s) + n - have)) for s, n, have in zip(zip(*starts, strict=True), (rows, columns), shape, strict=True)]  # fmt: skip
        matrix = np.pad(matrix, margins, constant_values=np.nan)
        return np.stack([matrix[r : r + rows, c : c + columns] for r, c in starts])

    words = (
        f"matches the source's level of {shape[1]} x {shape[0]} px ({picture_l0[1]:g} level-0 px each); each px has the "
        f"value of the heatmap px under its centre, heatmap level {level} ({heat_l0[1]} level-0 px each)"
    )
    if "TotalPixelMatrixOriginSequence" not in header:
        words += "; the source states no Total Pixel Matrix Origin: 0, 0 is written"
    return _Grid([_complete(header)], frames, words)


def _series_grid(context: ExportContext, meta: ImageMeta) -> _Grid:
    path = Path(meta.uri)
    headers, affine, _ = placed(path, [_complete(h) for h in headers_of(path)])
    step = float(np.linalg.norm(affine[:3, 2]))
    for header in headers:
        if header.get("SliceThickness") is None:
            header.SliceThickness = step
    turn = turn_from_ras(affine)
    expected = (len(headers), int(headers[0].Rows), int(headers[0].Columns))

    def frames(channel: int) -> NDArray[np.float32]:
        values = np.asarray(context.heatmap.as_dask(level=0, channel=channel), dtype=np.float32)
        full = on_source_grid(values, context.info.grid.downsample, meta.shape_l0)
        xyz = orientations.apply_orientation(np.transpose(full, (2, 1, 0)), turn)
        stack = np.ascontiguousarray(np.transpose(xyz, (2, 1, 0)), np.float32)
        if stack.shape != expected:
            msg = f"{meta.uri}: is now {expected} (slices, rows, columns), the heatmap was made for {stack.shape}; explain it again"
            raise SourceError(msg)
        return stack

    return _Grid(
        headers, frames, "one frame a slice of the source, interpolated linearly between heatmap voxels"
    )


def _parametric_map(
    context: ExportContext, grid: _Grid, channel: int, series: str, number: int
) -> hd.pm.ParametricMap:
    row = context.info.channels[channel]
    frames = grid.frames(channel)
    finite = frames[np.isfinite(frames)]
    extent = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    start, end = display_window(context.heatmap, channel, 0)
    code, meaning = _UCUM[row.unit]
    source = grid.headers[0]
    made = hd.pm.ParametricMap(
        source_images=grid.headers,
        pixel_array=frames,
        series_instance_uid=series,
        series_number=SERIES_NUMBER + int(source.get("SeriesNumber") or 0),
        sop_instance_uid=str(hd.UID()),
        instance_number=number,
        manufacturer="gigacam",
        manufacturer_model_name="gigacam",
        software_versions=version("gigacam"),
        device_serial_number=context.info.run_id,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            hd.pm.RealWorldValueMapping(
                lut_label=row.method[:16],
                lut_explanation=row.label[:64],
                unit=hd.sr.CodedConcept(code, "UCUM", meaning),
                value_range=extent,
                slope=1.0,
                intercept=0.0,
                quantity_definition=hd.sr.CodedConcept("CAM", SCHEME, "Class activation map value"),
            )
        ],
        voi_lut_transformations=[
            hd.VOILUTTransformation(
                window_center=(start + end) / 2, window_width=end - start, voi_lut_function="LINEAR_EXACT"
            )
        ],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_description=f"Research use only: {row.label}"[:64],
        content_label="CAM",
        content_qualification="RESEARCH",
        derivation=hd.sr.CodedConcept("CAM", SCHEME, f"Class activation map, {row.method}"[:64]),
        series_description="gigacam CAM, research use only",
        specific_character_set="ISO_IR 192",
    )
    made.FloatPixelPaddingValue = made.FloatPixelPaddingRangeLimit = float("nan")
    _describe(made, context, grid, [channel])
    return made


def _overview(context: ExportContext, grid: _Grid, reader: Reader) -> Any:
    """The overview with its legend and intended use burned in."""
    tiles = context.stored_tiles.info if context.stored_tiles else None
    figure = overview_figure(reader, context.heatmap, tiles, context.channels)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    source = grid.headers[0]
    place_of: dict[str, Any] = {"coordinate_system": "PATIENT", "patient_orientation": ("L", "P")}
    if context.kind == "slide":
        place_of = {
            "coordinate_system": "SLIDE",
            "container_identifier": source.get("ContainerIdentifier", ""),
            "specimen_descriptions": source.get("SpecimenDescriptionSequence", []),
        }
    made: Any = hd.sc.SCImage(
        pixel_array=np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]),
        photometric_interpretation="RGB",
        bits_allocated=8,
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=str(hd.UID()),
        series_number=SERIES_NUMBER + 1 + int(source.get("SeriesNumber") or 0),
        sop_instance_uid=str(hd.UID()),
        instance_number=1,
        manufacturer="gigacam",
        manufacturer_model_name="gigacam",
        software_versions=version("gigacam"),
        patient_id=source.PatientID,
        patient_name=source.PatientName,
        patient_birth_date=source.PatientBirthDate,
        patient_sex=source.PatientSex,
        accession_number=source.AccessionNumber,
        study_id=source.StudyID,
        study_date=source.StudyDate,
        study_time=source.StudyTime,
        referring_physician_name=source.get("ReferringPhysicianName"),
        series_description="gigacam CAM overview, research use only",
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **place_of,
    )
    made.PatientOrientation = []  # several planes in one picture, or a slide: there is no one orientation
    made.BurnedInAnnotation = "YES"  # the title is a file name, which may name a patient
    _describe(made, context, grid, context.channels[:4])
    return made


def _describe(made: Dataset, context: ExportContext, grid: _Grid, channels: Sequence[int]) -> None:
    """Derivation (at most 1024 characters) and the whole statement (at most 10,240)."""
    said = statement.text(context, channels)
    made.DerivationDescription = said[:1024]
    if context.kind == "volume":
        made.Laterality = grid.headers[0].get("Laterality", "")
    made.DerivationCodeSequence = [hd.sr.CodedConcept("CAM", SCHEME, "Class activation map")]
    made.ImageComments = f"{said}\nGrid: {grid.words}"[:10240]


def _complete(header: Dataset) -> Dataset:
    """Text decoded, and what every image of a study has put in where it is missing, empty."""
    header.decode()
    for keyword in _TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    if "TotalPixelMatrixRows" in header:
        if "TotalPixelMatrixOriginSequence" not in header:
            origin = Dataset()
            origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0.0
            header.TotalPixelMatrixOriginSequence = [origin]
        if "OpticalPathSequence" not in header:
            header.OpticalPathSequence = [Dataset()]  # there is one: the number of frames was checked
    return header


def _matrix(header: Dataset) -> tuple[int, int]:
    return int(header.TotalPixelMatrixRows), int(header.TotalPixelMatrixColumns)


def _spacing(header: Dataset) -> tuple[float, float]:
    """Of rows and of columns, in mm: where a DICOM reader puts pixels, whatever the run was told."""
    try:
        measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        down, across = (float(v) for v in measures.PixelSpacing)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        msg = f"{header.get('filename', 'the source')}: an instance states no pixel spacing ({error}); its maps could not be placed. Convert the slide anew"
        raise SourceError(msg) from error
    return down, across


def _frame_starts(header: Dataset, uri: str) -> list[tuple[int, int]]:
    """Row and column, from 0, of the first px of each frame, in the file's order."""
    rows, columns = int(header.Rows), int(header.Columns)
    if header.get("DimensionOrganizationType") == "TILED_FULL":
        high, wide = _matrix(header)
        starts = list(itertools.product(range(0, high, rows), range(0, wide, columns)))
    else:
        places = [g.PlanePositionSlideSequence[0] for g in header.PerFrameFunctionalGroupsSequence]
        starts = [
            (
                int(p.RowPositionInTotalImagePixelMatrix) - 1,
                int(p.ColumnPositionInTotalImagePixelMatrix) - 1,
            )
            for p in places
        ]
    if len(set(starts)) != int(header.NumberOfFrames):
        msg = (
            f"{uri}: {header.NumberOfFrames} frames at {len(set(starts))} places; a map matches slides of one focal plane and "
            "one optical path, each level in one file. Export to ome-tiff"
        )
        raise SpecError(msg)
    return starts


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:80]
