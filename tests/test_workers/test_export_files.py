"""Exports as text and pictures, and the one function that writes them all."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from schemas.errors import SourceError, SpecError, StoreError
from schemas.export import ExportOptions
from schemas.run import ImageReport
from tests.test_workers.finished_runs import (
    DOWNSAMPLE,
    FAILED,
    HOT,
    HOT_L0,
    SHAPE,
    exported,
    planted,
)
from tests.test_workers.made_heatmaps import made_heatmap
from tests.test_workers.store_samples import map_grid, shifted_boxes, tiles_info
from workers.export.context import ExportContext, image_folders
from workers.export.qupath import quoted
from workers.export.targets import EXPORTS, Export, resolve, run_export
from workers.export.words import INTENDED_USE
from workers.readers import open_image
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore

DATA = Path(__file__).parents[1] / "data"


# --- csv ---------------------------------------------------------------------------------------------------------------


def test_the_tile_table_says_what_the_store_says(slide_run: Path) -> None:
    (path,) = exported(slide_run, "csv")
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    tiles = TilesStore.open(slide_run / "tiles.zarr")
    assert len(rows) == tiles.info.tiles == 192
    assert {r["intended_use"] for r in rows} == {INTENDED_USE}
    assert {r["run_id"] for r in rows} == {"1" * 64}
    box = np.array([[[int(r[f"{a}{i}_l0"]) for a in "yx"] for i in (0, 1)] for r in rows])
    np.testing.assert_array_equal(box, tiles.boxes())
    centre = np.array([[float(r["centre_y_um"]), float(r["centre_x_um"])] for r in rows])
    np.testing.assert_allclose(centre, tiles.boxes().mean(axis=1) * (0.5, 0.25), atol=1e-4)
    assert [r["status"] for r in rows] == ["failed" if n == FAILED else "done" for n in range(192)]
    assert rows[FAILED]["hirescam:tumour mean [logit]"] == "" == rows[FAILED]["score tumour"]
    every = np.arange(192)
    for name, of in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        maps = tiles.maps_of("layercam", 0, every).reshape(192, -1)
        found = [float(r[f"layercam:tumour {name} [no unit]"] or "nan") for r in rows]
        np.testing.assert_array_equal(np.array(found, np.float32), of(maps, axis=1))
    np.testing.assert_array_equal(
        np.array([float(r["score rest"] or "nan") for r in rows], np.float32), tiles.scores()[:, 1]
    )


# --- large_image -------------------------------------------------------------------------------------------------------


def test_the_annotation_is_one_for_the_archive_and_lies_on_the_slide(slide_run: Path) -> None:
    (path,) = exported(slide_run, "large_image")
    annotation = json.loads(path.read_text())
    schema = json.loads((DATA / "large_image_annotation.schema.json").read_text())
    short = [e | {"values": e["values"][:1000]} for e in annotation["elements"]]  # as the archive itself does
    jsonschema.Draft6Validator(schema).validate(annotation | {"elements": short})
    assert all(len(e["values"]) % e["gridWidth"] == 0 for e in annotation["elements"])
    assert INTENDED_USE in annotation["description"]
    elements = {e["label"]["value"]: e for e in annotation["elements"]}
    assert list(elements) == [
        "hirescam:tumour [logit]", "against hirescam:tumour [logit]", "layercam:tumour [no unit]",
    ]  # fmt: skip
    grid = elements["hirescam:tumour [logit]"]
    values = np.array(grid["values"]).reshape(-1, grid["gridWidth"])
    hot = np.array(np.unravel_index(values.argmax(), values.shape))
    at = hot * (grid["dy"], grid["dx"]) + grid["origin"][1::-1]
    px = grid["dx"]
    assert px > DOWNSAMPLE
    assert (np.abs(at - HOT_L0) <= px / 2).all()
    nan = np.isnan(planted()[0])
    coarse = nan[: nan.shape[0] // 8 * 8, : nan.shape[1] // 8 * 8]
    step = px // DOWNSAMPLE
    empty = coarse.reshape(coarse.shape[0] // step, step, -1, step).all(axis=(1, 3))
    assert (values[: empty.shape[0], : empty.shape[1]][empty] == -1).all()
    assert (values >= -1).all()
    assert grid["user"]["no_value"] == -1


# --- qupath ------------------------------------------------------------------------------------------------------------


def test_the_script_holds_registration_colours_and_windows(slide_run: Path) -> None:
    context = ExportContext.open(slide_run, ExportOptions())
    for row in resolve(["qupath"]):
        (path,) = run_export(row, context)
    assert [row.name for row in resolve(["qupath"])] == ["ome-tiff", "qupath"]
    script = path.read_text()
    assert f"new File({quoted(str((slide_run / 'export' / 'heatmap.ome.tif').resolve()))})" in script
    assert (slide_run / "export" / "heatmap.ome.tif").exists()
    assert f"int slideWidth = {SHAPE[1]}, slideHeight = {SHAPE[0]}" in script
    assert "double downX = 8, downY = 8" in script
    assert "it was not run there" in script
    assert INTENDED_USE in script
    assert f"println {quoted(INTENDED_USE)}" in script
    low, high = context.info.display[0]
    assert f"[{low!r}d, {high!r}d]" in script
    assert len(re.findall(r"0x[0-9a-f]{6}", script)) == 512
    assert script.count("{") == script.count("}")
    labels = ", ".join(quoted(channel.label) for channel in context.info.channels)
    assert f"def channels = [{labels}]" in script
    assert script.index("if (found != channels)") < script.index("readRegion")
    with tifffile.TiffFile(slide_run / "export" / "heatmap.ome.tif") as tif:
        described = tifffile.xml2dict(tif.ome_metadata or "")["OME"]["Image"]["Pixels"]["Channel"]
    assert [row["Name"] for row in described] == [channel.label for channel in context.info.channels]
    assert script.isascii()


@given(st.text())
def test_a_groovy_string_is_the_text_and_nothing_else(text: str) -> None:
    """Read back by the rules of a single-quoted Groovy string."""
    body = quoted(text)[1:-1]
    assert body.isascii()
    assert body.isprintable()
    units = []
    at = 0
    while at < len(body):
        if body[at] != "\\":
            assert body[at] != "'"
            units.append(ord(body[at]))
            at += 1
        elif body[at + 1] == "u":
            units.append(int(body[at + 2 : at + 6], 16))
            at += 6
        else:
            units.append(ord(body[at + 1]))
            at += 2
    raw = b"".join(u.to_bytes(2, "little") for u in units)
    assert raw.decode("utf-16-le", "surrogatepass") == text


# --- png ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run whose source is there, without `tiles.zarr`."""
    pixels = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    slide = tmp_path / "slide.tiff"
    tifffile.imwrite(slide, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", photometric="rgb")
    reader = open_image(str(slide))
    meta = reader.meta
    reader.close()
    values = np.random.default_rng(1).normal(size=(2, 23, 30)).astype(np.float32)
    folder = tmp_path / "out" / "slide-0"
    made_heatmap(folder / "heatmap.ome.zarr", meta, 8, values)
    provenance = {"image": meta.model_dump(mode="json")}
    report = ImageReport(image=str(slide), status="complete", provenance=provenance)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


def test_the_figure_is_for_print_and_needs_the_source(small: Path) -> None:
    (path,) = exported(small, "png", channels=("1",))
    with Image.open(path) as figure:
        assert figure.size[0] > 2500
        assert figure.info["Description"] == INTENDED_USE
    (small.parents[1] / "slide.tiff").unlink()
    with pytest.raises(SourceError, match=r"no such file.*explain it again from there"):
        exported(small, "png")
    # Nothing else does.
    for name in ("ome-tiff", "rgba", "geojson", "large_image"):
        assert exported(small, name)


def test_another_image_in_the_place_of_the_source_is_refused(small: Path) -> None:
    slide = small.parents[1] / "slide.tiff"
    tifffile.imwrite(slide, np.zeros((180, 240, 3), np.uint8), resolution=(20000, 20000),
                     resolutionunit="CENTIMETER", photometric="rgb")  # fmt: skip
    with pytest.raises(SourceError, match="no longer the image"):
        exported(small, "png")


def test_what_needs_tiles_says_so(small: Path) -> None:
    with pytest.raises(StoreError, match=r"tiles\.zarr: is not there"):
        exported(small, "csv")


# --- the mechanism -----------------------------------------------------------------------------------------------------


def test_every_row_has_a_writer_and_a_file_of_its_own() -> None:
    files = [row.file for row in EXPORTS.values()]
    assert len(set(files)) == len(files)
    for name, row in EXPORTS.items():
        assert name == row.name
        assert (Path(__file__).parents[2] / "workers" / "export" / f"{row.module}.py").exists()
        assert set(row.needs) <= set(EXPORTS)


def test_an_unknown_format_is_answered_with_the_known() -> None:
    with pytest.raises(SpecError, match=r"export 'ome-tif': unknown; the formats are .*ome-tiff"):
        resolve(["ome-tif"])


def test_a_failed_export_leaves_the_earlier_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = exported(small, "geojson")
    before = path.read_bytes()
    monkeypatch.setattr("workers.export.geojson.regions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(small, "geojson")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["regions.geojson"]


def test_a_folder_is_replaced_whole(small: Path) -> None:
    first = exported(small, "rgba")
    assert len(first) == 2
    (one,) = exported(small, "rgba", channels=("1",))
    assert [p.name for p in one.parent.iterdir()] == ["1-hirescam-tumour.tif"]


def test_an_incomplete_heatmap_is_exported_only_when_asked_and_says_so(small: Path) -> None:
    heatmap = HeatmapStore.open(small / "heatmap.ome.zarr", "r+")
    heatmap.clear_blocks(np.array([[[0, 0], [8, 8]]]))
    with pytest.raises(StoreError, match=r"not complete yet.*--partial"):
        exported(small, "geojson")
    assert not (small / "export").exists()
    (path,) = exported(small, "geojson", partial=True)
    assert "PARTIAL" in json.loads(path.read_text())["gigacam"]["missing"]


def test_a_volume_has_a_table_of_tiles_and_no_slide_export(tmp_path: Path) -> None:
    boxes = shifted_boxes((8, 8, 8), (4, 4, 4), (4, 4, 4))
    info = tiles_info(boxes, (8, 8, 8), map_grid((4, 4, 4), (1, 1, 1)), methods=("hirescam",))
    TilesStore.create(tmp_path / "v" / "tiles.zarr", info, boxes)
    made_heatmap(tmp_path / "v" / "heatmap.ome.zarr", info.image, 1, np.ones((1, 8, 8, 8), np.float32))
    (table,) = exported(tmp_path / "v", "csv")
    with table.open(newline="") as handle:
        *_, last = csv.DictReader(handle)
    names = [f"{axis}{end}_l0" for end in (0, 1) for axis in "xyz"]
    assert [last[name] for name in names] == ["4"] * 3 + ["8"] * 3
    assert [last[f"centre_{axis}_mm"] for axis in "xyz"] == ["6.0", "9.0", "18.0"]
    assert last["status"] == "pending"
    for name in ("ome-tiff", "geojson", "rgba", "large_image", "qupath"):
        with pytest.raises(SpecError, match=f"a volume has no {name} export; it is for slides"):
            exported(tmp_path / "v", name)


def test_channels_are_chosen_by_name_method_or_index(slide_run: Path) -> None:
    def chosen(*words: str) -> tuple[int, ...]:
        return ExportContext.open(slide_run, ExportOptions(channels=words)).channels

    assert chosen() == (0, 1)
    assert chosen("layercam") == chosen("1") == chosen("layercam:tumour") == (1,)
    assert chosen("1", "hirescam") == (0, 1)
    with pytest.raises(SpecError, match=r"--channel eigencam.*0 hirescam:tumour, 1 layercam:tumour"):
        chosen("eigencam")


def test_folders_of_a_run_are_found(slide_run: Path, tmp_path: Path) -> None:
    assert image_folders(slide_run) == image_folders(slide_run.parent) == [slide_run]
    with pytest.raises(SpecError, match="holds no explained image; give the --out folder"):
        image_folders(tmp_path)
    with pytest.raises(SpecError, match="did you mean"):
        image_folders(slide_run.parent.parent)


def test_a_row_whose_library_is_missing_names_the_extra(
    slide_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Export("x", "X", "x", ("slide",), "no_such_module", extra="dicom")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="highdicom")

    monkeypatch.setattr("workers.export.targets.import_module", missing)
    with pytest.raises(SpecError, match=r"highdicom is not installed.*gigacam\[dicom\]"):
        run_export(row, ExportContext.open(slide_run, ExportOptions()))


def test_the_hot_px_is_where_it_was_planted() -> None:
    """Of the fixture itself."""
    assert np.argwhere(planted()[0] == 100).tolist() == [list(HOT)]
