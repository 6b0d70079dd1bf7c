"""Arrays chunked by unit along the tile axis: whole chunks written, rows read, reasons as bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

ERROR_BYTES = 512
"""A reason is kept in this many bytes of UTF-8, in its unit's own chunk (attributes are shared by all workers)."""


def read_rows(array: Any, rows: NDArray[np.int64], unit: int, *rest: int) -> NDArray[Any]:
    """`(n, ...)` values of some tiles, ascending, at `rest` of the next axes; only their chunks are read."""
    out = np.empty((len(rows), *array.shape[1 + len(rest) :]), array.dtype)
    for a, b in pairwise(np.flatnonzero(np.diff(rows // unit, prepend=-1, append=-1)).tolist()):
        start = int(rows[a] // unit * unit)
        out[a:b] = array[(slice(start, min(start + unit, array.shape[0])), *rest)][rows[a:b] - start]
    return out


def write_chunk(
    array: Any, rows: NDArray[np.int64], values: NDArray[Any], unit: int, rest: int | None = None
) -> int:
    """Write the whole chunk of a unit: its planned tiles, then `rest` (or fill) for those the plan left out.

    Returns
    -------
    int
        Bytes before compression.
    """
    start = int(rows[0])
    stop = min(start + unit, array.shape[0])
    fill = array.fill_value if rest is None else rest
    chunk = np.full((stop - start, *array.shape[1:]), fill, array.dtype)
    chunk[: len(rows)] = values
    array[start:stop] = chunk
    return chunk.nbytes


def encode_reason(reason: str) -> NDArray[np.uint8]:
    """Padded UTF-8, cut at a whole character."""
    raw = reason.encode()[:ERROR_BYTES].decode(errors="ignore").encode()
    return np.frombuffer(raw.ljust(ERROR_BYTES, b"\0"), np.uint8)


def reasons(texts: NDArray[np.uint8]) -> list[str]:
    """What `encode_reason` made of each."""
    return [text.tobytes().rstrip(b"\0").decode() for text in texts]
