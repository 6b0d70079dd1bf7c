"""Numbers in, the same numbers out: the whole path on images whose right answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from schemas.heatmap import Coverage, HeatmapSpec
from tests.test_flows.networks import write_convnet_card, write_factory_card
from tests.test_flows.runs import centres_l0, explain, heatmap_of, values_of

pytestmark = pytest.mark.usefixtures("no_pictures")

GRID_SLIDE = "procedural:slide?width=20011&height=15013&downsamples=1,2.001,4.016,8.086&pattern=coordinates"


def corners_and_centre(path: Path, width: int, height: int, side: int) -> str:
    """GeoJSON of five squares."""
    places = [(0, 0), (width, 0), (0, height), (width, height), (width // 2, height // 2)]
    squares = []
    for x, y in places:
        x0, y0 = min(max(x - side // 2, 0), width - side), min(max(y - side // 2, 0), height - side)
        ring = [[x0, y0], [x0 + side, y0], [x0 + side, y0 + side], [x0, y0 + side], [x0, y0]]
        squares.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": squares}))
    return str(path)


@pytest.mark.parametrize("importance", ["flat", "hann", "gaussian"])
def test_a_constant_map_stays_constant_across_seams(tmp_path: Path, importance: str) -> None:
    card = write_factory_card(
        tmp_path / "m",
        "constant_map",
        {},
        "ones",
        ("a", "b"),
        kind="slide",
        channels=3,
        tile=(96, 96),
        mpp=0.5,
    )
    slide = "procedural:slide?width=1237&height=911&tissue=0.5&seed=3"
    spec = HeatmapSpec(importance=importance, downsample=4)
    report = explain(
        slide,
        card,
        tmp_path / "out",
        methods=("hirescam",),
        targets=("a",),
        overlap=0.3,
        tissue="none",
        heatmap=spec,
    )
    heatmap = heatmap_of(report)
    for level in range(len(heatmap.info.grid.levels)):
        finite = values_of(heatmap, level)[heatmap.coverage(level)[:][None] == Coverage.EVALUATED]
        np.testing.assert_allclose(finite, 1.0, rtol=0, atol=1e-6)
    assert np.isfinite(values_of(heatmap)).any()


# A held border value is off by up to half a cell; pixels of several cells average that away, and a pixel whose
# centre lies in the image then lies in it whole at these sizes.
@pytest.mark.parametrize(
    ("mpp", "level", "cell", "downsample"),
    [(1.0005, 1, 2, 32), (2.008, 2, 2, 32), (4.043, 3, 2, 128), (6.0, 3, 2, 128)],
)
def test_every_heatmap_value_is_its_own_place(
    tmp_path: Path, mpp: float, level: int, cell: int, downsample: int
) -> None:
    card = write_factory_card(
        tmp_path / "m", "pooled_channels", {"cell": cell}, "pool", ("x", "y"),
        kind="slide", channels=2, tile=(512, 512), mpp=mpp, scale=(0.0, 1.0),
    )  # fmt: skip
    report = explain(
        GRID_SLIDE, card, tmp_path / "out", methods=("hirescam",), targets=("x", "y"), overlap=0.25, tissue="none",
        heatmap=HeatmapSpec(downsample=downsample),
    )  # fmt: skip
    assert report.images[0].provenance["lattice"]["level"] == level
    heatmap = heatmap_of(report)
    x, y = values_of(heatmap)
    rows, cols = centres_l0(heatmap)
    seen = np.isfinite(x)
    assert np.abs(np.where(seen, x - cols, 0)).max() < 1
    assert np.abs(np.where(seen, y - rows, 0)).max() < 1
    height, width = x.shape
    for row in (0, height // 2, height - 2):
        for col in (0, width // 2, width - 2):
            assert seen[row, col]


def test_every_value_at_level_0_is_its_own_place(tmp_path: Path) -> None:
    card = write_factory_card(
        tmp_path / "m", "pooled_channels", {"cell": 2}, "pool", ("x", "y"),
        kind="slide", channels=2, tile=(128, 128), mpp=0.5, scale=(0.0, 1.0),
    )  # fmt: skip
    report = explain(
        GRID_SLIDE, card, tmp_path / "out", methods=("hirescam",), targets=("x", "y"), overlap=0.25, tissue="none",
        region=corners_and_centre(tmp_path / "five.geojson", 20011, 15013, 200), heatmap=HeatmapSpec(downsample=4),
    )  # fmt: skip
    heatmap = heatmap_of(report)
    rows, cols = centres_l0(heatmap)
    for channel, place in enumerate((cols, rows)):
        values = heatmap.image(0)[channel]
        seen = np.isfinite(values)
        assert seen.sum() > 5 * 50 * 50
        assert np.abs(np.where(seen, values - place, 0)).max() <= 1.0
        assert seen[0, 0]
        assert seen[-2, -2]


def test_a_volume_comes_back_at_its_own_place(tmp_path: Path) -> None:
    card = write_factory_card(
        tmp_path / "m", "pooled_channels", {"cell": 2, "ndim": 3}, "pool", ("x", "y", "z"),
        kind="volume", channels=3, tile=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0), scale=(0.0, 1.0),
    )  # fmt: skip
    volume = "procedural:volume?shape=41,53,67&spacing=1,1,1&pattern=coordinates"
    report = explain(
        volume,
        card,
        tmp_path / "out",
        methods=("hirescam",),
        targets=("x", "y", "z"),
        overlap=0.5,
        tissue="none",
    )
    heatmap = heatmap_of(report)
    assert heatmap.info.grid.levels[0] == (41, 53, 67)
    depth, rows, cols = centres_l0(heatmap)
    for channel, place in enumerate((cols, rows, depth)):
        values = heatmap.image(0)[channel]
        assert np.isfinite(values).all()
        assert np.abs(values - place).max() <= 1.0


def test_finite_is_coverage_1_at_every_level_and_channel(tmp_path: Path) -> None:
    card = write_convnet_card(tmp_path / "m", "slide", tile=(64, 64), mpp=1.0)
    slide = "procedural:slide?width=5003&height=4001&tissue=0.3&seed=2"
    report = explain(
        slide, card, tmp_path / "out", methods=("gradcam", "eigencam"), heatmap=HeatmapSpec(downsample=2)
    )
    heatmap = heatmap_of(report)
    codes = {int(c) for c in np.unique(heatmap.coverage(0)[:])}
    assert codes == {Coverage.EVALUATED, Coverage.BACKGROUND, Coverage.OUTSIDE}
    for level in range(len(heatmap.info.grid.levels)):
        evaluated = heatmap.coverage(level)[:] == Coverage.EVALUATED
        arrays = [heatmap.image(level)[:]] + ([heatmap.peak(level)[:]] if level else [])
        for array in arrays:
            for channel in array:
                np.testing.assert_array_equal(np.isfinite(channel), evaluated)
