"""`tiles.zarr`: every tile's box, state, scores and raw maps; the ledger of a run.

One unit is one chunk along the tile axis, written whole by one task, its `status` last. A worker writes only
chunks of its own unit: nothing here is read, changed and written back by two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.errors import StoreError
from schemas.explanation import MapFlag
from schemas.geometry import Box
from schemas.heatmap import TileStatus
from schemas.run import Counts, TileFailure, TilesInfo
from workers.store.folders import move_aside, new_folder, read_ledger, sweep_partials
from workers.store.layout import DEVICES, ERROR_TABLE, write_tiles
from workers.store.rows import ERROR_BYTES, encode_reason, read_rows, reasons, write_chunk


class TilesStore:
    """An open `tiles.zarr`. Make one with `create` (the driver) or `open` (workers)."""

    def __init__(self, path: Path, group: zarr.Group, info: TilesInfo) -> None:
        self.path = path
        self.info = info
        self._group = group
        self._arrays: dict[str, Any] = {}

    @classmethod
    def create(
        cls, path: str | Path, info: TilesInfo, boxes: NDArray[np.int64], *, fresh: bool = False
    ) -> Self:
        """Make the store, or open the one that the same request left there.

        Parameters
        ----------
        path
            Folder of the store.
        info
            What is computed; rows from `info.planned` on are marked as left out.
        boxes
            `(N, 2, axes)` level-0 boxes, planned tiles first.
        fresh
            Move whatever gigacam store lies there aside (`<name>.old-N`) and begin anew.

        Raises
        ------
        StoreError
            The folder holds another request's tiles (the fields that differ are named), other boxes for the
            same request, or no store of ours.
        """
        path = Path(path)
        shape = (info.tiles, 2, len(info.lattice.shape_l0))
        if boxes.shape != shape or info.units != -(-info.planned // info.spec.unit):
            msg = f"{path}: boxes {boxes.shape}, {info.units} units; expected {shape}, ceil(planned / unit) units"
            raise StoreError(msg)
        ledger = read_ledger(path, "lattice")
        if ledger is not None and fresh:
            move_aside(path)
            ledger = None
        if ledger is None:
            with new_folder(path) as draft:
                write_tiles(draft, info, boxes)
            return cls.open(path, "r+")
        if ledger.get("tiles_id") != info.tiles_id:
            fields = differing_fields(ledger.get("spec", {}), info.spec.model_dump(mode="json"))
            msg = (
                f"{path}: holds tiles of another request, it differs in "
                f"{'; '.join(fields) or 'no field (made by another version)'}. "
                "Ask for the same, choose another output folder, or use --fresh, which moves this one aside"
            )
            raise StoreError(msg)
        store = cls.open(path, "r+")
        store._resume(info, boxes)
        return store

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a tiles store lies at `path`; StoreError where something else does."""
        return read_ledger(Path(path), "lattice") is not None

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r") -> Self:
        """Open an existing store.

        Raises
        ------
        StoreError
            There is none, or it is of another version.
        """
        path = Path(path)
        ledger = read_ledger(path, "lattice")
        if ledger is None:
            msg = f"{path}: no tiles store; expected the tiles.zarr of an explained image"
            raise StoreError(msg)
        try:
            info = TilesInfo.model_validate(ledger)
        except ValidationError as error:
            msg = f"{path}: its ledger is not of this version of gigacam ({error}); use --fresh to begin anew"
            raise StoreError(msg) from error
        group = zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)
        return cls(path, group, info)

    def _resume(self, info: TilesInfo, boxes: NDArray[np.int64]) -> None:
        changed = [
            name
            for name in ("lattice", "classes", "planned", "tiles", "units")
            if getattr(self.info, name) != getattr(info, name)
        ]
        if not changed and not np.array_equal(self._boxes, boxes):
            changed = ["boxes"]
        if changed:
            msg = (
                f"{self.path}: the same request now plans other tiles ({', '.join(changed)} differ; made with "
                f"{self.info.versions}, now {info.versions}); use --fresh, which moves the store aside"
            )
            raise StoreError(msg)
        sweep_partials(self.path)
        if self.info.image.uri != info.image.uri:  # the same image, moved since
            self.info = self.info.model_copy(update={"image": info.image})
            self._group.attrs["gigacam"] = self.info.model_dump(mode="json")

    def _array(self, name: str) -> Any:
        if name not in self._arrays:  # opening reads metadata, which never changes
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    @cached_property
    def _boxes(self) -> NDArray[np.int64]:
        return cast("NDArray[np.int64]", self._array("box")[:])

    def boxes(self, rows: NDArray[Any] | None = None) -> NDArray[np.int64]:
        """`(n, 2, axes)` level-0 boxes of some tiles, or of all: planned ones first."""
        return self._boxes if rows is None else self._boxes[rows]

    def unit_rows(self, unit: int) -> NDArray[np.int64]:
        """`(n,)` planned tiles of a unit, ascending."""
        if not 0 <= unit < self.info.units:
            msg = f"{self.path}: unit {unit} does not exist; expected 0 to {self.info.units - 1}"
            raise StoreError(msg)
        size = self.info.spec.unit
        return np.arange(unit * size, min((unit + 1) * size, self.info.planned), dtype=np.int64)

    def write_unit(
        self,
        unit: int,
        scores: NDArray[np.float32],
        target_index: NDArray[np.int32],
        maps: Mapping[str, NDArray[np.float32]],
        errors: Mapping[int, str],
        flags: Mapping[str, NDArray[np.uint8]] | None = None,
        device: str = "",
        outside: NDArray[np.bool_] | None = None,
    ) -> int:
        """Write all of a unit, `status` last; the same values give the same bytes, however often.

        Parameters
        ----------
        unit
            Which.
        scores
            `(n, class)` raw outputs of its planned tiles.
        target_index
            `(n, target)` class that each map explains.
        maps
            Method -> `(n, target, *grid)`.
        errors
            Place in the unit (0 to n - 1) -> reason, for each tile that has no map; its values are not stored.
        flags
            Method -> `(n, target)`, bits of `MapFlag`; None: no flag.
        device
            Kind of device it was computed on, one of `DEVICES`.
        outside
            `(n,)` tiles of a bag that are not explained inside, by choice: they have no map.

        Returns
        -------
        int
            Bytes before compression.

        Raises
        ------
        StoreError
            A shape or method is not the store's, or a tile without an error has a map that is not finite.
        """
        rows = self.unit_rows(unit)
        failed = np.zeros(len(rows), bool)
        failed[list(errors)] = True
        finite = ~failed if outside is None else ~(failed | outside)
        columns: dict[str, NDArray[Any]] = {"target_index": target_index}
        if "scores" in self._group:
            columns["scores"] = scores
        columns.update({f"maps/{name}": values for name, values in maps.items()})
        if set(maps) != set(self.info.grids):
            msg = f"{self.path}: maps of {sorted(maps)}; expected {sorted(self.info.grids)}"
            raise StoreError(msg)
        for name in maps:
            columns[f"flags/{name}"] = (
                flags[name] if flags else np.zeros((len(rows), target_index.shape[1]), np.uint8)
            )
        columns["device"] = np.full(len(rows), DEVICES.index(device), np.uint8)
        codes = np.zeros(len(rows), np.uint8)
        texts = np.zeros((len(rows), ERROR_BYTES), np.uint8)
        for row, reason in errors.items():
            codes[row], texts[row] = _code(reason), encode_reason(reason)
        columns |= {"error": codes, "error_text": texts}
        for name, values in columns.items():
            expected = (len(rows), *self._array(name).shape[1:])
            if values.shape != expected:
                msg = f"{self.path}: unit {unit}, {name} is {values.shape}; expected {expected}"
                raise StoreError(msg)
            if name.startswith("maps/") and not np.isfinite(values[finite]).all():
                msg = (
                    f"{self.path}: unit {unit}, {name}: a tile without an error has a map that is not finite"
                )
                raise StoreError(msg)
        status = np.where(failed, TileStatus.FAILED, TileStatus.DONE).astype(np.uint8)
        written = 0
        for name, values in columns.items():
            if not name.startswith("error"):
                values = np.where(
                    failed.reshape(-1, *(1,) * (values.ndim - 1)), self._array(name).fill_value, values
                )
            written += self._write_rows(name, rows, values)
        return written + self._write_rows("status/explain", rows, status, TileStatus.LEFT_OUT)

    def _write_rows(
        self, name: str, rows: NDArray[np.int64], values: NDArray[Any], rest: int | None = None
    ) -> int:
        return write_chunk(self._array(name), rows, values, self.info.spec.unit, rest)

    def fail_unit(self, unit: int, reason: str) -> None:
        """Mark every tile of a unit that the pool gave up as failed (the driver does this)."""
        n = len(self.unit_rows(unit))
        self.write_unit(
            unit,
            np.full((n, len(self.info.classes)), np.nan, np.float32),
            np.full((n, len(self.info.spec.cam.targets)), -1, np.int32),
            {
                m: np.full((n, *self._array(f"maps/{m}").shape[1:]), np.nan, np.float32)
                for m in self.info.grids
            },
            dict.fromkeys(range(n), f"given up by the pool: {reason}"),
        )

    def statuses(self) -> NDArray[np.uint8]:
        """`(N,)` `TileStatus` of every tile, as it is on disk now."""
        return cast("NDArray[np.uint8]", self._array("status/explain")[:])

    def statuses_of(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`(n,)` `TileStatus` of some tiles; only their chunks are read."""
        return self._rows("status/explain", rows)

    def maps_of(self, method: str, target: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, *grid)` raw maps of some tiles (ascending) for one target; only their chunks are read."""
        return self._rows(f"maps/{method}", rows, target)

    def flags_of(self, method: str, target: int, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`(n,)` bits of `MapFlag` of some tiles' maps (ascending) for one target."""
        return self._rows(f"flags/{method}", rows)[:, target]

    def _rows(self, name: str, rows: NDArray[np.int64], *rest: int) -> NDArray[Any]:
        return read_rows(self._array(name), rows, self.info.spec.unit, *rest)

    def done_rows(self) -> NDArray[np.bool_]:
        """`(N,)` which tiles have a map."""
        return np.asarray(self.statuses() == TileStatus.DONE)

    def scores(self) -> NDArray[np.float32]:
        """`(N, class)` raw outputs of all tiles; NaN where there are none."""
        if "scores" not in self._group:
            return np.empty((self.info.tiles, 0), np.float32)
        return cast("NDArray[np.float32]", self._array("scores")[:])

    def target_index(self) -> NDArray[np.int32]:
        """`(N, target)` class that each map explains; -1 where there is no map."""
        return cast("NDArray[np.int32]", self._array("target_index")[:])

    def flag_counts(self) -> dict[str, int]:
        """How many maps of computed tiles carry each flag: `gradcam empty` -> 12."""
        done, counts = self.done_rows(), {}
        for method in self.info.grids:
            bits = self._array(f"flags/{method}")[:][done]
            for flag in MapFlag:
                if count := int(((bits & int(flag)) > 0).sum()):
                    counts[f"{method} {flag.label}"] = count
        return counts

    def devices(self) -> tuple[str, ...]:
        """Kinds of device that tiles were computed on."""
        codes = np.unique(self._array("device")[:][self.done_rows()])
        return tuple(DEVICES[code] for code in codes if code)

    def pending_units(self) -> list[int]:
        """Units that have a tile not yet done or failed, ascending."""
        pending = np.flatnonzero(self.statuses() == TileStatus.PENDING)
        return cast("list[int]", np.unique(pending // self.info.spec.unit).tolist())

    def counts(self) -> Counts:
        """Tiles by state."""
        status = self.statuses()
        done, failed, left_out = (
            int((status == s).sum()) for s in (TileStatus.DONE, TileStatus.FAILED, TileStatus.LEFT_OUT)
        )
        return Counts(planned=self.info.planned, done=done, failed=failed, left_out=left_out)

    def failures(self) -> tuple[TileFailure, ...]:
        """Failed tiles with their boxes and reasons, by index."""
        rows = np.flatnonzero(self.statuses() == TileStatus.FAILED)
        texts = reasons(self._rows("error_text", rows))
        return tuple(
            TileFailure(
                tile=row,
                box=Box(frame="l0", start=tuple(box[0]), stop=tuple(box[1])),
                reason=text,
            )
            for row, box, text in zip(rows.tolist(), self._boxes[rows].tolist(), texts, strict=True)
        )

    def failed_boxes(self) -> NDArray[np.int64]:
        """`(n, 2, axes)` level-0 boxes of the failed tiles."""
        return cast("NDArray[np.int64]", self._boxes[self.statuses() == TileStatus.FAILED])

    def retry_boxes(self) -> NDArray[np.int64]:
        """`(n, 2, axes)` level-0 boxes of every tile that a retry computes again: the units of the failed ones."""
        return self._boxes[self._retried()]

    def reset_failed(self) -> None:
        """Set the units that hold a failed tile back to pending, whole: a retry may fail where it did not before.

        Clear the heatmap blocks of `retry_boxes()` first: killed in between, a run then finds blocks to
        stitch again and nothing stale. Only while no worker runs.
        """
        retried = self._retried()
        if retried.any():
            status = self.statuses()
            status[retried] = TileStatus.PENDING
            self._array("status/explain")[:] = status

    def reset(self) -> None:
        """Set all planned tiles back to pending; clear the whole heatmap first. Only while no worker runs."""
        self._array("status/explain")[: self.info.planned] = TileStatus.PENDING

    def _retried(self) -> NDArray[np.bool_]:
        status = self.statuses()
        unit = np.arange(len(status)) // self.info.spec.unit
        again: NDArray[np.bool_] = np.isin(unit, unit[status == TileStatus.FAILED])
        again &= status != TileStatus.LEFT_OUT
        return again


def _code(reason: str) -> int:
    """Place in `ERROR_TABLE`."""
    return next((i for i, short in enumerate(ERROR_TABLE) if i > 1 and reason.startswith(short)), 1)


def differing_fields(found: Any, expected: Any, name: str = "") -> list[str]:
    """Dotted names of the leaves in which two JSON values differ, each with both values."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return [
            line
            for key in sorted({*found, *expected})
            for line in differing_fields(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == expected else [f"{name} (there {found!r}, asked {expected!r})"]
