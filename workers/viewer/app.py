"""The viewer: one ASGI application over some output folders."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from schemas.errors import SourceError, StoreError
from schemas.run import ImageReport, RunReport
from workers.export.words import INTENDED_USE
from workers.report.private import names_of, without_folders
from workers.store.tiles import TilesStore
from workers.store.tops import top_tiles
from workers.viewer import deepzoom, pictures, volumes
from workers.viewer.catalog import REPORT, RUN, TILES, Catalog, Image, Run, progress
from workers.viewer.guard import Guard, refusal
from workers.viewer.heat import Heatmaps, Kind, stamp_of
from workers.viewer.raw import file_response
from workers.viewer.sources import Found, Origin, Sources
from workers.viewer.work import RETRY, Answer, Remembered, Work

log = logging.getLogger("gigacam")

STATIC = Path(__file__).parent / "static"
SLIDE_BYTES, HEAT_BYTES = 64 << 20, 160 << 20
"""Encoded tiles remembered."""
WAITING = 256
MOST_TOP = 100
SIZES = (16, 1024)
PRIVATE_PICTURES = ("label", "macro")
KEEP = "private, max-age=86400"
CHECK = "private, no-cache"
PLACE = re.compile(r"(\d{1,7})_(\d{1,7})")


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


Handler = Callable[[Request], Awaitable[Response]]


def viewer(settings: Settings) -> ASGIApp:
    """The application; `uvicorn` or any other ASGI server runs it."""
    pages = Pages(settings)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        yield
        pages.close()

    run = "/{id}/{run}"
    routes = [
        Route("/", plain(pages.gallery)),
        Route("/image/{id}", plain(pages.page)),
        Route("/api/images", plain(pages.images)),
        Route("/api/images/{id}", plain(pages.image)),
        Route("/api/images/{id}/thumbnail.jpg", plain(pages.thumbnail)),
        Route("/api/images/{id}/associated/{name}.jpg", plain(pages.associated)),
        Route(f"/api/images{run}/overlay.jpg", plain(pages.overlay)),
        Route(f"/api/images{run}/top", plain(pages.top)),
        Route("/slide/{id}/{level}/{place}.jpg", plain(pages.slide_tile)),
        Route(f"/heat{run}/{{channel}}/{{kind}}/{{level}}/{{place}}.bin", plain(pages.heat_tile)),
        Route("/volume/{id}/source.nii.gz", plain(pages.volume)),
        Route(f"/volume{run}/{{channel}}.nii.gz", plain(pages.volume_heat)),
        Route("/raw/{run}/{path:path}", plain(pages.raw)),
        Mount("/static", Assets(directory=STATIC, check_dir=False)),
    ]
    handlers: Any = {HTTPException: _refused}
    app = Starlette(routes=routes, lifespan=life, exception_handlers=handlers)
    return Guard(app, settings.hosts, settings.token, settings.cors)


def plain(handler: Handler) -> Handler:
    """`handler`, whose failures are one line for people and never end the server."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException as error:
            return refusal(error.status_code, error.detail, dict(error.headers or {}))
        except Exception:
            log.exception("%s failed", request.url.path)
            return refusal(500, "the viewer could not do this; its log says why")

    return answered


async def _refused(request: Request, error: HTTPException) -> Response:
    message = "there is no such page" if error.status_code == 404 else error.detail
    return refusal(error.status_code, message, dict(error.headers or {}))


class Assets(StaticFiles):
    """Our own scripts and styles: those asked for with a version may be kept, the others are asked for again."""

    def file_response(
        self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        versioned = b"v=" in scope.get("query_string", b"")
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if versioned else CHECK
        return response


class Pages:
    """What each address answers."""

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
        return _json(request, await self.work.run(self._list))

    def _list(self) -> dict[str, Any]:
        labels = self.catalog.labels()
        return {
            "folders": [{"run": i, "label": label} for i, label in enumerate(labels)],
            "images": [
                {
                    "id": image.id,
                    "name": image.name,
                    "kind": image.kind,
                    "source_available": self._seems_there(image),
                    "runs": [_run_row(run) for run in image.runs.values()],
                }
                for image in self.catalog.images().values()
            ],
        }

    def _seems_there(self, image: Image) -> bool:
        """Whether a source is there, without opening it: a gallery asks this of all."""
        origin = image.origin
        if origin is None:
            return False
        known = self.sources.known(origin)
        if known is not None:
            return not known.reason
        return (
            origin.uri.startswith("procedural:") or bool(self.settings.sources) or Path(origin.uri).exists()
        )

    async def image(self, request: Request) -> Response:
        image = await self._image(request, fresh=True)
        return _json(request, await self.work.run(partial(self._describe, image)))

    def _describe(self, image: Image) -> dict[str, Any]:
        origin, meta = image.origin, image.meta
        found = (
            self.sources.find(origin) if origin else Found(reason=f"it is not known where {image.name} lies")
        )
        labels = self.catalog.labels()
        shown = None
        if image.kind == "slide" and meta is not None and not found.reason:
            levels = deepzoom.level_count(meta.shape_l0)
            shown = {"tile": deepzoom.TILE, "overlap": deepzoom.OVERLAP, "levels": levels, "format": "jpg"}
        heat = next((run.heatmap for run in image.runs.values() if run.heatmap), None)
        pictures_there = [n for n in PRIVATE_PICTURES if n in found.associated] if self.settings.label else []
        return {
            "id": image.id,
            "name": image.name,
            "kind": image.kind,
            "source": {
                "available": not found.reason,
                "reason": _without_folders(found.reason, origin),
                "shape_l0": heat.grid.shape_l0 if heat else meta and meta.shape_l0,
                "spacing": heat.spacing if heat else meta and meta.spacing,
                "spacing_unit": heat.spacing_unit if heat else meta and meta.spacing_unit,
                "deepzoom": shown,
                "vendor": meta.format if meta else "",
                "objective": found.objective,
                "orientation": meta.source_orientation if meta else "",
                "has_label": bool(pictures_there),
                "associated": pictures_there,
            },
            "runs": [_run_document(run, labels[run.index], image.id) for run in image.runs.values()],
            "intended_use": INTENDED_USE,
        }

    async def thumbnail(self, request: Request) -> Response:
        image = await self._image(request)
        origin, size = self._origin(image), _number(request, "size", 256, *SIZES)

        def make() -> Answer:
            found = self._found(origin)
            with self.sources.reader(origin) as reader:
                return self._jpeg(
                    pictures.thumbnail(reader, size, found.window), f"{origin.identity[:16]}-{size}"
                )

        key = ("thumbnail", origin.identity, size)
        return _answer(request, await self._made(key, make, self.slide_tiles, origin), KEEP)

    async def associated(self, request: Request) -> Response:
        image, name = await self._image(request), request.path_params["name"]
        origin = self._origin(image)

        def make() -> Answer:
            from workers.readers.slide import SlideReader

            found = self._found(origin)
            if not self.settings.label or name not in PRIVATE_PICTURES or name not in found.associated:
                raise HTTPException(
                    404, "there is no such picture, or the viewer was started without --label"
                )
            with self.sources.reader(origin) as reader:
                assert isinstance(reader, SlideReader)
                return self._jpeg(reader.associated_image(name), "")

        return _answer(
            request,
            await self._made(("associated", origin.identity, name), make, self.slide_tiles, origin),
            "no-store",
        )

    async def overlay(self, request: Request) -> Response:
        image, run = await self._run(request)
        channel, size = _number(request, "channel", 0, 0, 9999), _number(request, "size", 256, *SIZES)
        stamp = stamp_of(run.heatmap_path)

        def make() -> Answer:
            store, _ = self.heatmaps.open(run.heatmap_path)
            _check_channel(channel, len(store.info.channels))
            found = self.sources.find(image.origin) if image.origin else Found(reason="unknown")
            tag = f"{store.info.run_id[:16]}-{stamp[0]:x}-{channel}-{size}" if store.info.complete else ""
            if image.origin is None or found.reason:
                return self._jpeg(pictures.overlay(None, store, channel, size, None), tag and f"{tag}-bare")
            with self.sources.reader(image.origin) as reader:
                return self._jpeg(pictures.overlay(reader, store, channel, size, found.window), tag)

        there = image.origin is not None and not (self.sources.known(image.origin) or Found()).reason
        key = ("overlay", run.heatmap_path, stamp, channel, size, there)
        return _answer(request, await self._made(key, make, self.slide_tiles, image.origin), CHECK)

    async def top(self, request: Request) -> Response:
        _, run = await self._run(request)
        channel, most = _number(request, "channel", 0, 0, 9999), _number(request, "k", 10, 1, MOST_TOP)
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
                raise HTTPException(
                    404, "this run has no tiles.zarr: its strongest tiles are not known"
                ) from error
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
            tag = f'"{store.info.run_id[:16]}-{stamp[0]:x}"' if store.info.complete else ""
            return Answer(json.dumps(rows).encode(), "application/json", tag)

        key = ("top", run.heatmap_path, stamp, channel, most, sign)
        return _answer(request, await self.work.once(key, make, self.slide_tiles), CHECK)

    async def slide_tile(self, request: Request) -> Response:
        image = await self._image(request)
        origin, meta = self._origin(image), image.meta
        level = _digits(request, "level")
        x, y = _place(request)
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
                pixels = deepzoom.tile_pixels(source, level, y, x)
            return self._jpeg(deepzoom.rgb(pixels, found.window), f"{origin.identity[:16]}-{level}-{x}-{y}")

        key = ("slide", origin.identity, level, y, x)
        return _answer(request, await self._made(key, make, self.slide_tiles, origin), KEEP)

    async def heat_tile(self, request: Request) -> Response:
        _, run = await self._run(request)
        channel, level = _digits(request, "channel"), _digits(request, "level")
        y, x = _place(request)
        asked = request.path_params["kind"]
        if asked not in ("mean", "peak"):
            raise HTTPException(404, "a heatmap has mean and peak")
        kind: Kind = "peak" if asked == "peak" else "mean"
        path = run.heatmap_path
        key = ("heat", path, stamp_of(path), channel, kind if level else "mean", level, y, x)
        make = partial(self.heatmaps.tile, path, channel, kind, level, y, x)
        return _answer(request, await self.work.once(key, make, self.heat_tiles), CHECK)

    async def volume(self, request: Request) -> Response:
        image = await self._image(request)
        origin = self._origin(image)
        _check_volume(image)
        return await self._stream(
            request, origin, f"{origin.identity[:16]}", lambda reader: volumes.source_nifti(reader)
        )

    async def volume_heat(self, request: Request) -> Response:
        image, run = await self._run(request)
        channel = _digits(request, "channel")
        _check_volume(image)
        origin, stamp = self._origin(image), stamp_of(run.heatmap_path)
        store, _ = await self.work.run(partial(self.heatmaps.open, run.heatmap_path))
        _check_channel(channel, len(store.info.channels))
        etag = f"{store.info.run_id[:16]}-{stamp[0]:x}-{channel}" if store.info.complete else ""
        return await self._stream(
            request, origin, etag, lambda reader: volumes.heat_nifti(reader, store, channel)
        )

    async def _stream(
        self, request: Request, origin: Origin, tag: str, make: Callable[[Any], Any]
    ) -> Response:
        """A volume, slab by slab; few at once, since each holds the source open."""
        etag = f'"{tag}"' if tag else ""
        headers = {"Cache-Control": CHECK, "ETag": etag} if etag else {"Cache-Control": "no-store"}
        if etag and etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if self.streams >= self.settings.threads:
            raise HTTPException(503, "too many volumes are being sent; try again in a moment", RETRY)
        self.streams += 1
        begun = False
        try:
            held = self.sources.reader(origin)
            reader = await self._tried(self.work.run(held.__enter__), origin)
            try:
                parts = await self._tried(self.work.run(lambda: make(reader)), origin)
                begun = True
            finally:
                if not begun:
                    held.__exit__(None, None, None)
        finally:
            if not begun:
                self.streams -= 1

        async def body() -> AsyncIterator[bytes]:
            try:
                while (part := await self.work.run(lambda: next(parts, None))) is not None:
                    yield part
            finally:
                held.__exit__(None, None, None)
                self.streams -= 1

        if request.method == "HEAD":
            sent = body()
            await sent.__anext__()
            await sent.aclose()
            return Response(headers=headers, media_type="application/gzip")
        return StreamingResponse(body(), headers=headers, media_type="application/gzip")

    async def raw(self, request: Request) -> Response:
        index, path = _digits(request, "run"), request.path_params["path"]
        if index >= len(self.settings.folders):
            raise HTTPException(404, f"there are {len(self.settings.folders)} output folders, counted from 0")
        root = self.settings.folders[index]
        if path == RUN:
            return _json(request, await self.work.run(partial(_clean_batch, root / RUN)))
        if path.endswith(f"/{REPORT}"):
            name = path.removesuffix(f"/{REPORT}")
            images = await self.work.run(self.catalog.images)
            run = next(
                (r for i in images.values() for r in i.runs.values() if (r.index, r.name) == (index, name)),
                None,
            )
            if run is None:
                raise HTTPException(404, "there is no such report")
            return _json(request, await self.work.run(partial(_clean_report, run)))
        return await self.work.run(partial(file_response, root, path, request))

    async def _image(self, request: Request, fresh: bool = False) -> Image:
        """The image of a request; tiles ask for so many that they take what was seen last."""
        image = None if fresh else self.catalog.seen().get(request.path_params["id"])
        if image is None:
            image = (await self.work.run(self.catalog.images)).get(request.path_params["id"])
        if image is None:
            raise HTTPException(404, "there is no such image in the output folders of this viewer")
        return image

    async def _run(self, request: Request) -> tuple[Image, Run]:
        image, index = await self._image(request), _digits(request, "run")
        if index not in image.runs:
            raise HTTPException(404, f"{image.name} has no run in output folder {index}")
        return image, image.runs[index]

    def _origin(self, image: Image) -> Origin:
        if image.origin is None:
            raise HTTPException(404, f"it is not known where {image.name} lies")
        return image.origin

    def _found(self, origin: Origin) -> Found:
        found = self.sources.find(origin)
        if found.reason:
            raise HTTPException(404, _without_folders(found.reason, origin))
        return found

    def _jpeg(self, picture: Any, tag: str) -> Answer:
        return Answer(deepzoom.jpeg(picture), "image/jpeg", f'"{tag}"' if tag else "")

    async def _made(
        self, key: Any, make: Callable[[], Answer], kept: Remembered, origin: Origin | None
    ) -> Answer:
        return await self._tried(self.work.once(key, make, kept), origin)

    async def _tried(self, made: Awaitable[Any], origin: Origin | None) -> Any:
        try:
            return await made
        except SourceError as error:
            raise HTTPException(502, _without_folders(error.message, origin)) from error


def _page(name: str) -> Response:
    if not (STATIC / name).is_file():
        raise HTTPException(404, f"{name} is missing from this installation")
    return FileResponse(STATIC / name, media_type="text/html", headers={"Cache-Control": "no-cache"})


def _json(request: Request, document: Any) -> Response:
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    return _answer(request, Answer(body, "application/json", tag), CHECK)


def _answer(request: Request, answer: Answer, cache: str) -> Response:
    headers = {"Cache-Control": cache, "ETag": answer.etag} if answer.etag else {"Cache-Control": "no-store"}
    if answer.etag and answer.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(answer.body, headers=headers, media_type=answer.media_type)


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "run": run.index,
        "status": run.status,
        "error": run.error,
        "complete": run.complete,
        "progress": progress(run),
        "methods": run.methods,
        "targets": run.targets,
        "channels": [channel.label for channel in run.heatmap.channels] if run.heatmap else [],
        "prediction": run.prediction,
        "auroc": run.auroc,
        "auroc_of": run.auroc_of,
        "seconds": run.seconds,
        "started": run.started,
        "model": run.model.get("model", ""),
    }


def _run_document(run: Run, label: str, image_id: str) -> dict[str, Any]:
    info = run.heatmap
    known: dict[str, Any] = {
        "run": run.index,
        "label": label,
        "complete": run.complete,
        "status": run.status,
        "error": run.error,
        "has_peak": info is not None and info.spec.peak and len(info.grid.levels) > 1,
        "partial": info is not None and info.partial,
        "grid": None,
        "channels": [],
        "prediction": run.prediction,
        "counts": progress(run),
        "auroc_of": run.auroc_of,
        "provenance_short": run.model,
        "raw": f"raw/{run.index}/{run.name}/heatmap.ome.zarr",
    }
    if info is None:
        return known
    grid = info.grid
    known["grid"] = {
        "shape_l0": grid.shape_l0,
        "downsample": grid.downsample,
        "levels": grid.levels,
        "tile": grid.chunk[0],
        "spacing": info.spacing,
    }
    known["channels"] = [
        {
            "index": i,
            **channel.model_dump(
                include={"method", "target", "title", "edition", "unit", "signed", "bag", "bag_method"}
            ),
            "label": channel.label,
            "native_cell_l0": run.cells[i],
            "value_range": info.value_range[i] if info.value_range else None,
            "display": info.display[i] if info.display else None,
            "auroc": run.auroc.get(channel.label),
        }
        for i, channel in enumerate(info.channels)
    ]
    return known


def _clean_report(run: Run) -> Any:
    try:
        report = ImageReport.model_validate_json((run.folder / REPORT).read_bytes())
    except OSError as error:
        raise HTTPException(404, "there is no such report") from error
    except ValueError as error:
        raise HTTPException(409, "that report is of another version of gigacam") from error
    return without_folders(report, run.origin.name if run.origin else run.name).model_dump(mode="json")


def _clean_batch(path: Path) -> Any:
    try:
        batch = RunReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HTTPException(404, "there is no run.json here") from error
    except ValueError as error:
        raise HTTPException(409, "that run.json is of another version of gigacam") from error
    images = tuple(without_folders(r, n) for r, n in zip(batch.images, names_of(batch.images), strict=True))
    return batch.model_copy(update={"images": images}).model_dump(mode="json")


def _without_folders(message: str, origin: Origin | None) -> str:
    """A message that shows of a source no more than its name."""
    if not message or origin is None:
        return message
    report = ImageReport(image=origin.uri, status="failed", error=message)
    return without_folders(report, origin.name).error


def _check_channel(channel: int, channels: int) -> None:
    if channel >= channels:
        raise HTTPException(404, f"there are {channels} channels, counted from 0")


def _check_volume(image: Image) -> None:
    if image.kind != "volume":
        raise HTTPException(404, f"{image.name} is no volume")


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or not least <= int(text) <= most:
        raise HTTPException(400, f"{name} is a whole number from {least} to {most}")
    return int(text)


def _digits(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise HTTPException(400, f"{name} is a whole number")
    return int(text)


def _place(request: Request) -> tuple[int, int]:
    found = re.fullmatch(PLACE, request.path_params["place"])
    if found is None or not request.path_params["place"].isascii():
        raise HTTPException(400, "a tile is named by two whole numbers, such as 3_4")
    return int(found[1]), int(found[2])
