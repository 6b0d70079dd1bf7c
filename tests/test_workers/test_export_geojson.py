"""GeoJSON, read by geopandas and shapely."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from schemas.errors import SpecError
from tests.test_workers.finished_runs import (
    COLD,
    DOWNSAMPLE,
    FAILED,
    HOT_L0,
    PX_UM,
    RING,
    SHAPE,
    exported,
    planted,
)
from workers.export.outlines import regions, rings
from workers.export.words import INTENDED_USE


def read(slide_run: Path, **options: object) -> tuple[dict[str, Any], gpd.GeoDataFrame]:
    (path,) = exported(slide_run, "geojson", **options)
    document = json.loads(path.read_text())
    return document, gpd.GeoDataFrame.from_features(document["features"])


@settings(max_examples=80)
@given(arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))))
def test_outlines_are_valid_and_cover_exactly_the_region(mask: np.ndarray) -> None:
    labels, count = ndimage.label(mask)
    for index in range(1, count + 1):
        region = labels == index
        outer, *holes = rings(region)
        polygon = shapely.Polygon(outer[:, ::-1], [hole[:, ::-1] for hole in holes])
        assert polygon.is_valid, shapely.is_valid_reason(polygon)
        boxes = shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(region)])
        assert polygon.symmetric_difference(boxes).area == 0
        assert polygon.exterior.is_ccw
        assert all(not hole.is_ccw for hole in polygon.interiors)


def test_the_strongest_regions_are_kept() -> None:
    values = np.zeros((9, 9), np.float32)
    values[1, 1], values[1, 4], values[4:6, 4] = 3, -7, 5
    count, kept = regions(values != 0, values, 2)
    first, second = kept
    assert count == 3
    assert (first.extreme, first.pixels, first.extreme_at) == (-7, 1, (1, 4))
    assert (second.mean, second.pixels) == (5, 2)


def test_planted_regions_are_found_at_their_place_with_their_size(slide_run: Path) -> None:
    document, frame = read(slide_run, threshold=4)
    annotations = frame[frame.objectType == "annotation"]
    assert annotations.geometry.is_valid.all()
    assert {d["name"] for d in annotations.classification} == {
        "hirescam:tumour", "against hirescam:tumour", "layercam:tumour",
    }  # fmt: skip
    by_name = annotations.set_index("name")
    hot = by_name.loc["hirescam:tumour 1"]
    y, x = HOT_L0
    assert hot.geometry.equals(shapely.box(x - 4, y - 4, x + 4, y + 4))
    assert hot.area_um2 == pytest.approx(PX_UM[0] * PX_UM[1])
    assert (hot.max_value, hot.mean_value, hot.unit) == (100, 100, "logit")
    assert (hot.measurements["max x l0"], hot.measurements["max y l0"]) == (x, y)
    ring = by_name.loc["hirescam:tumour 2"]
    (hole,) = ring.geometry.interiors
    centre = shapely.Point((RING[1] + 0.5) * DOWNSAMPLE, (RING[0] + 0.5) * DOWNSAMPLE)
    assert shapely.Polygon(hole).contains(centre)
    assert not ring.geometry.contains(centre)
    pixels = int((planted()[0] == 5).sum())
    assert ring.geometry.area == pixels * DOWNSAMPLE**2
    assert ring.area_um2 == pytest.approx(pixels * PX_UM[0] * PX_UM[1])
    cold = by_name.loc["against hirescam:tumour 1"]
    assert cold.geometry.bounds == tuple(DOWNSAMPLE * v for v in (COLD[1], COLD[0], COLD[1] + 3, COLD[0] + 2))
    assert (cold.max_value, cold.threshold) == (-60, -4)
    said = document["gigacam"]
    assert said["intended_use"] == INTENDED_USE
    assert said["run_id"] == "1" * 64
    assert "1 of 192 tiles failed" in said["missing"]
    assert hot.metadata["intended use"] == INTENDED_USE


def test_tiles_are_detections_with_their_numbers(slide_run: Path) -> None:
    _, frame = read(slide_run)
    tiles = frame[frame.objectType == "detection"]
    assert len(tiles) == 192 - 1
    assert f"tile {FAILED}" not in set(tiles.name)
    bounds = tiles.total_bounds
    assert bounds.tolist() == [0, 0, SHAPE[1], SHAPE[0]]
    numbers = tiles.iloc[0].measurements
    assert {"score tumour", "hirescam:tumour mean [logit]", "layercam:tumour max [no unit]"} < set(numbers)
    assert all(isinstance(v, int | float) for v in numbers.values())


def test_nothing_reaches_past_the_slide(slide_run: Path) -> None:
    """The heatmap's last px does: its grid is rounded up."""
    _, frame = read(slide_run, threshold=1e-9, max_regions=50)
    assert (frame.total_bounds <= [SHAPE[1], SHAPE[0], SHAPE[1], SHAPE[0]]).all()


def test_what_was_cut_is_said(slide_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gigacam"):
        document, frame = read(slide_run, threshold=4, max_regions=1)
    kept = {k["what"]: (k["kept"], k["found"]) for k in document["gigacam"]["kept"]}
    assert kept == {
        "regions of hirescam:tumour": (1, 2),
        "regions of against hirescam:tumour": (1, 1),
        "regions of layercam:tumour": (1, 3),
        "tiles": (1, 191),
    }
    assert len(frame) == 4
    assert "of 191 tiles the 1 strongest" in caplog.text


def test_the_default_threshold_is_recorded_and_objects_keep_their_identity(slide_run: Path) -> None:
    document, frame = read(slide_run)
    rules = set(frame[frame.objectType == "annotation"].threshold_rule)
    assert rules <= {
        "half the display window's end, which is the 99.5 % quantile of |value|",
        "middle of the display window, whose end is the 99.5 % quantile",
    }
    assert rules
    identities = [f["id"] for f in document["features"]]
    assert len(set(identities)) == len(identities)
    again, _ = read(slide_run)
    assert [f["id"] for f in again["features"]] == identities


@pytest.mark.parametrize("threshold", [0, -1])
def test_a_signed_map_needs_a_threshold_above_zero(slide_run: Path, threshold: float) -> None:
    with pytest.raises(SpecError, match="is signed, its threshold is a magnitude"):
        exported(slide_run, "geojson", threshold=threshold)
