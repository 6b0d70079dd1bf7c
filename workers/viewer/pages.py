"""What each address of the viewer answers."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from schemas.errors import SourceError, StoreError
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.store.tops import top_tiles
from workers.viewer import deepzoom, pictures, volumes
from workers.viewer.answers import CHECK, KEEP, answer, digits, json_answer, number, place
from workers.viewer.catalog import BATCH, Catalog, Image
from workers.viewer.documents import batch_document, image_document, image_row, private, report_document
from workers.viewer.heat import Heatmaps, Kind, stamp_of
from workers.viewer.raw import file_response
from workers.viewer.runs import REPORT, TILES, Run
from workers.viewer.sources import Found, Origin, Sources
from workers.viewer.work import RETRY, Answer, Remembered, Work

STATIC = Path(__file__).parent / "static"
SLIDE_BYTES, HEAT_BYTES = 64 << 20, 160 << 20
"""Encoded tiles remembered."""
WAITING = 256
"""Requests that may wait for a thread."""
MOST_TOP = 100
SIZES = (16, 1024)
"""Of a small picture's longer side."""
PRIVATE_PICTURES = ("label", "macro")


@dataclass(frozen=True)
class Settings:
    """How a viewer is set up."""

    folders: tuple[Path, ...]
    sources: tuple[Path, ...] = ()
    """Where images that have moved are looked for."""
    hosts: tuple[str, ...] = ()
    """Names it answers to; empty: any."""
    token: str = ""
    cors: str = ""
    label: bool = False
    """Whether the pictures of a slide's label and of the whole glass, which may show a name, are served."""
    threads: int = 4


class Pages:
    """Every address, over one set of output folders."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.catalog = Catalog(settings.folders)
        self.sources = Sources(settings.sources)
        self.heatmaps = Heatmaps()
        self.work = Work(settings.threads, WAITING)
        self.slide_tiles, self.heat_tiles = Remembered(SLIDE_BYTES), Remembered(HEAT_BYTES)
        self.streams = 0

    def close(self) -> None:
        self.work.close()
        self.sources.close()

    async def gallery(self, request: Request) -> Response:
        return _page("index.html")

    async def page(self, request: Request) -> Response:
        image = await self._image(request)
        return _page("volume.html" if image.kind == "volume" else "slide.html")

    async def images(self, request: Request) -> Response:
        def make() -> dict[str, Any]:
            labels = self.catalog.labels()
            return {
                "folders": [{"run": i, "label": label} for i, label in enumerate(labels)],
                "images": [
                    image_row(image, self._seems_there(image)) for image in self.catalog.images().values()
                ],
            }

        return json_answer(request, await self.work.run(make))

    async def image(self, request: Request) -> Response:
        image = await self._image(request, fresh=True)

        def make() -> dict[str, Any]:
            found = self._look(image)
            allowed = PRIVATE_PICTURES if self.settings.label else ()
            return image_document(
                image, found, self.catalog.labels(), [n for n in allowed if n in found.associated]
            )

        return json_answer(request, await self.work.run(make))

    async def thumbnail(self, request: Request) -> Response:
        image = await self._image(request)
        origin, size = _origin(image), number(request, "size", 256, *SIZES)

        def make() -> Answer:
            found = self._found(origin)
            with self.sources.reader(origin) as reader:
                drawn = pictures.thumbnail(reader, size, found.window)
            return _jpeg(drawn, f"{origin.identity[:16]}-{size}")

        key = ("thumbnail", origin.identity, size)
        return answer(request, await self._made(key, make, self.slide_tiles, origin), KEEP)

    async def associated(self, request: Request) -> Response:
        image, name = await self._image(request), request.path_params["name"]
        origin = _origin(image)

        def make() -> Answer:
            if not self.settings.label or name not in PRIVATE_PICTURES:
                raise HTTPException(404, "label and macro pictures are served with --label only")
            if name not in self._found(origin).associated:
                raise HTTPException(404, f"{image.name} has no {name} picture")
            from workers.readers.slide import SlideReader

            with self.sources.reader(origin) as reader:
                assert isinstance(reader, SlideReader)
                return _jpeg(reader.associated_image(name), "")

        key = ("associated", origin.identity, name)
        return answer(request, await self._made(key, make, self.slide_tiles, origin))

    async def overlay(self, request: Request) -> Response:
        image, run = await self._run(request)
        channel, size = number(request, "channel", 0, 0, 9999), number(request, "size", 256, *SIZES)
        stamp = stamp_of(run.heatmap_path)

        def make() -> Answer:
            store, _ = self.heatmaps.open(run.heatmap_path)
            _check_channel(channel, len(store.info.channels))
            tag = f"{store.info.run_id[:16]}-{stamp[0]:x}-{channel}-{size}" if store.info.complete else ""
            found = self._look(image)
            if image.origin is None or found.reason:
                # Not kept: the source may be found again.
                return _jpeg(pictures.overlay(None, store, channel, size, None), "")
            with self.sources.reader(image.origin) as reader:
                return _jpeg(pictures.overlay(reader, store, channel, size, found.window), tag)

        key = ("overlay", run.heatmap_path, stamp, channel, size)
        return answer(request, await self._made(key, make, self.slide_tiles, image.origin))

    async def top(self, request: Request) -> Response:
        _, run = await self._run(request)
        channel, most = number(request, "channel", 0, 0, 9999), number(request, "k", 10, 1, MOST_TOP)
        sign = request.query_params.get("sign", "positive")
        if sign not in ("positive", "negative"):
            raise HTTPException(400, "sign is positive or negative")
        stamp = stamp_of(run.heatmap_path)

        def make() -> Answer:
            store, _ = self.heatmaps.open(run.heatmap_path)
            _check_channel(channel, len(store.info.channels))
            try:
                tiles = TilesStore.open(run.folder / TILES)
            except StoreError as error:
                raise HTTPException(404, "this run has no tiles.zarr: its tiles are not known") from error
            found = top_tiles(tiles, store.info.channels[channel], most, 1 if sign == "positive" else -1)
            rows = [
                {
                    "rank": rank,
                    "value": tile.value,
                    "centre_l0": tile.centre_l0,
                    "box_l0": [tile.box.start, tile.box.stop],
                    "tile": tile.tile,
                }
                for rank, tile in enumerate(found, 1)
            ]
            tag = f"{store.info.run_id[:16]}-{stamp[0]:x}-{channel}-{most}-{sign}"
            return Answer(
                json.dumps(rows).encode(), "application/json", f'"{tag}"' if store.info.complete else ""
            )

        key = ("top", run.heatmap_path, stamp, channel, most, sign)
        return answer(request, await self.work.once(key, make, self.slide_tiles))

    async def slide_tile(self, request: Request) -> Response:
        image = await self._image(request)
        origin, meta = _origin(image), image.meta
        level, (x, y) = digits(request, "level"), place(request)
        if image.kind != "slide" or meta is None:
            raise HTTPException(404, f"{image.name} is no slide")
        if not deepzoom.has_tile(meta.shape_l0, level, y, x):
            raise HTTPException(404, f"the slide has no tile {x}, {y} (x, y) at level {level}")

        def make() -> Answer:
            found = self._found(origin)
            with self.sources.reader(origin) as reader:
                source = reader
                if deepzoom.needed_px(reader, level) > deepzoom.MOST_PX:
                    source = self.sources.overview(origin, reader)
                pixels, lost = deepzoom.tile_pixels(source, level, y, x)
            # What could not be read may be read another time.
            tag = "" if lost.any() else f"{origin.identity[:16]}-{level}-{x}-{y}"
            return _jpeg(deepzoom.rgb(pixels, found.window, lost), tag)

        key = ("slide", origin.identity, level, y, x)
        return answer(request, await self._made(key, make, self.slide_tiles, origin), KEEP)

    async def heat_tile(self, request: Request) -> Response:
        _, run = await self._run(request)
        channel, level, (y, x) = digits(request, "channel"), digits(request, "level"), place(request)
        asked = request.path_params["kind"]
        if asked not in ("mean", "peak"):
            raise HTTPException(404, "a heatmap has mean and peak")
        kind: Kind = "peak" if asked == "peak" and level else "mean"
        path = run.heatmap_path
        key = ("heat", path, stamp_of(path), channel, kind, level, y, x)
        make = partial(self.heatmaps.tile, path, channel, kind, level, y, x)
        return answer(request, await self.work.once(key, make, self.heat_tiles))

    async def volume(self, request: Request) -> Response:
        image = await self._image(request)
        _check_volume(image)
        origin = _origin(image)
        return await self._stream(request, origin, f"{origin.identity[:16]}", volumes.source_nifti)

    async def volume_heat(self, request: Request) -> Response:
        return await self._of_channel(request, volumes.heat_nifti, "heat")

    async def volume_coverage(self, request: Request) -> Response:
        return await self._of_channel(request, volumes.coverage_nifti, "coverage")

    async def _of_channel(
        self, request: Request, make: Callable[[Reader, HeatmapStore, int], Iterator[bytes]], what: str
    ) -> Response:
        image, run = await self._run(request)
        channel = digits(request, "channel")
        _check_volume(image)
        stamp = stamp_of(run.heatmap_path)
        store, _ = await self.work.run(partial(self.heatmaps.open, run.heatmap_path))
        _check_channel(channel, len(store.info.channels))
        tag = f"{store.info.run_id[:16]}-{stamp[0]:x}-{channel}-{what}" if store.info.complete else ""
        return await self._stream(request, _origin(image), tag, lambda reader: make(reader, store, channel))

    async def _stream(
        self, request: Request, origin: Origin, tag: str, make: Callable[[Reader], Iterator[bytes]]
    ) -> Response:
        """A volume, slab by slab; few at once, since each holds a source open."""
        headers = {"Cache-Control": CHECK, "ETag": f'"{tag}"'} if tag else {"Cache-Control": "no-store"}
        if tag and f'"{tag}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if self.streams >= self.settings.threads:
            raise HTTPException(503, "too many volumes are being sent; try again in a moment", RETRY)

        async def body() -> AsyncGenerator[bytes]:
            self.streams += 1  # in the same step as the look at it: nobody comes between
            try:
                await self.work.run(partial(self._found, origin))
                with ExitStack() as held:
                    reader = await run_in_threadpool(held.enter_context, self.sources.reader(origin))
                    parts = make(reader)
                    yield b""
                    while (part := await run_in_threadpool(next, parts, None)) is not None:
                        yield part
            finally:
                self.streams -= 1

        sent = body()
        # What is wrong with the source or its size is said before the first byte goes out.
        await self._tried(anext(sent), origin)
        if request.method == "HEAD":
            await sent.aclose()
            return Response(headers=headers, media_type="application/gzip")
        return StreamingResponse(sent, headers=headers, media_type="application/gzip")

    async def raw(self, request: Request) -> Response:
        index, path = digits(request, "run"), request.path_params["path"]
        if index >= len(self.settings.folders):
            raise HTTPException(404, f"there are {len(self.settings.folders)} output folders, counted from 0")
        root = self.settings.folders[index]
        if path == BATCH:
            return json_answer(request, await self.work.run(partial(batch_document, root / BATCH)))
        if path.endswith(f"/{REPORT}"):
            images = await self.work.run(self.catalog.images)
            runs = (run for image in images.values() for run in image.runs.values() if run.index == index)
            found = next((run for run in runs if f"{run.name}/{REPORT}" == path), None)
            if found is None:
                raise HTTPException(404, "there is no such report")
            return json_answer(request, await self.work.run(partial(report_document, found)))
        return await self.work.run(partial(file_response, root, path, request))

    async def _image(self, request: Request, fresh: bool = False) -> Image:
        """The image of a request; tiles, of which there are many, take what was seen last."""
        name = request.path_params["id"]
        image = None if fresh else self.catalog.seen().get(name)
        if image is None:
            image = (await self.work.run(self.catalog.images)).get(name)
        if image is None:
            raise HTTPException(404, "there is no such image in the output folders of this viewer")
        return image

    async def _run(self, request: Request) -> tuple[Image, Run]:
        image, index = await self._image(request), digits(request, "run")
        if index not in image.runs:
            raise HTTPException(404, f"{image.name} has no run in output folder {index}")
        return image, image.runs[index]

    def _seems_there(self, image: Image) -> bool:
        """Whether a source is there, without opening it: a gallery asks this of all."""
        origin = image.origin
        if origin is None:
            return False
        known = self.sources.known(origin)
        if known is not None:
            return not known.reason
        return (
            origin.uri.startswith("procedural:") or bool(self.settings.sources) or os.path.exists(origin.uri)
        )

    def _look(self, image: Image) -> Found:
        if image.origin is None:
            return Found(reason=f"it is not known where {image.name} lies")
        return self.sources.find(image.origin)

    def _found(self, origin: Origin) -> Found:
        found = self.sources.find(origin)
        if found.reason:
            raise HTTPException(404, private(found.reason, origin))
        return found

    async def _made(
        self, key: Any, make: Callable[[], Answer], kept: Remembered, origin: Origin | None
    ) -> Answer:
        made: Answer = await self._tried(self.work.once(key, make, kept), origin)
        return made

    async def _tried(self, made: Awaitable[Any], origin: Origin | None) -> Any:
        try:
            return await made
        except SourceError as error:
            raise HTTPException(502, private(error.message, origin)) from error


def _page(name: str) -> Response:
    if not (STATIC / name).is_file():
        raise HTTPException(404, f"{name} is missing from this installation")
    return FileResponse(STATIC / name, media_type="text/html", headers={"Cache-Control": "no-cache"})


def _jpeg(picture: Any, tag: str) -> Answer:
    return Answer(deepzoom.jpeg(picture), "image/jpeg", f'"{tag}"' if tag else "")


def _origin(image: Image) -> Origin:
    if image.origin is None:
        raise HTTPException(404, f"it is not known where {image.name} lies")
    return image.origin


def _check_channel(channel: int, channels: int) -> None:
    if channel >= channels:
        raise HTTPException(404, f"there are {channels} channels, counted from 0")


def _check_volume(image: Image) -> None:
    if image.kind != "volume":
        raise HTTPException(404, f"{image.name} is no volume")
