"""Arrays as images: in memory, `.npy`, Zarr, OME-Zarr 0.4 and 0.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.readers import identity_of, open_image
from workers.readers.arrays import array_reader

MPP = ReadOptions(mpp_um=0.5)
MM = ReadOptions(spacing_mm=(3, 2, 1))


def l0(*bounds: tuple[int, int]) -> Box:
    return Box(frame="l0", start=tuple(a for a, _ in bounds), stop=tuple(b for _, b in bounds))


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "kind", "channels", "spatial"),
    [
        ((40, 50), "uint8", MPP, "slide", 1, (40, 50)),
        ((3, 40, 50), "uint8", MPP, "slide", 3, (40, 50)),
        ((40, 50, 3), "uint8", MPP, "slide", 3, (40, 50)),
        ((3, 40, 50), "float32", MM, "volume", 1, (3, 40, 50)),
        ((8, 40, 50), "uint8", MM, "volume", 1, (8, 40, 50)),
        ((8, 40, 50), "uint16", MM, "volume", 1, (8, 40, 50)),
        ((2, 8, 40, 50), "float64", MM, "volume", 2, (8, 40, 50)),
    ],
)
@pytest.mark.parametrize("how", ["memory", "npy", "zarr"])
def test_arrays_by_shape_and_type(
    how: str, shape: tuple[int, ...], dtype: str, options: ReadOptions,
    kind: str, channels: int, spatial: tuple[int, ...], tmp_path: Path,
) -> None:  # fmt: skip
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    if how == "memory":
        reader: Any = array_reader(array, options)
    elif how == "npy":
        np.save(tmp_path / "a.npy", array)
        reader = open_image(str(tmp_path / "a.npy"), options)
    else:
        zarr.create_array(tmp_path / "a.zarr", data=array)
        reader = open_image(str(tmp_path / "a.zarr"), options)
        assert reader.meta.identity == identity_of(str(tmp_path / "a.zarr"))
    meta = reader.meta
    assert (meta.kind, meta.channels, meta.shape_l0) == (kind, channels, spatial)
    assert meta.dtype == ("uint8" if dtype == "uint8" and kind == "slide" else "float32")
    assert meta.spacing == ((0.5, 0.5) if kind == "slide" else (3, 2, 1))
    got, _ = reader.read(Box(frame="l0", start=(0,) * len(spatial), stop=spatial), spatial, 0)
    first = np.moveaxis(array, -1, 0) if shape[-1] == 3 else array.reshape(channels, *spatial)
    assert got.dtype == meta.dtype
    assert np.array_equal(got, first)


def test_an_array_without_pixel_size_or_of_odd_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 9), np.uint8))
    with pytest.raises(SourceError, match="--mpp"):
        open_image(str(tmp_path / "a.npy"))
    with pytest.raises(SourceError, match="--spacing"):
        array_reader(np.zeros((9, 9, 9), np.float32), ReadOptions())
    for shape in [(4,), (1, 1, 1, 1, 1), (0, 4)]:
        with pytest.raises(SourceError, match="shape"):
            array_reader(np.zeros(shape), MPP)
    with pytest.raises(SourceError, match="real numbers"):
        array_reader(np.zeros((4, 4), np.complex64), MPP)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY not really")
    with pytest.raises(SourceError, match=r"not a readable \.npy"):
        open_image(str(tmp_path / "broken.npy"), MPP)


def test_a_large_zarr_array_is_not_read_to_be_opened(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "big.zarr", shape=(70_000, 60_000, 3), chunks=(256, 256, 3), dtype="uint8", fill_value=9
    )
    array[1000:1100, 2000:2100] = 77
    reader = open_image(str(tmp_path / "big.zarr"), MPP)
    assert reader.meta.shape_l0 == (70_000, 60_000)
    got, _ = reader.read(l0((990, 1090), (1990, 2090)), (100, 100), 0)
    assert got.shape == (3, 100, 100)
    assert (got[:, 10:, 10:] == 77).all()
    assert (got[:, :10] == 9).all()
    with pytest.raises(SourceError, match="at most 64 Mpx are read at once"):
        reader.read(l0((0, 60_000), (0, 60_000)), (100, 100), 0)


def write_ome_zarr(
    path: Path,
    levels: list[NDArray[Any]],
    axes: list[dict[str, str]],
    scales: list[list[float]],
    version: str,
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    for i, level in enumerate(levels):
        group.create_array(str(i), data=level, chunks=tuple(min(32, n) for n in level.shape))
    datasets = [
        {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": s}]}
        for i, s in enumerate(scales)
    ]
    multiscales: Any = [{"version": version, "axes": axes, "datasets": datasets}]
    if version == "0.4":
        group.attrs["multiscales"] = multiscales
    else:
        group.attrs["ome"] = {"version": version, "multiscales": multiscales}
    return path


def axis(name: str, unit: str = "micrometer") -> dict[str, str]:
    return (
        {"name": name, "type": "space", "unit": unit}
        if name in "zyx"
        else {"name": name, "type": "channel" if name == "c" else "time"}
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_slide_with_all_its_levels(version: str, tmp_path: Path) -> None:
    full = np.random.default_rng(1).integers(0, 256, (1, 3, 1, 90, 120)).astype(np.uint8)
    path = write_ome_zarr(
        tmp_path / "s.ome.zarr",
        [full, full[..., ::2, ::2]],
        [axis("t"), axis("c"), axis("z"), axis("y"), axis("x", "nanometer")],
        [[1, 1, 1, 0.25, 300], [1, 1, 1, 0.5, 600]],
        version,
    )
    reader = open_image(str(path))
    meta = reader.meta
    assert (meta.kind, meta.channels, meta.shape_l0, meta.stem) == ("slide", 3, (90, 120), "s")
    assert meta.spacing == pytest.approx((0.25, 0.3))
    assert [level.downsample for level in meta.levels] == [(1.0, 1.0), (2.0, 2.0)]
    assert meta.background == 255
    assert np.array_equal(reader.read(l0((10, 60), (20, 70)), (50, 50), 0)[0], full[0, :, 0, 10:60, 20:70])
    assert np.array_equal(
        reader.read(l0((10, 60), (20, 70)), (25, 25), 1)[0], full[0, :, 0, 10:60:2, 20:70:2]
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_volume(version: str, tmp_path: Path) -> None:
    full = np.random.default_rng(1).normal(size=(2, 20, 30, 40)).astype(np.float32)
    path = write_ome_zarr(
        tmp_path / "v.ome.zarr", [full], [axis(a, "millimeter") for a in "czyx"], [[1, 3, 2, 1]], version
    )
    reader = open_image(str(path))
    assert (reader.meta.kind, reader.meta.channels, reader.meta.spacing) == ("volume", 2, (3, 2, 1))
    assert np.asarray(reader.meta.affine).diagonal().tolist() == [1, 2, 3, 1]
    assert reader.meta.background == full.min()
    one = open_image(str(path), ReadOptions(channel=1))
    assert np.array_equal(
        one.read(l0((2, 12), (3, 13), (4, 14)), (10, 10, 10), 0)[0], full[1:, 2:12, 3:13, 4:14]
    )


def test_ome_zarr_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    full = np.zeros((64, 64), np.uint8)
    axes = [axis("y"), axis("x")]
    wrong = write_ome_zarr(tmp_path / "w.zarr", [full, full[::2, ::2]], axes, [[1, 1], [4, 4]], "0.5")
    with pytest.raises(SourceError, match="does not fit"):
        open_image(str(wrong))
    unitless = write_ome_zarr(tmp_path / "u.zarr", [full], [{"name": "y"}, {"name": "x"}], [[1, 1]], "0.5")
    with pytest.raises(SourceError, match="--mpp"):
        open_image(str(unitless))
    assert open_image(str(unitless), MPP).meta.spacing == (0.5, 0.5)
    times = write_ome_zarr(
        tmp_path / "t.zarr", [np.zeros((3, 8, 8), np.uint8)], [axis("t"), *axes], [[1, 1, 1]], "0.5"
    )
    with pytest.raises(SourceError, match=r"--time 0\.\.2"):
        open_image(str(times))
    zarr.open_group(tmp_path / "g.zarr", mode="w")
    with pytest.raises(SourceError, match="without OME-Zarr"):
        open_image(str(tmp_path / "g.zarr"))


def test_a_damaged_chunk_fails_the_reads_that_need_it_only(tmp_path: Path) -> None:
    full = np.random.default_rng(1).integers(0, 256, (64, 64)).astype(np.uint8)
    path = write_ome_zarr(tmp_path / "d.zarr", [full], [axis("y"), axis("x")], [[1, 1]], "0.5")
    (path / "0" / "c" / "1" / "1").write_bytes(b"garbage")
    reader = open_image(str(path))
    assert np.array_equal(reader.read(l0((0, 32), (0, 64)), (32, 64), 0)[0][0], full[:32])
    with pytest.raises(SourceError, match="chunk is damaged"):
        reader.read(l0((40, 50), (40, 50)), (10, 10), 0)


def test_equal_content_is_one_identity_whatever_the_path(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.uint8).reshape(10, 10)
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array)
    np.save(tmp_path / "c.npy", array + 1)
    a, b, c = (identity_of(str(tmp_path / f"{n}.npy")) for n in "abc")
    assert a == b != c
    big = np.zeros(9 << 20, np.uint8)
    big.tofile(tmp_path / "big1.bin")
    big[-1] = 1
    big.tofile(tmp_path / "big2.bin")
    assert identity_of(str(tmp_path / "big1.bin")) != identity_of(str(tmp_path / "big2.bin"))
