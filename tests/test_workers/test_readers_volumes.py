"""Volumes: orientation, scaling, the choice among several, and DICOM series."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.readers import identity_of, open_image
from workers.readers.reader import Reader

DATA = Path(__file__).parents[1] / "data"


def whole(reader: Reader) -> NDArray[np.float32]:
    shape = reader.meta.shape_l0
    pixels, coverage = reader.read(Box(frame="l0", start=(0, 0, 0), stop=shape), shape, 0)
    assert coverage.all()
    array: NDArray[np.float32] = pixels[0]
    return array


def save(path: Path, array: NDArray[Any], affine: Any, **header: Any) -> Path:
    image: Any = nib.Nifti1Image(array, affine)
    for key, value in header.items():
        image.header[key] = value
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    ("name", "orientation", "shape", "spacing"),
    [
        ("nibabel_anatomical_bigendian.nii", "LAS", (25, 41, 33), (2, 2, 2)),
        ("totalseg_ct_3mm_slab30.nii.gz", "RAS", (30, 101, 122), (3, 3, 3)),
        ("totalseg_ct_3mm_slab30_labels.nii.gz", "RAS", (30, 101, 122), (3, 3, 3)),
        ("mni152_2009a_t1_1mm.nii.gz", "RAS", (189, 233, 197), (1, 1, 1)),
    ],
)
def test_volumes_come_as_nibabels_closest_canonical(
    name: str, orientation: str, shape: tuple[int, ...], spacing: tuple[int, ...]
) -> None:
    reader = open_image(str(DATA / name))
    meta = reader.meta
    canonical: Any = nib.as_closest_canonical(nib.load(DATA / name))
    expected = np.transpose(np.asarray(canonical.dataobj, dtype=np.float32), (2, 1, 0))
    assert (meta.source_orientation, meta.shape_l0, meta.kind, meta.channels) == (
        orientation,
        shape,
        "volume",
        1,
    )
    assert meta.spacing == pytest.approx(spacing)
    assert np.array_equal(whole(reader), expected)
    np.testing.assert_allclose(np.asarray(meta.affine), canonical.affine, atol=1e-4)
    assert meta.background == expected.min()
    assert meta.identity == identity_of(str(DATA / name))


def test_outside_a_volume_is_its_minimum() -> None:
    reader = open_image(str(DATA / "totalseg_ct_3mm_slab30.nii.gz"))
    pixels, coverage = reader.read(Box(frame="l0", start=(-2, -2, -2), stop=(8, 8, 8)), (10, 10, 10), 0)
    assert (pixels[0][~coverage] == -1100).all()
    assert coverage.sum() == 8**3


def test_spacing_is_in_array_order_and_survives_permuted_axes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 99, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, -4, 10], [-2, 0, 0, 20], [0, 3, 0, 30], [0, 0, 0, 1.0]])
    path = save(tmp_path / "pir.nii", array, affine)
    meta = open_image(str(path)).meta
    # x runs along the file's third axis (4 mm), y along its first (2 mm), z along its second (3 mm)
    assert meta.spacing == (3.0, 2.0, 4.0)
    assert meta.shape_l0 == (6, 5, 7)
    assert meta.source_orientation == "PSL"
    values = whole(open_image(str(path)))
    ras = np.asarray(meta.affine)
    for i, j, k in [(0, 0, 0), (4, 2, 6), (1, 5, 3)]:
        mm = affine @ [i, j, k, 1]
        x, y, z = np.rint(np.linalg.solve(ras, mm)).astype(int)[:3]
        assert values[z, y, x] == array[i, j, k]


def test_scaling_of_the_file_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "scaled.nii.gz"
    image: Any = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(2.5, -1000)
    nib.save(image, path)
    expected = np.transpose(np.asarray(nib.load(path).dataobj), (2, 1, 0))  # type: ignore[attr-defined]
    values = whole(open_image(str(path)))
    np.testing.assert_allclose(values, expected)
    assert expected.min() == -1000


def test_a_4d_volume_needs_a_choice_and_the_choice_is_part_of_its_identity() -> None:
    path = str(DATA / "nibabel_example4d.nii.gz")
    with pytest.raises(SourceError, match=r"2 volumes.*--time or --channel with 0\.\.1"):
        open_image(path)
    with pytest.raises(SourceError, match="out of range"):
        open_image(path, ReadOptions(time=2))
    canonical: Any = nib.as_closest_canonical(nib.load(path))
    data = np.asarray(canonical.dataobj, dtype=np.float32)
    readers = [open_image(path, ReadOptions(time=0)), open_image(path, ReadOptions(channel=1))]
    for index, reader in enumerate(readers):
        assert np.array_equal(whole(reader), np.transpose(data[..., index], (2, 1, 0)))
    assert len({r.meta.identity for r in readers} | {identity_of(path)}) == 3
    assert readers[0].meta.image_id() != readers[1].meta.image_id()


def test_a_5d_volume_takes_time_and_channel(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 4 * 2 * 3, dtype=np.float32).reshape(2, 3, 4, 2, 3)
    path = str(save(tmp_path / "five.nii", array, np.eye(4)))
    with pytest.raises(SourceError, match="--channel"):
        open_image(path, ReadOptions(time=1))
    got = whole(open_image(path, ReadOptions(time=1, channel=2)))
    assert np.array_equal(got, np.transpose(array[..., 1, 2], (2, 1, 0)))


def test_spacing_given_replaces_the_headers_and_the_affine_follows() -> None:
    meta = open_image(str(DATA / "nibabel_anatomical_bigendian.nii"), ReadOptions(spacing_mm=(5, 4, 3))).meta
    assert (meta.spacing, meta.spacing_source) == ((5, 4, 3), "--spacing")
    sizes = np.linalg.norm(np.asarray(meta.affine)[:3, :3], axis=0)
    np.testing.assert_allclose(sizes, (3, 4, 5))


def test_nan_reads_as_background(tmp_path: Path) -> None:
    array = np.full((4, 4, 4), 7, dtype=np.float32)
    array[0, 0, 0] = -3
    array[2, 2, 2] = np.nan
    values = whole(open_image(str(save(tmp_path / "nan.nii", array, np.eye(4)))))
    assert values[2, 2, 2] == -3
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("cut", "said"), [(100, "not a readable NIfTI|cannot be read"), (200_000, "truncated")]
)
def test_a_truncated_volume_says_so(tmp_path: Path, cut: int, said: str) -> None:
    path = tmp_path / "cut.nii.gz"
    path.write_bytes((DATA / "totalseg_ct_3mm_slab30.nii.gz").read_bytes()[:cut])
    with pytest.raises(SourceError, match=said) as caught:
        open_image(str(path))
    assert "cut.nii.gz" in caught.value.message


def test_volumes_that_are_no_volumes_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(SourceError, match="one real number a voxel"):
        open_image(str(save(tmp_path / "rgb.nii", rgb, np.eye(4))))
    flat = save(tmp_path / "flat.nii", np.zeros((3, 3, 3), np.uint8), np.eye(4), sform_code=1)
    damaged = bytearray(flat.read_bytes())
    damaged[280:328] = bytes(48)  # the sform's rows
    flat.write_bytes(damaged)
    with pytest.raises(SourceError, match="affine"):
        open_image(str(flat))


def test_a_ct_series_is_sorted_rescaled_and_turned() -> None:
    folder = DATA / "dicom_ct_series"
    reader = open_image(str(folder))
    meta = reader.meta
    assert (meta.format, meta.kind, meta.shape_l0, meta.spacing) == (
        "dicom:CT",
        "volume",
        (17, 128, 88),
        (2, 2, 2),
    )
    values = whole(reader)
    slices = sorted(
        (pydicom.dcmread(p) for p in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2])
    )
    affine = np.asarray(meta.affine)
    for k in (0, 8, 16):
        d = slices[k]
        stored = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
        for row, column in [(0, 0), (3, 80), (127, 5)]:
            # DICOM PS3.3 C.7.6.2.1.1, then LPS -> RAS
            lps = np.asarray(d.ImagePositionPatient, float)
            lps = lps + np.asarray(d.ImageOrientationPatient[:3], float) * d.PixelSpacing[1] * column
            lps = lps + np.asarray(d.ImageOrientationPatient[3:], float) * d.PixelSpacing[0] * row
            x, y, z, _ = np.linalg.solve(affine, [-lps[0], -lps[1], lps[2], 1])
            assert values[round(z), round(y), round(x)] == stored[row, column]
            np.testing.assert_allclose([x, y, z], np.rint([x, y, z]), atol=1e-6)


def test_a_series_is_the_same_image_by_folder_by_file_and_under_other_names(tmp_path: Path) -> None:
    folder = DATA / "dicom_ct_series"
    one = open_image(str(folder / "IMG0005.dcm"))
    for i, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        shutil.copy(path, tmp_path / f"{i:03d}.dcm")
    other = open_image(str(tmp_path))
    assert one.meta.identity == other.meta.identity == identity_of(str(folder))
    assert np.array_equal(whole(one), whole(other))


def test_a_series_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    for path in (DATA / "dicom_ct_series").iterdir():
        if path.name != "IMG0009.dcm":
            shutil.copy(path, tmp_path / path.name)
    with pytest.raises(SourceError, match=r"slice distances run from 2\.000 to 4\.000"):
        open_image(str(tmp_path))


def test_a_folder_of_two_series_asks_for_one(tmp_path: Path) -> None:
    for i, path in enumerate(sorted((DATA / "dicom_ct_series").iterdir())):
        shutil.copy(path, tmp_path / path.name)
        if i < 3:
            other = pydicom.dcmread(path)
            other.SeriesInstanceUID = "1.2.3.4"
            other.RescaleSlope, other.RescaleIntercept = 2, -7 - i
            other.save_as(tmp_path / f"other{i}.dcm")
    with pytest.raises(SourceError, match=r"holds 2 DICOM series"):
        open_image(str(tmp_path))
    values = whole(open_image(str(tmp_path / "other0.dcm")))  # each slice has a rescale of its own
    assert values.shape == (3, 128, 88)
    first = whole(open_image(str(tmp_path / "IMG0001.dcm")))
    for i in range(3):
        np.testing.assert_allclose(values[i], 2 * first[i] - 7 - i)
