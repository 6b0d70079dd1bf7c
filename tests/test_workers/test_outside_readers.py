"""The master heatmap as readers that are not ours see it: a planted px lies where it was planted, in their own units."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

from schemas.image import ImageMeta, LevelMeta
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED, made_heatmap
from workers.stitching import grid as grids
from workers.store.heatmap import HeatmapStore

CASES: dict[str, tuple[tuple[int, ...], tuple[float, ...], int, tuple[int, ...]]] = {
    "slide": ((803, 613), (0.5, 0.25), 8, (40, 21)),
    "volume": ((40, 33, 27), (3.0, 1.5, 1.0), 2, (7, 4, 9)),
}


@pytest.fixture(params=CASES, scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[HeatmapStore, tuple[int, ...]]:
    shape, spacing, downsample, hot = CASES[request.param]
    meta = ImageMeta(
        uri="made", stem="made", identity="a" * 64, kind=request.param, format="array", channels=1, dtype="uint8",
        levels=(LevelMeta(shape=shape, downsample=(1.0,) * len(shape)),), spacing=spacing, spacing_source="test",
    )  # fmt: skip
    values = np.zeros((2, *(-(-n // downsample) for n in shape)), np.float32)
    at: tuple[Any, ...] = (slice(None), *hot)
    values[at] = 7
    values[:, -1] = np.nan
    with patch.dict(grids.CHUNK, {2: 32, 3: 8}), patch.dict(grids.SHARD, {2: 64, 3: 16}):
        path = tmp_path_factory.mktemp("made") / "h.ome.zarr"
        return made_heatmap(path, meta, downsample, values, channels=[SIGNED, UNSIGNED]), hot


def centre(store: HeatmapStore, hot: tuple[int, ...], level: int) -> list[float]:
    """Of the level's px that holds the planted one; the centre of level-0 px 0 is the origin."""
    info = store.info
    factors = [d * 2**level for d in info.grid.downsample]
    return [
        ((h >> level) + 0.5) * f * s - 0.5 * s for h, f, s in zip(hot, factors, info.spacing, strict=True)
    ]


def test_ome_zarr_py(made: tuple[HeatmapStore, tuple[int, ...]]) -> None:
    store, hot = made
    node, *labels = list(Reader(parse_url(store.path, mode="r"))())
    info = store.info
    assert [level.shape[1:] for level in node.data] == [tuple(n) for n in info.grid.levels]
    units = [axis.get("unit") for axis in node.metadata["axes"]]
    assert units == [None] + [{"um": "micrometer", "mm": "millimeter"}[info.spacing_unit]] * len(hot)
    for level, (array, transforms) in enumerate(
        zip(node.data, node.metadata["coordinateTransformations"], strict=True)
    ):
        found = np.argwhere(np.asarray(array)[0] > 0)
        assert len(found) == 1
        scale, shift = transforms[0]["scale"][1:], transforms[1]["translation"][1:]
        np.testing.assert_allclose(found[0] * scale + shift, centre(store, hot, level))
        np.testing.assert_array_equal(np.asarray(array), store.image(level)[:])
    assert node.metadata["contrast_limits"] == [list(w) for w in info.display]
    assert any("labels/coverage" in str(label) for label in labels)


@pytest.mark.filterwarnings("ignore")  # napari's own
def test_napari_ome_zarr(made: tuple[HeatmapStore, tuple[int, ...]]) -> None:
    plugin = pytest.importorskip("napari_ome_zarr", reason="a plugin of napari, an optional extra")
    store, hot = made
    image, coverage = plugin.napari_get_reader(str(store.path))(str(store.path))
    data, arguments, kind = image
    assert (kind, coverage[2]) == ("image", "labels")
    index = np.argwhere(np.asarray(data[0][0]) > 0)[0]
    assert tuple(index) == hot
    # The plugin drops the translation of level 0 (0.10): its pixels lie half a heatmap px less half a source px off.
    info = store.info
    dropped = [s * (d - 1) / 2 for s, d in zip(info.spacing, info.grid.downsample, strict=True)]
    placed = np.asarray(arguments["scale"])[-len(hot) :] * index
    np.testing.assert_allclose(placed + dropped, centre(store, hot, 0))
    assert arguments["contrast_limits"] == [list(w) for w in info.display]
    assert arguments["name"] == [f"test: {c.label}" for c in info.channels]
