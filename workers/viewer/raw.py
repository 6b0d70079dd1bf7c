"""Files of finished runs as they are, for other viewers: byte ranges, true 404s, and nothing else of the disk."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from workers.viewer.answers import CHECK
from workers.viewer.runs import HEATMAP

FILES = ("heatmap.nii.gz",)
DOTTED = (".zattrs", ".zgroup", ".zarray", ".zmetadata")
MOST_RANGES = 1000
"""Characters of a Range header."""


def allowed(path: str) -> bool:
    """Whether a path below an output folder is one that other viewers need.

    Files inside `heatmap.ome.zarr`, and `heatmap.nii.gz`. Reports are not among them: they say where the source lies.
    """
    parts = path.split("/")
    if "\\" in path or "\0" in path or len(parts) > 16 or len(path) > 1000:
        return False
    if any(part in ("", ".", "..") or (part.startswith(".") and part not in DOTTED) for part in parts):
        return False
    return HEATMAP in parts[:-1] or parts[-1] in FILES


def file_response(root: Path, path: str, request: Request) -> Response:
    """A file below `root`, or the part of it that was asked for.

    Raises
    ------
    HTTPException
        404: there is no such file, or it is not for others. 416: a range that makes no sense.
    """
    missing = HTTPException(404, f"no file {PurePosixPath(path).name[:100]!r} here")
    if not allowed(path):
        raise missing
    try:
        base = root.resolve(strict=True)
        file = (base / path).resolve(strict=True)
        found = file.stat()
    except (OSError, ValueError, RuntimeError) as error:
        raise missing from error
    inside = file.is_relative_to(base) and allowed(file.relative_to(base).as_posix())
    if not inside or not stat.S_ISREG(found.st_mode):
        raise missing
    if len(request.headers.get("range", "")) > MOST_RANGES:
        raise HTTPException(
            416, "that Range header is too long", {"Content-Range": f"bytes */{found.st_size}"}
        )
    kind = "application/json" if file.suffix == ".json" else "application/octet-stream"
    response = FileResponse(file, stat_result=found, media_type=kind, headers={"Cache-Control": CHECK})
    if (
        response.headers["etag"] in request.headers.get("if-none-match", "")
        and "range" not in request.headers
    ):
        return Response(status_code=304, headers={"ETag": response.headers["etag"], "Cache-Control": CHECK})
    return response
