from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from schemas.errors import SourceError, SpecError
from schemas.image import ImageMeta, LevelMeta, ReadOptions
from tests.test_workers.made_exports import made_context
from tests.test_workers.made_heatmaps import UNSIGNED, made_heatmap
from workers.export.nifti import on_source_grid, turn_from_ras, write_nifti
from workers.export.targets import EXPORTS, run_export
from workers.readers.opening import open_image
from workers.readers.reader import Reader

SHAPE = (13, 9, 11)
OBLIQUE = np.array([[1.9, 0.3, -0.1, -20], [-0.25, 2.1, 0.4, 7], [0.2, -0.3, 2.9, 31], [0, 0, 0, 1.0]])


def turned_affine(codes: str) -> np.ndarray:
    """Affine of a file whose axes have these codes, spacing different on every axis."""
    turn = orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(turn):
        affine[int(world), axis] = sign * (1.5 + axis)
    affine[:, 3] = (-40, 12, 5, 1)
    return affine


def source(path: Path, affine: np.ndarray, header: Any = None, sform: int = 1, qform: int = 1) -> Path:
    voxels = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    image = nib.Nifti1Image(voxels, affine, header)
    image.set_sform(affine, sform)
    image.set_qform(affine if qform else None, qform)
    image.header["descrip"] = b"Jane Doe 1970-01-01"
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def world_of(meta: ImageMeta) -> np.ndarray:
    """`(z, y, x, 3)` mm of every voxel of the internal RAS array."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in meta.shape_l0), indexing="ij")
    return np.asarray(np.stack([x, y, z, np.ones_like(x)], -1) @ np.asarray(meta.affine)[:3].T)


def ramp(world: np.ndarray) -> np.ndarray:
    return np.asarray(world @ np.array([1.0, 100.0, 1e4]), np.float32)


SOURCES = {
    **{c: turned_affine(c) for c in ("RAS", "LAS", "LPS", "SAR", "PIR")},
    "oblique": OBLIQUE,
    "oblique LPS": OBLIQUE @ np.diag([-1, -1, 1, 1.0]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_voxel_keeps_its_world_position(tmp_path: Path, name: str) -> None:
    path = source(tmp_path / "s.nii.gz", SOURCES[name])
    reader = open_image(str(path))
    heat = ramp(world_of(reader.meta))
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 1, heat[None])
    out = cast("Any", nib.load(write_nifti(tmp_path / "heatmap.nii.gz", store, reader)))
    original = cast("Any", nib.load(path))
    assert out.shape == SHAPE
    assert out.header["sizeof_hdr"] == 348
    np.testing.assert_array_equal(out.affine, original.affine)
    assert orientations.aff2axcodes(out.affine) == orientations.aff2axcodes(original.affine)
    index = np.stack([*np.indices(SHAPE), np.ones(SHAPE, int)], -1)
    expected = ramp(index @ original.affine[:3].T)
    np.testing.assert_allclose(out.get_fdata(), expected, rtol=1e-5, atol=0.5)


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (1, 0), (0, 1), (4, 1), (2, 3)])
def test_codes_units_and_nothing_personal_are_carried(tmp_path: Path, sform: int, qform: int) -> None:
    path = source(tmp_path / "s.nii", turned_affine("LAS"), sform=sform, qform=qform)
    reader = open_image(str(path))
    store = made_heatmap(
        tmp_path / "h.ome.zarr", reader.meta, 1, np.ones((1, *reader.meta.shape_l0), np.float32)
    )
    out = cast("Any", nib.load(write_nifti(tmp_path / "heatmap.nii.gz", store, reader)))
    original = cast("Any", nib.load(path))
    assert (int(out.header["sform_code"]), int(out.header["qform_code"])) == (sform, qform)
    np.testing.assert_array_equal(out.affine, original.affine)
    for name in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x"):
        np.testing.assert_array_equal(out.header[name], original.header[name])
    assert out.get_data_dtype() == np.float32
    assert out.header.get_xyzt_units() == ("mm", "unknown")
    assert b"Doe" not in out.header.binaryblock
    assert b"not for diagnostic" in out.header.binaryblock
    assert len(out.header.extensions) == 0


@pytest.mark.parametrize("downsample", [1, 2, 3])
@pytest.mark.parametrize("name", ["LAS", "oblique"])
def test_a_hot_voxel_lies_at_its_world_coordinate(tmp_path: Path, name: str, downsample: int) -> None:
    path = source(tmp_path / "s.nii.gz", SOURCES[name])
    reader = open_image(str(path))
    affine = np.asarray(reader.meta.affine)
    grid = [-(-n // downsample) for n in reader.meta.shape_l0]
    heat = np.zeros((1, *grid), np.float32)
    hot = (2, 1, 2)
    heat[(0, *hot)] = 5
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, downsample, heat)
    out = cast("Any", nib.load(write_nifti(tmp_path / "heatmap.nii.gz", store, reader)))
    values = out.get_fdata()
    index = np.argwhere(values > 0)
    weight = values[tuple(index.T)]
    found = nib.affines.apply_affine(out.affine, (index * weight[:, None]).sum(0) / weight.sum())
    centre = [(h + 0.5) * downsample - 0.5 for h in hot]
    expected = nib.affines.apply_affine(affine, centre[::-1])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_several_channels_big_endian_4d_source_and_equal_bytes(tmp_path: Path) -> None:
    affine = turned_affine("LAS")
    voxels = np.random.default_rng(1).integers(0, 99, (*SHAPE, 2)).astype(">i2")
    image = nib.Nifti1Image(voxels, affine, nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "s.nii")
    assert (tmp_path / "s.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    reader = open_image(str(tmp_path / "s.nii"), ReadOptions(time=1))
    heat = np.stack([ramp(world_of(reader.meta)), -ramp(world_of(reader.meta))])
    heat[:, :2] = np.nan
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 1, heat)
    first = write_nifti(tmp_path / "a.nii.gz", store, reader).read_bytes()
    second = write_nifti(tmp_path / "b.nii.gz", store, reader).read_bytes()
    assert first == second
    assert sorted(p.name for p in tmp_path.glob("*.part")) == []
    out = cast("Any", nib.load(tmp_path / "a.nii.gz"))
    assert out.shape == (*SHAPE, 2)
    values = out.get_fdata()
    np.testing.assert_array_equal(values[..., 0], -values[..., 1])
    np.testing.assert_array_equal(values[..., 0], heat[0].transpose(2, 1, 0)[::-1])
    assert np.isnan(values[:, :, :2]).all()
    assert np.isfinite(values[:, :, 2:]).all()


def test_spacing_told_to_the_run_leaves_the_files_affine(tmp_path: Path) -> None:
    path = source(tmp_path / "s.nii.gz", turned_affine("LPS"))
    reader = open_image(str(path), ReadOptions(spacing_mm=(9.0, 9.0, 9.0)))
    store = made_heatmap(
        tmp_path / "h.ome.zarr", reader.meta, 1, np.ones((1, *reader.meta.shape_l0), np.float32)
    )
    out = cast("Any", nib.load(write_nifti(tmp_path / "heatmap.nii.gz", store, reader)))
    np.testing.assert_array_equal(out.affine, turned_affine("LPS"))


def volume_meta(shape: tuple[int, ...], affine: np.ndarray | None, format_: str) -> ImageMeta:
    return ImageMeta(
        uri="somewhere", stem="v", identity="a" * 64, kind="volume", format=format_, channels=1, dtype="float32",
        levels=(LevelMeta(shape=shape, downsample=(1.0, 1.0, 1.0)),), spacing=(2.0, 1.0, 0.5),
        spacing_source="test", affine=None if affine is None else tuple(map(tuple, affine.tolist())),
    )  # fmt: skip


@pytest.mark.parametrize("affine", [OBLIQUE, None], ids=["oblique", "none"])
def test_other_sources_give_a_ras_file(tmp_path: Path, affine: np.ndarray | None) -> None:
    meta = volume_meta((6, 7, 8), affine, "dicom:CT")
    heat = np.arange(6 * 7 * 8, dtype=np.float32).reshape(1, 6, 7, 8)
    store = made_heatmap(tmp_path / "h.ome.zarr", meta, 1, heat, channels=[UNSIGNED])
    reader = cast("Reader", SimpleNamespace(meta=meta))
    out = cast("Any", nib.load(write_nifti(tmp_path / "heatmap.nii.gz", store, reader)))
    expected = np.diag([0.5, 1, 2, 1]) if affine is None else affine
    np.testing.assert_allclose(out.affine, expected, atol=1e-5)
    assert int(out.header["sform_code"]) == 1
    assert out.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(out.get_fdata(), heat[0].transpose(2, 1, 0))
    np.testing.assert_allclose(out.header["cal_max"], store.info.display[0][1])


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "s.nii.gz", turned_affine("LAS"))
    reader = open_image(str(path))
    store = made_heatmap(
        tmp_path / "h.ome.zarr", reader.meta, 1, np.ones((1, *reader.meta.shape_l0), np.float32)
    )
    source(path, turned_affine("RAS"))
    with pytest.raises(SourceError, match=r"is now RAS.*LAS"):
        write_nifti(tmp_path / "heatmap.nii.gz", store, reader)
    changed = reader.meta.model_copy(update={"levels": (LevelMeta(shape=(2, 2, 2), downsample=(1, 1, 1)),)})
    with pytest.raises(SourceError, match="made for"):
        write_nifti(tmp_path / "heatmap.nii.gz", store, cast("Reader", SimpleNamespace(meta=changed)))


def test_a_slide_has_none(tmp_path: Path) -> None:
    reader = open_image("procedural:slide?width=64&height=64")
    store = made_heatmap(tmp_path / "h.ome.zarr", reader.meta, 8, np.ones((1, 8, 8), np.float32))
    with pytest.raises(SpecError, match="expected a volume"):
        write_nifti(tmp_path / "heatmap.nii.gz", store, reader)


def slow_source_grid(values: np.ndarray, downsample: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One voxel at a time, from the definition, in float64."""
    out = np.full(shape, np.nan)
    for at in np.ndindex(*shape):
        if not np.isfinite(values[tuple(i // d for i, d in zip(at, downsample, strict=True))]):
            continue
        place = [
            min(max((i + 0.5) / d - 0.5, 0), n - 1)
            for i, d, n in zip(at, downsample, values.shape, strict=True)
        ]
        total = weight = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            index = [int(p) + c for p, c in zip(place, corner, strict=True)]
            share = float(np.prod([1 - abs(p - i) for p, i in zip(place, index, strict=True)]))
            if share > 0 and np.isfinite(values[tuple(index)]):
                total += share * values[tuple(index)]
                weight += share
        out[at] = total / weight
    return out


@pytest.mark.parametrize("downsample", [(2, 2, 2), (1, 3, 4), (4, 1, 1), (5, 5, 5)])
def test_placing_equals_the_definition_voxel_by_voxel(downsample: tuple[int, ...]) -> None:
    shape = (9, 11, 7)
    rng = np.random.default_rng(3)
    values = rng.normal(size=[-(-n // d) for n, d in zip(shape, downsample, strict=True)]).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    np.testing.assert_allclose(
        on_source_grid(values, downsample, shape),
        slow_source_grid(values, downsample, shape),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_linear_function_of_position_is_kept_exactly_away_from_the_border() -> None:
    shape, d = (12, 12, 12), 4
    centre = (np.arange(3) + 0.5) * d
    values = np.add.reduce(np.meshgrid(centre, 10 * centre, 100 * centre, indexing="ij")).astype(np.float32)
    full = on_source_grid(values, (d,) * 3, shape)
    at = np.arange(12) + 0.5
    expected = np.add.reduce(np.meshgrid(at, 10 * at, 100 * at, indexing="ij"))
    inner = (slice(2, 10),) * 3
    np.testing.assert_allclose(full[inner], expected[inner], rtol=1e-6)


def test_the_export_holds_the_channels_asked_for_and_says_what_they_are(tmp_path: Path) -> None:
    path = source(tmp_path / "s.nii.gz", SOURCES["oblique LPS"])
    shape = open_image(str(path)).meta.shape_l0
    heat = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    heat[:, 0] = np.nan
    context = made_context(tmp_path / "image", path, 1, heat, options={"channels": ("1",)})
    (made,) = run_export(EXPORTS["nifti"], context)
    out = cast("Any", nib.load(made))
    np.testing.assert_array_equal(out.affine, cast("Any", nib.load(path)).affine)
    turned = orientations.apply_orientation(heat[1].transpose(2, 1, 0), turn_from_ras(out.affine))
    np.testing.assert_array_equal(out.get_fdata(dtype=np.float32), turned)
    (comment,) = out.header.extensions
    assert comment.get_code() == 6
    said = comment.text
    for words in ("For research use only", context.info.run_id, "hirescam:tumour", "logit"):
        assert words in said
