"""The viewer: one ASGI application over some output folders."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from workers.viewer.answers import CHECK, refusal
from workers.viewer.guard import Guard
from workers.viewer.pages import STATIC, Pages, Settings

log = logging.getLogger("gigacam")

MOST_CONNECTIONS, FILES = 2000, 500
Handler = Callable[[Request], Awaitable[Response]]


def http_server(settings: Settings) -> uvicorn.Server:
    """What serves the viewer on sockets it is given."""
    config = uvicorn.Config(
        viewer(settings),
        log_level="warning",
        access_log=False,
        limit_concurrency=most_connections(),
        timeout_graceful_shutdown=2,
        server_header=False,
        ws="none",
    )
    return uvicorn.Server(config)


def most_connections() -> int:
    """As many as leave this process files to read; those beyond are answered 503."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(64, min(MOST_CONNECTIONS, soft - FILES))


def viewer(settings: Settings) -> ASGIApp:
    """The application; `uvicorn` or any other ASGI server runs it."""
    pages = Pages(settings)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        yield
        pages.close()

    addresses = {
        "/": pages.gallery,
        "/image/{id}": pages.page,
        "/api/images": pages.images,
        "/api/images/{id}": pages.image,
        "/api/images/{id}/thumbnail.jpg": pages.thumbnail,
        "/api/images/{id}/associated/{name}.jpg": pages.associated,
        "/api/images/{id}/{run}/overlay.jpg": pages.overlay,
        "/api/images/{id}/{run}/top": pages.top,
        "/slide/{id}/{level}/{place}.jpg": pages.slide_tile,
        "/heat/{id}/{run}/{channel}/{kind}/{level}/{place}.bin": pages.heat_tile,
        "/volume/{id}/source.nii.gz": pages.volume,
        "/volume/{id}/{run}/{channel}.coverage.nii.gz": pages.volume_coverage,
        "/volume/{id}/{run}/{channel}.nii.gz": pages.volume_heat,
        "/raw/{run}/{path:path}": pages.raw,
    }
    routes = [Route(address, _plain(handler)) for address, handler in addresses.items()]
    handlers: Any = {HTTPException: _refused}
    app = Starlette(
        routes=[*routes, Mount("/static", Assets(directory=STATIC))],
        lifespan=life,
        exception_handlers=handlers,
    )
    return Guard(app, settings.hosts, settings.token, settings.cors)


def _plain(handler: Handler) -> Handler:
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
    message = "there is nothing at this address" if error.status_code == 404 else error.detail
    return refusal(error.status_code, message, dict(error.headers or {}))


class Assets(StaticFiles):
    """Scripts and styles: libraries lie in folders that name their version and may be kept, our own are asked for again."""

    def file_response(
        self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        versioned = Path(full_path).is_relative_to(STATIC / "vendor")
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if versioned else CHECK
        return response
