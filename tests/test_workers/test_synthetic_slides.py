"""Synthetic slides: files OpenSlide opens, truth that lies where it is drawn, foci that match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from schemas.errors import SpecError
from workers.synthetic.slides import SlideTruth, training_tiles, write_slide
from workers.synthetic.tissue import DISTRACTOR, LESION, lay_out, paint, truth_of


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SlideTruth]:
    folder = tmp_path_factory.mktemp("slide")
    slide, truth = folder / "slide.tiff", folder / "slide.truth.tiff"
    return slide, truth, write_slide(slide, truth, size=1024, seed=3, mpp=0.5)


def test_openslide_opens_it_with_levels_and_mpp(written: tuple[Path, Path, SlideTruth]) -> None:
    with openslide.OpenSlide(written[0]) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((1024, 1024), (512, 512))
        assert slide.level_downsamples == (1.0, 2.0)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-6)


def test_pixels_are_those_painted(written: tuple[Path, Path, SlideTruth]) -> None:
    """Through JPEG, OpenSlide gives back what was painted: no swapped channel, tile or axis."""
    painted = np.concatenate([band for _, band, _ in paint(lay_out(1024, 3), 3)]).astype(int)
    with openslide.OpenSlide(written[0]) as slide:
        read = np.asarray(slide.read_region((0, 0), 0, (1024, 1024)).convert("RGB")).astype(int)
        half = np.asarray(slide.read_region((0, 0), 1, (512, 512)).convert("RGB")).astype(int)
    assert np.abs(read - painted).mean() < 4.0
    assert np.abs(read.mean((0, 1)) - painted.mean((0, 1))).max() < 1.0
    means = painted.reshape(512, 2, 512, 2, 3).mean((1, 3))
    assert np.abs(half - means).mean() < 4.0


def test_truth_file_lies_over_the_slide(written: tuple[Path, Path, SlideTruth]) -> None:
    slide, path, truth = written
    with tifffile.TiffFile(path) as tif:
        assert [page.shape for page in tif.pages] == [(1024, 1024), (512, 512)]
        level0 = tif.pages[0]
        assert isinstance(level0, tifffile.TiffPage)
        labels = level0.asarray()
        assert level0.tags["XResolution"].value[0] / level0.tags["XResolution"].value[1] == 20_000
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, DISTRACTOR, LESION}
    rgb = tifffile.imread(slide, key=0)
    purple = rgb[..., 2].astype(int) - rgb[..., 1] > 60  # nuclei: much blue, little green
    for focus in truth.foci:
        y, x = (int(c) for c in focus.centre_px)
        assert labels[y, x] == focus.kind
    # foci hold several times the nuclei of other tissue, so a shifted truth would show
    tissue = rgb.min(axis=2) < 225
    dark = rgb[..., 0] < 150
    assert dark[labels > 0].mean() > 2.5 * dark[(labels == 0) & tissue].mean()
    assert purple.any()


def test_truth_mean_and_sd_of_both_kinds_match(written: tuple[Path, Path, SlideTruth]) -> None:
    """The figures reported are those of the pixels, and the kinds cannot be told apart by them."""
    truth = written[2]
    bands = list(paint(lay_out(1024, 3), 3))
    grey = np.concatenate([rgb for _, rgb, _ in bands]).mean(axis=2)
    labels = np.concatenate([band for _, _, band in bands])
    assert truth.lesion_mean == pytest.approx(grey[labels == LESION].mean(), abs=1e-6)
    assert truth.distractor_sd == pytest.approx(grey[labels == DISTRACTOR].std(), abs=1e-6)
    assert abs(truth.lesion_mean - truth.distractor_mean) < 2.0
    assert abs(truth.lesion_sd - truth.distractor_sd) < 1.0


def test_nuclei_rise_in_lesions_and_fall_in_distractors() -> None:
    """Structure tensor of the drawn pixels: the long axis is perpendicular to the mean gradient."""
    bands = list(paint(lay_out(1024, 5), 5))
    grey = np.concatenate([rgb for _, rgb, _ in bands]).mean(axis=2)
    labels = np.concatenate([band for _, _, band in bands])
    gy, gx = np.gradient(grey)
    for kind, direction_deg in ((LESION, 45.0), (DISTRACTOR, -45.0)):
        inside = labels == kind
        xx, yy, xy = (np.mean(a[inside]) for a in (gx * gx, gy * gy, gx * gy))
        gradient = 0.5 * np.arctan2(2 * xy, xx - yy)  # y down
        axis_deg = (-np.degrees(gradient + np.pi / 2) + 90.0) % 180.0 - 90.0
        assert axis_deg == pytest.approx(direction_deg, abs=6.0)


def test_tissue_covers_what_it_says() -> None:
    bands = [rgb for _, rgb, _ in paint(lay_out(2048, 1), 1)]
    tissue = np.concatenate(bands).min(axis=2) < 225
    assert 0.36 < tissue.mean() < 0.5


def test_seeds_reproduce_and_differ() -> None:
    def pixels(seed: int) -> np.ndarray:
        return next(paint(lay_out(1024, seed), seed))[1]

    np.testing.assert_array_equal(pixels(1), pixels(1))
    assert (pixels(1) != pixels(2)).mean() > 0.2


def test_truth_of_a_band_is_that_of_the_whole() -> None:
    foci = lay_out(1024, 2).foci
    whole = truth_of(foci, 1024, 0, 1024)
    parts = [truth_of(foci, 1024, y, y + 256) for y in range(0, 1024, 256)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert sum(f.kind == LESION for f in foci) == sum(f.kind == DISTRACTOR for f in foci) == 2


def test_full_size_layout_holds_six_of_each_kind() -> None:
    foci = lay_out(4096, 1).foci
    assert sorted(f.radius_px for f in foci if f.kind == LESION) == sorted(
        f.radius_px for f in foci if f.kind == DISTRACTOR
    )
    assert len(foci) == 12
    assert {min(f.radius_px for f in foci), max(f.radius_px for f in foci)} == {100.0, 450.0}


@pytest.mark.parametrize("size", [512, 1000, 1100])
def test_size_that_cannot_be_drawn_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"size is {size} px; expected a multiple of 256"):
        write_slide(tmp_path / "a.tiff", tmp_path / "b.tiff", size=size, seed=1)
    assert not list(tmp_path.iterdir())


def test_training_tiles_are_labelled_and_balanced() -> None:
    x, y, mask = training_tiles(90, 128, 1, slide_px=1024)
    assert x.shape == (90, 3, 128, 128)
    assert x.dtype == np.uint8
    assert y.shape == mask.shape == (90, 2)
    assert 0.2 < y[:, 0].mean() < 0.6
    assert 0.2 < y[:, 1].mean() < 0.6
    assert mask.mean() > 0.85
    assert (y[~mask] == 0).all()
