"""Damaged files: a reader says so by SourceError, whatever its library raised."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.readers import open_image

DATA = Path(__file__).parents[1] / "data"
OPTIONS = ReadOptions(mpp_um=1.0, spacing_mm=(1.0, 1.0, 1.0))


def noise(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def tiff(path: Path, compression: str) -> Path:
    target = path / f"{compression}.ome.tiff"
    tifffile.imwrite(
        target, noise(128, 160, 3), tile=(64, 64), compression=compression, photometric="rgb", metadata={}
    )
    return target


def picture(path: Path) -> Path:
    Image.fromarray(noise(60, 70, 3)).save(path / "p.jpg")
    return path / "p.jpg"


def plain_zarr(path: Path) -> Path:
    zarr.create_array(path / "plain.zarr", data=noise(20, 30, 40), chunks=(10, 10, 20))
    return path / "plain.zarr"


def array(path: Path) -> Path:
    np.save(path / "a.npy", noise(10, 15, 20))
    return path / "a.npy"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "nifti.gz": lambda _: DATA / "totalseg_ct_3mm_slab30_labels.nii.gz",
    "nifti": lambda _: DATA / "nibabel_anatomical_bigendian.nii",
    "svs": lambda _: DATA / "small_16x16.svs",
    "generic tiff": lambda _: DATA / "boxes_4levels.tiff",
    "dicom slide": lambda _: DATA / "sm_image_50x50.dcm",
    "dicom series": lambda _: DATA / "dicom_ct_series",
    "lzw": lambda path: tiff(path, "lzw"),
    "zlib": lambda path: tiff(path, "zlib"),
    "zstd": lambda path: tiff(path, "zstd"),
    "jpeg": picture,
    "npy": array,
    "zarr": plain_zarr,
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut short, or with a few bytes changed: most of them in the header."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        out[rng.randrange(min(len(out), 2000) if rng.random() < 0.6 else len(out))] = rng.randrange(256)
    return bytes(out)


def read_all(path: Path) -> None:
    reader = open_image(str(path), OPTIONS)
    shape = tuple(min(n, 200) for n in reader.meta.shape_l0)
    for level in range(len(reader.meta.levels)):
        reader.read(Box(frame="l0", start=(0,) * len(shape), stop=shape), shape, level)
    reader.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_damage_is_a_source_error_or_not_to_be_seen(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path)
    read_all(source)
    rng = random.Random(kind)
    refused: list[tuple[str, str]] = []
    for i in range(25):
        copy = tmp_path / f"copy{i}" / source.name
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            copy.parent.mkdir()
            shutil.copy(source, copy)
        target = rng.choice(sorted(p for p in copy.rglob("*") if p.is_file())) if copy.is_dir() else copy
        target.write_bytes(damaged(target.read_bytes(), rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of what they then refuse
            try:
                read_all(copy)
            except SourceError as error:
                refused.append((copy.name, error.message))
    assert refused
    assert all(name in message for name, message in refused)


def test_a_damaged_chunk_of_a_plain_array_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain_zarr(tmp_path)
    chunk = path / "c" / "1" / "2" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"plain.zarr: level 0 cannot be read at .*a chunk is damaged"):
        open_image(str(path), OPTIONS)
    monkeypatch.setattr("workers.readers.ngff.WHOLE_IMAGE_LIMIT_PX", 1000)
    reader = open_image(str(path), OPTIONS)
    with pytest.raises(SourceError, match=r"level 0 cannot be read at \[10:20, 20:30, 20:40\]"):
        reader.read(Box(frame="l0", start=(10, 20, 20), stop=(20, 30, 40)), (10, 10, 20), 0)
    pixels, _ = reader.read(Box(frame="l0", start=(0, 0, 0), stop=(10, 10, 20)), (10, 10, 20), 0)
    assert np.array_equal(pixels[0], noise(20, 30, 40)[:10, :10, :20])
