"""The arrays of methods that need the whole image: what each group of units summed, and what was solved.

They lie in `tiles.zarr`. A group's sums are written whole by one task, its `status/collect` last; a method's state by one
task, the numbers in its attributes last, which say that it is solved. Once solved, a state stays: a tile that is computed
again later is explained by it, and how many tiles it was made of is written beside it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from schemas.errors import StoreError
from schemas.explanation import Reduction, SolvedState
from schemas.heatmap import TileStatus
from schemas.run import TilesInfo

GROUPS_MOST = 32
"""Groups of units an image, so that what they sum stays bounded on disk: of 2048 channels 32 MiB each a target.

Another number adds up in another order: raise `ALGORITHM_VERSION` with it."""
_COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
_SOLVED = "solved"


def group_count(units: int) -> int:
    """Into how many groups the units of an image are summed."""
    return min(units, GROUPS_MOST)


def group_rows(group: int, info: TilesInfo) -> NDArray[np.int64]:
    """`(n,)` planned tiles of a group: those of contiguous units, ascending."""
    groups = group_count(info.units)
    if not 0 <= group < groups:
        msg = f"group {group} does not exist; expected 0 to {groups - 1}"
        raise StoreError(msg)
    first, end = (g * info.units // groups * info.spec.unit for g in (group, group + 1))
    return np.arange(first, min(end, info.planned), dtype=np.int64)


def reduction_targets(reduction: Reduction, info: TilesInfo) -> int:
    """How many sums and states of a method there are."""
    return len(info.spec.cam.targets) if reduction.per_target else 1


def collected_bytes(info: TilesInfo) -> int:
    """What the sums of all groups take at most while an image is computed, before compression."""
    one = sum(reduction_targets(r, info) * math.prod(r.collected) for r in info.reductions.values())
    return 8 * one * group_count(info.units)


def write_reductions(root: zarr.Group, info: TilesInfo) -> None:
    """The arrays of a new store, if its request has such a method."""
    if not info.reductions:
        return
    groups = group_count(info.units)

    def array(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: float) -> None:
        root.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=fill, compressors=_COMPRESSOR
        )

    array("status/collect", (groups,), (1,), "uint8", TileStatus.PENDING)
    for method, reduction in info.reductions.items():
        n = reduction_targets(reduction, info)
        shape = (groups, n, *reduction.collected)
        array(f"collected/{method}", shape, (1, 1, *reduction.collected), "float64", math.nan)
        array(f"state/{method}", (n, *reduction.state), (n, *reduction.state), "float64", math.nan)


class Reductions:
    """The sums and states of an open `tiles.zarr`.

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

    def rows(self, group: int) -> NDArray[np.int64]:
        """`(n,)` planned tiles of a group, see `group_rows`."""
        return group_rows(group, self.info)

    def pending_groups(self) -> list[int]:
        """Groups not yet summed or given up, ascending."""
        return np.flatnonzero(self._statuses() == TileStatus.PENDING).tolist()

    def given_up(self) -> list[int]:
        """Groups that the pool gave up: their tiles are in no state."""
        return np.flatnonzero(self._statuses() == TileStatus.FAILED).tolist()

    def _statuses(self) -> NDArray[np.uint8]:
        return cast("NDArray[np.uint8]", self._array("status/collect")[:])

    def _array(self, name: str) -> Any:
        return self._group[name]

    def write_group(self, group: int, sums: Mapping[str, NDArray[np.float64]]) -> int:
        """Write what a group adds up to, `status` last; the same values give the same bytes, however often.

        Parameters
        ----------
        group
            Which.
        sums
            Method -> `(T or 1, *sum)`.

        Returns
        -------
        int
            Bytes before compression.

        Raises
        ------
        StoreError
            A shape or method is not the store's, or a sum is not finite.
        """
        if set(sums) != set(self.info.reductions):
            msg = f"{self.path}: sums of {sorted(sums)}; expected {sorted(self.info.reductions)}"
            raise StoreError(msg)
        written = 0
        for method, values in sums.items():
            array = self._array(f"collected/{method}")
            if values.shape != array.shape[1:] or not np.isfinite(values).all():
                msg = f"{self.path}: group {group} of {method} is {values.shape}; expected {array.shape[1:]}, finite"
                raise StoreError(msg)
            for target, one in enumerate(values):
                array[group, target] = one
            written += values.nbytes
        self._array("status/collect")[group] = TileStatus.DONE
        return written

    def fail_group(self, group: int) -> None:
        """Mark a group that the pool gave up: it is left out of the sums (the driver does this)."""
        self._array("status/collect")[group] = TileStatus.FAILED

    def total(self, method: str, target: int) -> NDArray[np.float64]:
        """`(*sum)` over all groups that are there, added in the order of their index.

        Raises
        ------
        StoreError
            A group is not yet summed.
        """
        if pending := self.pending_groups():
            msg = (
                f"{self.path}: {method} is to be solved while {len(pending)} groups are not summed; run again"
            )
            raise StoreError(msg)
        array = self._array(f"collected/{method}")
        total = np.zeros(array.shape[2:])
        for group in np.flatnonzero(self._statuses() == TileStatus.DONE).tolist():
            total += array[group, target]
        return total

    def write_state(self, method: str, state: NDArray[np.float64], solved: Sequence[SolvedState]) -> int:
        """Write a method's state `(T or 1, *state)`, then the numbers of each target, which say that it is there."""
        array = self._array(f"state/{method}")
        if state.shape != array.shape or len(solved) != len(state):
            msg = f"{self.path}: the state of {method} is {state.shape}; expected {array.shape}"
            raise StoreError(msg)
        array[:] = state
        array.attrs[_SOLVED] = [one.model_dump(mode="json") for one in solved]
        return state.nbytes

    def solved(self, method: str) -> tuple[SolvedState, ...]:
        """What was solved for each target; empty if it is not."""
        numbers = self._array(f"state/{method}").attrs.get(_SOLVED, [])
        return tuple(SolvedState.model_validate(one) for one in numbers)

    def unsolved(self) -> list[str]:
        """Methods whose state is not there yet."""
        return [method for method in self.info.reductions if not self.solved(method)]

    def state(self, method: str) -> NDArray[np.float64]:
        """`(T or 1, *state)`.

        Raises
        ------
        StoreError
            It is not solved yet.
        """
        if not self.solved(method):
            msg = f"{self.path}: {method} is not solved yet; run again"
            raise StoreError(msg)
        return cast("NDArray[np.float64]", self._array(f"state/{method}")[:])

    def retry(self) -> None:
        """Set groups that were given up back to pending, as long as nothing is solved of the others."""
        status = self._statuses()
        if len(self.unsolved()) == len(self.info.reductions) and (status == TileStatus.FAILED).any():
            status[status == TileStatus.FAILED] = TileStatus.PENDING
            self._array("status/collect")[:] = status

    def drop_collected(self) -> None:
        """Delete the sums, which nothing reads once all states are there; only while no worker runs."""
        for method in self.info.reductions:
            shutil.rmtree(self.path / "collected" / method / "c", ignore_errors=True)
