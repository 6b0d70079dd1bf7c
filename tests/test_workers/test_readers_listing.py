"""From what a user names to a list of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from schemas.errors import SpecError
from schemas.image import ReadOptions
from workers.readers import expand

DATA = Path(__file__).parents[1] / "data"


def names(uris: list[str]) -> list[str]:
    return [Path(image.uri).name for image in expand(uris)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "case" / "deep").mkdir(parents=True)
    (root / "b.tiff").write_bytes(b"")
    (root / "a.svs").write_bytes(b"")
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.svs").write_bytes(b"")
    (root / "case" / "deep" / "v.nii.gz").write_bytes(b"")
    shutil.copytree(DATA / "dicom_ct_series", root / "ct")
    zarr.open_group(root / "z.ome.zarr", mode="w").create_array("0", data=np.zeros((2, 2)))
    (root / "m.mrxs").write_bytes(b"")
    (root / "m").mkdir()
    (root / "m" / "Slidedat.ini").write_text("")
    (root / "m" / "Data0000.jpg").write_bytes(b"")
    return root


def test_a_folder_is_searched_and_what_is_one_image_stays_one(folder: Path) -> None:
    assert names([str(folder)]) == ["a.svs", "b.tiff", "v.nii.gz", "ct", "m.mrxs", "z.ome.zarr"]


def test_folders_that_are_images(folder: Path) -> None:
    assert names([str(folder / "ct")]) == ["ct"]
    assert names([str(folder / "z.ome.zarr")]) == ["z.ome.zarr"]
    assert names([str(folder / "m")]) == ["m.mrxs"]


def test_series_among_other_files_are_named_by_their_first_file(folder: Path) -> None:
    (folder / "ct" / "extra.svs").write_bytes(b"")
    assert names([str(folder / "ct")]) == ["IMG0001.dcm", "extra.svs"]


def test_dicom_slides_are_one_image_a_series(tmp_path: Path) -> None:
    for name in ("sm_image_50x50.dcm", "camelyon_lowres_multiframe.dcm"):
        shutil.copy(DATA / name, tmp_path / name)
    assert names([str(tmp_path)]) == ["camelyon_lowres_multiframe.dcm", "sm_image_50x50.dcm"]


def test_globs_and_plain_names_in_order(folder: Path) -> None:
    missing = str(folder / "missing.svs")
    assert names([str(folder / "*.tiff"), missing, str(folder / "a.svs")]) == [
        "b.tiff",
        "missing.svs",
        "a.svs",
    ]
    assert names([str(folder / "**" / "*.nii.gz")]) == ["v.nii.gz"]
    uri = "procedural:slide?width=10&height=10"
    assert [image.uri for image in expand([uri])] == [uri]


def test_a_csv_with_all_columns(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(
        "\ufeffimage, mpp,target,spacing\n"
        "a.svs,0.25,tumour,\n"
        f"{folder / 'b.tiff'},,,\n"
        "case/deep/v.nii.gz,,,3 2 1\n"
        "procedural:slide?width=9&height=9,0.5,,\n",
        encoding="utf-8",
    )
    images = expand([str(table)])
    assert [Path(i.uri).name for i in images[:3]] == ["a.svs", "b.tiff", "v.nii.gz"]
    assert [i.options for i in images] == [
        ReadOptions(mpp_um=0.25), ReadOptions(), ReadOptions(spacing_mm=(3, 2, 1)), ReadOptions(mpp_um=0.5),
    ]  # fmt: skip
    assert [i.target for i in images] == ["tumour", "", "", ""]
    assert images[0].uri == str(folder / "a.svs")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,mpp\na.svs,1\n", "expected image"),
        ("image,colour\na.svs,red\n", "expected image"),
        ("image,mpp\na.svs,half\n", "line 2.*half"),
        ("image,spacing\na.svs,1 2\n", "line 2: spacing has 2 values"),
        ("image,mpp\na.svs\n", "line 2: expected 2 values"),
        ("image\na.svs,1\n", "line 2: expected 1 values"),
        ("image,mpp\n,1\n", "line 2: the column image is empty"),
        ("image\n", "no rows"),
    ],
)
def test_a_csv_that_is_wrong_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SpecError, match=said):
        expand([str(tmp_path / "list.csv")])


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="without any image"):
        expand([str(tmp_path)])
    with pytest.raises(SpecError, match="no file or folder matches"):
        expand([str(tmp_path / "*.svs")])
    with pytest.raises(SpecError, match="cannot be read as CSV"):
        expand([str(tmp_path / "absent.csv")])


@pytest.fixture
def outputs(folder: Path) -> Path:
    """What a run with its `--out` among the inputs leaves there, and a store moved aside by `--fresh`."""
    image = folder / "out" / "a-01234567"
    for name in ("tiles.zarr", "heatmap.ome.zarr", "heatmap.ome.zarr.old-1"):
        zarr.create_group(image / name, zarr_format=3, attributes={"gigacam": {"tiles_id": "0"}})
    (image / "heatmap.nii.gz").write_bytes(b"")
    (image / "overview.png").write_bytes(b"")
    (folder / "out" / "run.json").write_text("{}")
    return image


def test_outputs_among_the_inputs_are_no_input(
    folder: Path, outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = ["a.svs", "b.tiff", "v.nii.gz", "ct", "m.mrxs", "z.ome.zarr"]
    assert names([str(folder)]) == inputs
    assert names([str(folder / "**" / "*.nii.gz")]) == ["v.nii.gz"]
    assert not caplog.messages
    # as a shell spells out `*`, the output folder among the others
    assert names([str(folder / "a.svs"), str(folder / "out"), str(outputs)]) == ["a.svs"]
    assert [m.partition(":")[0] for m in caplog.messages] == [str(folder / "out"), str(outputs)]
    for only in (str(folder / "out"), str(outputs), str(outputs / "*.png")):
        with pytest.raises(SpecError, match="only outputs of gigacam; name such a file or store itself"):
            expand([only])


def test_an_output_named_itself_is_listed(outputs: Path) -> None:
    for name in ("heatmap.ome.zarr", "overview.png"):
        assert names([str(outputs / name)]) == [name]
    shutil.rmtree(outputs / "tiles.zarr")
    shutil.rmtree(outputs / "heatmap.ome.zarr")
    shutil.rmtree(outputs / "heatmap.ome.zarr.old-1")
    assert names([str(outputs)]) == ["heatmap.nii.gz", "overview.png"]  # without a store it is any folder
