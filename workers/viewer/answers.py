"""From what was made to what is sent, and from words of an address to numbers."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from workers.viewer.work import Answer

KEEP = "private, max-age=86400"
"""Of what an address will always give: it holds the identity of the image."""
CHECK = "private, no-cache"
"""Kept, and asked for again each time by its tag."""
_PLACE = re.compile(r"([0-9]{1,7})_([0-9]{1,7})")


def answer(request: Request, made: Answer, cache: str = CHECK) -> Response:
    """The bytes, or 304 to whom has them."""
    if not made.etag:
        return Response(made.body, headers={"Cache-Control": "no-store"}, media_type=made.media_type)
    headers = {"Cache-Control": cache, "ETag": made.etag}
    if made.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(made.body, headers=headers, media_type=made.media_type)


def json_answer(request: Request, document: Any) -> Response:
    """A document as JSON, tagged by its content."""
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    return answer(request, Answer(body, "application/json", tag))


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as the pages expect it."""
    return JSONResponse({"error": message}, status, {**(headers or {}), "Cache-Control": "no-store"})


def number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query; 400 where it is none, or out of bounds."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise HTTPException(400, f"{name} is a whole number from {least} to {most}")
    return int(text)


def digits(request: Request, name: str) -> int:
    """A whole number of the path; 400 where it is none."""
    text = request.path_params[name]
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise HTTPException(400, f"{name} is a whole number")
    return int(text)


def place(request: Request) -> tuple[int, int]:
    """The two numbers a tile is named by; 400 where they are none."""
    found = _PLACE.fullmatch(request.path_params["place"])
    if found is None:
        raise HTTPException(400, "a tile is named by two whole numbers, such as 3_4")
    return int(found[1]), int(found[2])
