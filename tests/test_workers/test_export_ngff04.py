"""The 8-bit OME-Zarr 0.4: what an old reader needs of it, and what its codes mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ome_types
import pytest
import yaozarrs
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v04.image import Image as Image04

from tests.test_workers.made_exports import heat_grid, made_context
from tests.test_workers.made_heatmaps import SIGNED, UNSIGNED
from workers.export import ngff04
from workers.export.context import ExportContext
from workers.export.targets import EXPORTS, run_export
from workers.stitching import grid as grids

SLIDE = "procedural:slide?width=2411&height=1803&seed=1"
VOLUME = "procedural:volume?shape=20,33,41&seed=1"
HOT = {2: (100, 31), 3: (4, 7, 9)}


@pytest.fixture
def context(tmp_path: Path, request: pytest.FixtureRequest) -> ExportContext:
    """Two channels, signed and not; blocks of 64 px, so that there are many."""
    uri, downsample, ndim = request.param
    shape = {SLIDE: (1803, 2411), VOLUME: (20, 33, 41)}[uri]
    values = np.random.default_rng(0).uniform(-1, 1, (2, *heat_grid(shape, downsample))).astype(np.float32)
    values[1] = abs(values[1])
    values[:, :3] = np.nan
    at: tuple[Any, ...] = (slice(None), *HOT[ndim])
    values[at] = 9
    values[0, 3, 3] = 0
    with patch.dict(grids.CHUNK, {2: 64, 3: 8}), patch.dict(grids.SHARD, {2: 128, 3: 16}):
        return made_context(tmp_path / "image", uri, downsample, values, channels=[SIGNED, UNSIGNED])


BOTH = pytest.mark.parametrize(
    "context", [(SLIDE, 8, 2), (VOLUME, 2, 3)], ids=["slide", "volume"], indirect=True
)


@BOTH
def test_codes_give_the_raw_values_back(context: ExportContext) -> None:
    sizes = []
    coded = ngff04.coded

    def counted(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
        sizes.append(values.size)
        return coded(values, window)

    with patch.object(ngff04, "coded", counted):
        run_export(EXPORTS["ngff04"], context)
    assert max(sizes) <= max(np.prod(shard) for shard in context.info.grid.shards)
    group = zarr.open_group(context.folder / "export/heatmap.ngff04.ome.zarr", mode="r")
    said: Any = group.attrs["gigacam"]
    assert said["intended_use"].startswith("For research use only")
    assert said["run_id"] == context.info.run_id
    for level in range(len(context.info.grid.levels)):
        codes, raw = np.asarray(group[str(level)]), context.heatmap.image(level)[:]
        np.testing.assert_array_equal(codes == 0, np.isnan(raw))
        for c, row in enumerate(said["channels"]):
            scale, offset = row["codes"]["scale"], row["codes"]["offset"]
            low, high = row["codes"]["window"]
            back = offset + scale * (codes[c].astype(float) - 1)
            looked = codes[c] > 0
            expected = np.clip(raw[c], low, high)
            np.testing.assert_allclose(back[looked], expected[looked], atol=0.501 * scale)
    assert np.asarray(group["0"])[0, 3, 3].ravel()[0] == 128, "zero of a signed map is a code of its own"
    assert [row["label"] for row in said["channels"]] == [c.label for c in context.info.channels]


@BOTH
def test_old_readers_can_open_it(context: ExportContext) -> None:
    run_export(EXPORTS["ngff04"], context)
    path = context.folder / "export/heatmap.ngff04.ome.zarr"
    array = json.loads((path / "0/.zarray").read_text())
    assert array["zarr_format"] == 2
    assert (array["compressor"]["id"], array["compressor"]["cname"]) == ("blosc", "lz4")
    assert (array["dimension_separator"], array["fill_value"], array["dtype"]) == ("/", 0, "|u1")
    assert not list(path.rglob("zarr.json"))
    yaozarrs.validate_zarr_store(str(path))
    Image04.from_zarr(zarr.open_group(path, mode="r", zarr_format=2))

    info = context.info
    (node,) = list(Reader(parse_url(path, mode="r"))())
    ndim = len(info.spacing)
    for level, transforms in enumerate(node.metadata["coordinateTransformations"]):
        scale, shift = transforms[0]["scale"][1:], transforms[1]["translation"][1:]
        hot = [h >> level for h in HOT[ndim]]
        assert node.data[level][(0, *hot)].compute() == 255 or level > 0
        place = [s * h + t for s, h, t in zip(scale, hot, shift, strict=True)]
        factor = [d * 2**level for d in info.grid.downsample]
        expected = [(h + 0.5) * f * s - 0.5 * s for h, f, s in zip(hot, factor, info.spacing, strict=True)]
        np.testing.assert_allclose(place, expected)

    (image,) = ome_types.from_xml((path / "OME/METADATA.ome.xml").read_bytes(), validate=True).images
    sizes = dict(zip("zyx"[-ndim:], zip(info.spacing, info.grid.downsample, info.grid.levels[0], strict=True), strict=True))  # fmt: skip
    for axis, (spacing, d, size) in sizes.items():
        assert getattr(image.pixels, f"physical_size_{axis}") == spacing * d
        assert getattr(image.pixels, f"physical_size_{axis}_unit").value == {2: "µm", 3: "mm"}[ndim]
        assert getattr(image.pixels, f"size_{axis}") == size
    assert [c.name for c in image.pixels.channels] == [c.label for c in info.channels]
    assert "For research use only" in str(image.description)
