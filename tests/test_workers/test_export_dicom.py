"""DICOM exports, opened by pydicom and highdicom, held against their sources in mm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from matplotlib.figure import Figure
from pydicom.config import disable_value_validation
from scipy.spatial.transform import Rotation

from schemas.errors import SpecError, StoreError
from schemas.image import ReadOptions
from tests.test_workers.made_exports import heat_grid, made_context
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED
from workers.export import parametric_map
from workers.export.context import ExportContext
from workers.export.nifti import write_nifti
from workers.export.targets import EXPORTS, run_export
from workers.readers.opening import open_image
from workers.stitching import grid as grids

DATA = Path(__file__).resolve().parents[1] / "data"
SMALL = DATA / "sm_image_50x50.dcm"
CAMELYON = DATA / "camelyon_lowres_multiframe.dcm"
CT = DATA / "dicom_ct_series"
RUN_ID = "1" * 64


@pytest.fixture(autouse=True)
def unchecked() -> Any:
    """The sources break rules of their own, such as the length of a UID."""
    with disable_value_validation():
        yield


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests that look at the overview draw it in full."""
    if "px_by_px" not in request.node.name:
        monkeypatch.setattr(parametric_map, "overview_figure", lambda *_: Figure(figsize=(1, 1)))


def heat(shape_l0: tuple[int, ...], downsample: int, hot: tuple[int, ...]) -> np.ndarray:
    """`(1, *S)`: -1 to 1, one px of 5, a corner where nobody looked."""
    grid = heat_grid(shape_l0, downsample)
    values = np.random.default_rng(1).uniform(-1, 1, grid).astype(np.float32)
    values[(slice(2), slice(2), slice(2))[: len(grid)]] = np.nan
    values[hot] = 5
    return values[None]


def exported(context: ExportContext) -> tuple[list[pydicom.Dataset], pydicom.Dataset]:
    """Maps by channel, and the overview."""
    paths = run_export(EXPORTS["dicom"], context)
    maps = [p for p in paths if p.name != "overview.dcm"]
    assert len(paths) == len(maps) + 1
    return [pydicom.dcmread(p) for p in maps], pydicom.dcmread(paths[-1])


def to_mm(dataset: pydicom.Dataset, row_column: np.ndarray) -> np.ndarray:
    """Physical place of `(row, column)` of the total pixel matrix, px centres at whole numbers, by highdicom."""
    transform = hd.spatial.PixelToReferenceTransformer.for_image(dataset, for_total_pixel_matrix=True)
    return np.asarray(transform.affine @ np.array([row_column[1], row_column[0], 0, 1]))[:3]


def nearest(values: np.ndarray, downsample: int, shape: tuple[int, int], size: int = 1) -> np.ndarray:
    """The heatmap px under the centre of each px of `size` level-0 px."""
    level_0 = values.repeat(downsample, axis=0).repeat(downsample, axis=1)
    return np.asarray(level_0[size // 2 :: size, size // 2 :: size][: shape[0], : shape[1]])


@pytest.mark.parametrize(("path", "downsample", "hot"), [(SMALL, 4, (7, 3)), (CAMELYON, 16, (40, 11))])
def test_a_slides_map_matches_its_source_px_by_px(
    tmp_path: Path, path: Path, downsample: int, hot: tuple[int, int]
) -> None:
    # whatever pixel size the run was told, the map lies where the source's own puts it
    read = ReadOptions(mpp_um=1.0)
    source = pydicom.dcmread(path)
    shape = (source.TotalPixelMatrixRows, source.TotalPixelMatrixColumns)
    values = heat(shape, downsample, hot)
    (map_,), overview = exported(made_context(tmp_path / "image", path, downsample, values, read))

    for keyword in (
        "Rows", "Columns", "NumberOfFrames", "TotalPixelMatrixRows", "TotalPixelMatrixColumns", "FrameOfReferenceUID",
        "StudyInstanceUID", "ImageOrientationSlide",
    ):  # fmt: skip
        assert map_[keyword].value == source[keyword].value, keyword
    measures = [d.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0] for d in (map_, source)]
    assert measures[0].PixelSpacing == measures[1].PixelSpacing
    assert map_.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    derived = map_.PerFrameFunctionalGroupsSequence[3].DerivationImageSequence[0]
    assert derived.SourceImageSequence[0].ReferencedFrameNumber == 4

    expected = nearest(values[0], downsample, shape)
    made = hd.imread(tmp_path / "image/export/dicom" / "00-hirescam_tumour.dcm")
    matrix = made.get_total_pixel_matrix(apply_real_world_transform=True, dtype=np.float64)
    np.testing.assert_array_equal(matrix.astype(np.float32), expected)
    frames = map_.pixel_array
    assert frames.dtype == np.float32
    np.testing.assert_array_equal(frames[0], expected[: map_.Rows, : map_.Columns])
    beyond = frames[-1][shape[0] - (shape[0] - 1) // map_.Rows * map_.Rows :]
    assert np.isnan(beyond).all()

    found = np.argwhere(matrix == 5).mean(axis=0)
    planted_l0 = (np.array(hot) + 0.5) * downsample - 0.5
    if "TotalPixelMatrixOriginSequence" not in source:
        source.TotalPixelMatrixOriginSequence = map_.TotalPixelMatrixOriginSequence
        assert "no Total Pixel Matrix Origin" in map_.ImageComments
    np.testing.assert_allclose(to_mm(map_, found), to_mm(source, planted_l0), atol=1e-9)

    assert overview.SOPClassUID.name == "Secondary Capture Image Storage"
    assert overview.pixel_array.std() > 1, "nothing is drawn"
    assert overview.pixel_array.shape == (overview.Rows, overview.Columns, 3)
    assert overview.StudyInstanceUID == source.StudyInstanceUID
    assert "For research use only" in overview.ImageComments


def test_a_map_says_what_it_is(tmp_path: Path) -> None:
    values = np.stack([heat((50, 50), 4, (7, 3))[0], np.full((13, 13), np.nan, np.float32)])
    coverage = np.where(np.isfinite(values), 1, 3).astype(np.uint8)
    values[1] = np.where(coverage[0] == 1, 0.25, np.nan)
    context = made_context(tmp_path / "image", SMALL, 4, values, channels=[SIGNED, UNSIGNED])
    (signed, unsigned), _ = exported(context)
    assert signed.SOPClassUID.name == "Parametric Map Storage"
    assert signed.ContentQualification == "RESEARCH"
    assert np.isnan(signed.FloatPixelPaddingValue)
    assert np.isnan(signed.FloatPixelPaddingRangeLimit)
    for said in ("For research use only", RUN_ID, "hirescam:tumour", "logit"):
        assert said in signed.DerivationDescription
        assert said in signed.ImageComments
    shared = signed.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == 5
    units = [d.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0] for d in (signed, unsigned)]  # fmt: skip
    assert [(u.CodeValue, u.CodingSchemeDesignator) for u in units] == [("{logit}", "UCUM"), ("1", "UCUM")]
    start, end = context.info.display[0]
    window = shared.FrameVOILUTSequence[0]
    assert float(window.WindowCenter) == pytest.approx((start + end) / 2, abs=1e-6)
    assert float(window.WindowWidth) == pytest.approx(end - start)
    assert signed.SeriesInstanceUID == unsigned.SeriesInstanceUID
    assert signed.SOPInstanceUID != unsigned.SOPInstanceUID


def two_levels(folder: Path) -> Path:
    """The 50 x 50 slide with a level of half its size in another file of the series."""
    folder.mkdir()
    full = pydicom.dcmread(SMALL)
    full.save_as(folder / "a.dcm")
    half = pydicom.dcmread(SMALL)
    half.SOPInstanceUID = half.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3.4")
    half.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    half.TotalPixelMatrixRows = half.TotalPixelMatrixColumns = 25
    half.NumberOfFrames = 9
    measures = half.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = [2 * v for v in measures.PixelSpacing]
    half.PixelData = bytes(9 * 10 * 10 * 3)
    half.save_as(folder / "b.dcm")
    return folder / "a.dcm"


@pytest.mark.parametrize(
    ("downsample", "most", "shape"),
    [(4, 10**6, 25), (1, 10**6, 50), (1, 1000, 25)],
    ids=["coarse", "fine", "bounded"],
)
def test_a_level_of_the_source_is_chosen_and_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downsample: int, most: int, shape: int
) -> None:
    monkeypatch.setattr(parametric_map, "MOST_PX", most)
    path = two_levels(tmp_path / "slide")
    values = heat((50, 50), downsample, (7, 3))
    with patch.dict(grids.CHUNK, {2: 16}), patch.dict(grids.SHARD, {2: 32}):
        context = made_context(tmp_path / "image", path, downsample, values)
    (map_,), _ = exported(context)
    source = pydicom.dcmread(path.with_name("b.dcm" if shape == 25 else "a.dcm"))
    assert map_.TotalPixelMatrixRows == shape
    assert map_.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    level = 1 if (downsample, shape) == (1, 25) else 0
    stored = context.heatmap.image(level)[0]
    matrix = hd.imread(next((tmp_path / "image/export/dicom").glob("00-*"))).get_total_pixel_matrix()
    np.testing.assert_array_equal(matrix, nearest(stored, downsample * 2**level, (shape, shape), 50 // shape))


def test_no_level_small_enough_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parametric_map, "MOST_PX", 100)
    context = made_context(tmp_path / "image", SMALL, 4, heat((50, 50), 4, (7, 3)))
    with pytest.raises(SpecError, match="ome-tiff"):
        run_export(EXPORTS["dicom"], context)


def turned_series(folder: Path, degrees: float) -> Path:
    """The CT series as if the patient had lain obliquely; one file's slice thickness left out."""
    folder.mkdir()
    turn = Rotation.from_euler("zyx", [degrees, degrees / 2, -degrees / 3], degrees=True).as_matrix()
    for i, path in enumerate(sorted(CT.glob("*.dcm"))):
        slice_ = pydicom.dcmread(path)
        slice_.ImagePositionPatient = [
            round(float(v), 6) for v in turn @ np.asarray(slice_.ImagePositionPatient, float)
        ]
        rows = np.asarray(slice_.ImageOrientationPatient, float).reshape(2, 3) @ turn.T
        slice_.ImageOrientationPatient = [round(float(v), 9) for v in rows.ravel()]
        if not i:
            del slice_.SliceThickness
        slice_.save_as(folder / path.name)
    return folder


@pytest.mark.parametrize("degrees", [0.0, 25.0], ids=["straight", "oblique"])
@pytest.mark.parametrize("downsample", [1, 2])
def test_a_series_map_lies_in_the_patient_where_the_heat_is(
    tmp_path: Path, degrees: float, downsample: int
) -> None:
    path = turned_series(tmp_path / "ct", degrees) if degrees else CT
    meta = open_image(str(path)).meta
    hot = tuple(n // downsample // 3 for n in meta.shape_l0)
    values = np.zeros((1, *heat_grid(meta.shape_l0, downsample)), np.float32)
    values[(0, *hot)] = 5
    values[0, 0] = np.nan
    context = made_context(tmp_path / "image", path, downsample, values)
    (map_,), _ = exported(context)
    slices = sorted((pydicom.dcmread(p) for p in path.glob("*.dcm")), key=lambda s: s.SOPInstanceUID)
    assert (map_.NumberOfFrames, map_.Rows, map_.Columns) == (len(slices), slices[0].Rows, slices[0].Columns)
    assert map_.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    groups = map_.PerFrameFunctionalGroupsSequence
    found = sorted(
        groups, key=lambda g: g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
    )
    for frame, slice_ in zip(found, slices, strict=True):
        assert frame.PlanePositionSequence[0].ImagePositionPatient == slice_.ImagePositionPatient
    assert map_.Laterality == "", "type 2C: present though unknown"
    shared = map_.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == slices[0].ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == slices[0].PixelSpacing

    volume = hd.imread(next((tmp_path / "image/export/dicom").glob("00-*"))).get_volume()
    heated = np.nan_to_num(volume.array)
    index = np.argwhere(heated > 0)
    weight = heated[tuple(index.T)]
    lps = nib.affines.apply_affine(volume.affine, (index * weight[:, None]).sum(0) / weight.sum())
    centre = [(h + 0.5) * downsample - 0.5 for h in hot]
    ras = nib.affines.apply_affine(np.asarray(meta.affine), centre[::-1])
    np.testing.assert_allclose(lps, ras * (-1, -1, 1), atol=2e-4)

    with context.source() as reader:
        twin: Any = nib.load(write_nifti(tmp_path / "twin.nii.gz", context.heatmap, reader))
    np.testing.assert_array_equal(
        np.sort(volume.array.ravel()), np.sort(twin.get_fdata(dtype=np.float32).ravel())
    )


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [("procedural:slide?width=64&height=64", "wsidicomizer"), ("procedural:volume?shape=8,8,8", "nifti")],
)
def test_other_sources_are_refused_with_a_way_out(tmp_path: Path, uri: str, remedy: str) -> None:
    shape = open_image(uri).meta.shape_l0
    context = made_context(tmp_path / "image", uri, 8, np.ones((1, *heat_grid(shape, 8)), np.float32))
    with pytest.raises(SpecError, match=remedy):
        run_export(EXPORTS["dicom"], context)
    assert not (tmp_path / "image/export/dicom").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = made_context(tmp_path / "image", SMALL, 4, heat((50, 50), 4, (7, 3)))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.delitem(sys.modules, "workers.export.parametric_map")
    with pytest.raises(SpecError, match=r"gigacam\[dicom\]"):
        run_export(EXPORTS["dicom"], context)


@pytest.mark.parametrize("name", ["dicom", "ngff04", "neuroglancer", "vitessce"])
def test_what_is_not_complete_is_exported_only_when_asked_and_says_so(tmp_path: Path, name: str) -> None:
    """With a channel nobody looked at yet, whose range is unknown."""
    values = np.full((1, 13, 13), np.nan, np.float32)
    made = made_context(tmp_path / "image", SMALL, 4, values, publish=False, options={"url": "http://a/b"})
    with pytest.raises(StoreError, match="--partial"):
        run_export(EXPORTS[name], made)
    options = made.options.model_copy(update={"partial": True})
    files = run_export(EXPORTS[name], ExportContext.open(made.folder, options))
    assert any(b"PARTIAL" in path.read_bytes() for path in files)


def test_frames_of_a_sparsely_tiled_source_keep_their_places(tmp_path: Path) -> None:
    """The same slide, its frames in another order, each saying where it lies."""
    source = pydicom.dcmread(SMALL)
    positions = hd.utils.get_plane_positions_of_image(source)
    order = np.random.default_rng(0).permutation(len(positions))
    source.DimensionOrganizationType = "TILED_SPARSE"
    frames = np.frombuffer(source.PixelData, np.uint8).reshape(len(order), -1)
    source.PixelData = frames[order].tobytes()
    source.PerFrameFunctionalGroupsSequence = [pydicom.Dataset() for _ in order]
    for group, at in zip(source.PerFrameFunctionalGroupsSequence, order, strict=True):
        group.PlanePositionSlideSequence = positions[at]
    source.save_as(tmp_path / "sparse.dcm")
    values = heat((50, 50), 4, (7, 3))
    exported(made_context(tmp_path / "image", tmp_path / "sparse.dcm", 4, values))
    made = hd.imread(next((tmp_path / "image/export/dicom").glob("00-*")))
    np.testing.assert_array_equal(made.get_total_pixel_matrix(), nearest(values[0], 4, (50, 50)))
    for group in made.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSlideSequence[0]
        number = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        its = source.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSlideSequence[0]
        assert place.RowPositionInTotalImagePixelMatrix == its.RowPositionInTotalImagePixelMatrix
        assert place.ColumnPositionInTotalImagePixelMatrix == its.ColumnPositionInTotalImagePixelMatrix
