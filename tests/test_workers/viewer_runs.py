"""Runs for the viewer, made in a moment, and the viewer on a real server."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from schemas.heatmap import ChannelInfo
from schemas.image import ReadOptions
from schemas.run import Counts, ImageReport, RunReport
from tests.test_workers.made_heatmaps import SIGNED, made_heatmap
from tests.test_workers.store_samples import fill_unit, map_grid, shifted_boxes, tiles_info
from workers.readers import open_image
from workers.stitching import grid as grids
from workers.store.tiles import TilesStore
from workers.viewer.app import http_server
from workers.viewer.pages import Settings

SLIDE = "procedural:slide?width=803&height=613&seed=1&tissue=0.5"
VOLUME = "procedural:volume?shape=20,24,28&spacing=3,1.5,1&seed=2"
CHUNK, SHARD = 64, 128
_SCRATCH = tempfile.TemporaryDirectory()
CHANNELS = (SIGNED, SIGNED.model_copy(update={"target": "rest", "target_index": 0}))


def random_values(shape: Sequence[int], channels: int = 2) -> NDArray[np.float32]:
    """Signed values, a corner of them NaN."""
    values = np.random.default_rng(7).normal(size=(channels, *shape)).astype(np.float32)
    values[:, : shape[0] // 3, ..., : shape[-1] // 2] = np.nan
    return values


def made_run(
    out: Path,
    uri: str = SLIDE,
    downsample: int = 4,
    channels: tuple[ChannelInfo, ...] = CHANNELS,
    finished: bool = True,
    options: ReadOptions | None = None,
) -> Path:
    """The folder of one image as `explain` leaves it: heatmap of small chunks, tiles, report; a copy of its own."""
    made = _run(uri, downsample, channels, finished, options or ReadOptions())
    return Path(shutil.copytree(made, out / made.name))


@cache
def _run(
    uri: str, downsample: int, channels: tuple[ChannelInfo, ...], finished: bool, options: ReadOptions
) -> Path:
    reader = open_image(uri, options)
    meta = reader.meta
    reader.close()
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name)) / meta.image_id()
    shape = tuple(-(-n // downsample) for n in meta.shape_l0)
    with (
        patch.dict(grids.CHUNK, {meta.ndim: CHUNK}),
        patch.dict(grids.SHARD, {meta.ndim: SHARD}),
    ):
        made_heatmap(
            folder / "heatmap.ome.zarr", meta, downsample, random_values(shape, len(channels)),
            channels=channels, publish=finished,
        )  # fmt: skip
    tile = tuple(min(64, n // 2) for n in meta.shape_l0)
    boxes = shifted_boxes((*(2 * t for t in tile[:-1]), min(4 * tile[-1], meta.shape_l0[-1])), tile, tile)
    info = tiles_info(
        boxes, meta.shape_l0, map_grid(tile, (4,) * meta.ndim), uri=meta.uri, methods=("hirescam",)
    )
    spec = info.spec.model_copy(update={"identity": meta.identity, "spacing": meta.spacing, "read": options})
    tiles = TilesStore.create(
        folder / "tiles.zarr", info.model_copy(update={"image": meta, "spec": spec}), boxes
    )
    for unit in range(info.units if finished else 1):
        fill_unit(tiles, unit, failed=(1,) if unit == 0 else ())
    if finished:
        report = ImageReport(
            image=meta.uri, image_id=folder.name, status="gaps", error=f"{meta.uri}: 1 tile has no map",
            output=str(folder), counts=Counts(planned=len(boxes), done=len(boxes) - 1, failed=1, left_out=0),
            channels=tuple(channels), seconds={"all": 3.5},
        )  # fmt: skip
        (folder / "report.json").write_text(report.model_dump_json())
    return folder


def write_batch(out: Path, *images: ImageReport) -> None:
    report = RunReport(images=images, pool="serial", seconds=1.0, versions={})
    (out / "run.json").write_text(report.model_dump_json())


@dataclass(frozen=True)
class Got:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    port: int
    settings: Settings

    def get(self, path: str, method: str = "GET", **headers: str) -> Got:
        """`path` goes out as it is written; `X_Y` is the header `X-Y`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            # Not `request`, which would refuse what is malformed.
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            response = connection.getresponse()
            return Got(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()


@contextmanager
def served(*folders: Path, **settings: Any) -> Iterator[Served]:
    """The viewer on a port of its own."""
    setup = Settings(folders, **settings)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = http_server(setup)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Served(listening.getsockname()[1], setup)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not thread.is_alive()
