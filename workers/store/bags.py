"""The arrays of a bag in `tiles.zarr`: features by unit, then what one task says of the whole bag.

A unit's features are written whole by one task, its `status/embed` last. The bag's decision, relevances and gradients are
written by one task, the numbers in the attributes of `bag` last, which say that it is attributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from schemas.bag import BagReport
from schemas.errors import StoreError
from schemas.geometry import Box
from schemas.heatmap import TileStatus
from schemas.run import TileFailure, TilesInfo
from workers.store.rows import ERROR_BYTES, encode_reason, read_rows, reasons, write_chunk

_COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
_REPORT = "report"


class Inside(IntEnum):
    """Why a tile of the bag is explained inside, or is not."""

    NO = 0
    RELEVANT = 1
    SAMPLED = 2


def write_bag(root: zarr.Group, info: TilesInfo) -> None:
    """The arrays of a new store, if its model has a bag head."""
    if not info.features:
        return
    targets, unit = len(info.spec.cam.targets), info.spec.unit

    def array(name: str, row: tuple[int, ...], dtype: str, fill: float, *, one: bool = False) -> None:
        root.create_array(
            name,
            shape=(info.tiles, *row),
            chunks=(min(unit, max(info.tiles, 1)), *((1, *row[1:]) if one else row)),
            dtype=dtype,
            fill_value=fill,
            compressors=_COMPRESSOR,
        )

    array("status/embed", (), "uint8", TileStatus.PENDING)
    array("embed_error", (ERROR_BYTES,), "uint8", 0)
    array("features", (info.features,), "float32", np.nan)
    for method in info.spec.cam.bag_methods:
        array(f"relevance/{method}", (targets,), "float32", np.nan)
    if info.spec.cam.methods:
        array("gradient", (targets, info.features), "float32", np.nan, one=True)
        array("inside", (), "uint8", Inside.NO)
    root.create_group("bag")
    if info.planned < info.tiles:
        left_out = np.zeros(info.tiles, np.uint8)
        left_out[info.planned :] = TileStatus.LEFT_OUT
        cast("Any", root["status/embed"])[:] = left_out


class Bag:
    """The features and the decision of an open `tiles.zarr`.

    Parameters
    ----------
    path
        Folder of the store.
    info
        Its ledger.
    mode
        `r+` for who writes.
    """

    def __init__(self, path: Path, info: TilesInfo, mode: Literal["r", "r+"] = "r") -> None:
        self.path = path
        self.info = info
        self._group = zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)
        self._arrays: dict[str, Any] = {}

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    def _rows(self, name: str, rows: NDArray[np.int64], *rest: int) -> NDArray[Any]:
        return read_rows(self._array(name), rows, self.info.spec.unit, *rest)

    def statuses(self) -> NDArray[np.uint8]:
        """`(N,)` `TileStatus` of every tile's features."""
        return cast("NDArray[np.uint8]", self._array("status/embed")[:])

    def pending_units(self) -> list[int]:
        """Units that have a tile neither embedded nor failed, ascending."""
        pending = np.flatnonzero(self.statuses() == TileStatus.PENDING)
        return cast("list[int]", np.unique(pending // self.info.spec.unit).tolist())

    def write_unit(
        self, rows: NDArray[np.int64], features: NDArray[np.float32], errors: Mapping[int, str]
    ) -> int:
        """Write a unit's features, `status/embed` last; the same values give the same bytes, however often.

        Parameters
        ----------
        rows
            `(n,)` planned tiles of the unit.
        features
            `(n, D)`.
        errors
            Place in the unit -> reason, for each tile that has none.

        Returns
        -------
        int
            Bytes before compression.

        Raises
        ------
        StoreError
            Other shapes than the store's, or a tile without an error has features that are not finite.
        """
        failed = np.zeros(len(rows), bool)
        failed[list(errors)] = True
        expected = (len(rows), self.info.features)
        if features.shape != expected or not np.isfinite(features[~failed]).all():
            msg = f"{self.path}: features of tile {rows[0]} on are {features.shape}; expected {expected}, finite"
            raise StoreError(msg)
        texts = np.zeros((len(rows), ERROR_BYTES), np.uint8)
        for row, reason in errors.items():
            texts[row] = encode_reason(reason)
        status = np.where(failed, TileStatus.FAILED, TileStatus.DONE).astype(np.uint8)
        unit = self.info.spec.unit
        return (
            write_chunk(self._array("embed_error"), rows, texts, unit)
            + write_chunk(self._array("features"), rows, np.where(failed[:, None], np.nan, features), unit)
            + write_chunk(self._array("status/embed"), rows, status, unit, TileStatus.LEFT_OUT)
        )

    def fail_unit(self, rows: NDArray[np.int64], reason: str) -> None:
        """Mark every tile of a unit that the pool gave up as failed (the driver does this)."""
        nothing = np.full((len(rows), self.info.features), np.nan, np.float32)
        self.write_unit(rows, nothing, dict.fromkeys(range(len(rows)), f"given up by the pool: {reason}"))

    def rows(self) -> NDArray[np.int64]:
        """`(n,)` tiles of the bag, in the order of the plan: those that have features.

        Raises
        ------
        StoreError
            A unit is not embedded yet.
        """
        if pending := self.pending_units():
            msg = f"{self.path}: the bag is asked for while {len(pending)} units are not embedded; run again"
            raise StoreError(msg)
        return np.flatnonzero(self.statuses() == TileStatus.DONE).astype(np.int64)

    def features(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, D)` of some tiles, ascending."""
        return self._rows("features", rows)

    def errors(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Place in `rows` -> why the tile has no features."""
        failed = np.flatnonzero(
            read_rows(self._array("status/embed"), rows, self.info.spec.unit) == TileStatus.FAILED
        )
        texts = reasons(self._rows("embed_error", rows[failed]))
        return dict(zip(failed.tolist(), texts, strict=True))

    def write_gradient(self, target: int, rows: NDArray[np.int64], values: NDArray[np.float32]) -> int:
        """Write one target's gradient `(n, D)` by the features of some tiles of the bag, ascending."""
        return self._write("gradient", rows, values[:, None], target)

    def write_attribution(
        self,
        rows: NDArray[np.int64],
        relevance: Mapping[str, NDArray[np.float32]],
        inside: NDArray[np.uint8] | None,
        report: BagReport,
    ) -> int:
        """Write what is said of the bag, then its report, which says that it is attributed; gradients come before.

        Parameters
        ----------
        rows
            `(n,)` tiles of the bag, ascending.
        relevance
            Bag method -> `(n, T)`.
        inside
            `(n,)` `Inside`; None where no tile is explained inside.
        report
            The decision.

        Returns
        -------
        int
            Bytes before compression.

        Raises
        ------
        StoreError
            Another shape than the store's, or values that are not finite.
        """
        written = sum(self._write(f"relevance/{name}", rows, values) for name, values in relevance.items())
        if inside is not None:
            written += self._write("inside", rows, inside)
        cast("Any", self._group["bag"]).attrs[_REPORT] = report.model_dump(mode="json")
        return written

    def _write(
        self, name: str, rows: NDArray[np.int64], values: NDArray[Any], target: int | None = None
    ) -> int:
        """Write a whole array, or one target of it, chunk by chunk; fill where there is no row."""
        array, unit, written = self._array(name), self.info.spec.unit, 0
        expected = (len(rows), *((1, *array.shape[2:]) if target is not None else array.shape[1:]))
        if values.shape != expected or not np.isfinite(values).all():
            msg = f"{self.path}: {name} of the bag is {values.shape}; expected {expected}, finite"
            raise StoreError(msg)
        place = () if target is None else (slice(target, target + 1),)
        for first in range(0, self.info.planned, unit):
            stop = min(first + unit, self.info.tiles)
            a, b = np.searchsorted(rows, [first, stop]).tolist()
            chunk = np.full((stop - first, *expected[1:]), array.fill_value, array.dtype)
            chunk[rows[a:b] - first] = values[a:b]
            array[(slice(first, stop), *place)] = chunk
            written += chunk.nbytes
        return written

    def report(self) -> BagReport | None:
        """What was decided; None until the bag is attributed."""
        found = cast("Any", self._group["bag"]).attrs.get(_REPORT)
        return None if found is None else BagReport.model_validate(found)

    def relevance(self, method: str, target: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n,)` of some tiles, ascending."""
        return self._rows(f"relevance/{method}", rows)[:, target]

    def gradient(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, T, D)` of each target by the features of some tiles, ascending."""
        return self._rows("gradient", rows)

    def inside(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(n,)` which tiles are explained inside."""
        if not self.info.spec.cam.methods:
            return np.zeros(len(rows), bool)
        return np.asarray(self._rows("inside", rows) != Inside.NO)

    def failures(self, boxes: NDArray[np.int64]) -> tuple[TileFailure, ...]:
        """Tiles that have no features, with their `boxes` `(N, 2, axes)` and reasons, by index."""
        rows = np.flatnonzero(self.statuses() == TileStatus.FAILED)
        texts = reasons(self._rows("embed_error", rows))
        return tuple(
            TileFailure(tile=row, box=Box(frame="l0", start=tuple(a), stop=tuple(b)), reason=text)
            for row, (a, b), text in zip(rows.tolist(), boxes[rows].tolist(), texts, strict=True)
        )

    def failed(self) -> bool:
        """Whether a tile has no features."""
        return bool((self.statuses() == TileStatus.FAILED).any())

    def reset_failed(self) -> None:
        """Set units that hold a failed tile back to pending, and forget the decision: another bag, another decision.

        Clear what was made of the decision first. Only while no worker runs.
        """
        status = self.statuses()
        unit = np.arange(len(status)) // self.info.spec.unit
        again = np.isin(unit, unit[status == TileStatus.FAILED]) & (status != TileStatus.LEFT_OUT)
        cast("Any", self._group["bag"]).attrs.put({})
        status[again] = TileStatus.PENDING
        self._array("status/embed")[:] = status
