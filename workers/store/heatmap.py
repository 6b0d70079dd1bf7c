"""`heatmap.ome.zarr`: the stitched channels, their coverage and peaks, and which blocks are written.

A block is one shard of one level, written whole by one task, its `blocks/<level>` entry last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.errors import StoreError
from schemas.heatmap import Coverage
from schemas.ngff import ImageAttributes
from schemas.run import BlockTask, HeatmapInfo
from workers.stitching.grid import Block, all_blocks, block_box, blocks_touched, parent
from workers.store.folders import move_aside, new_folder, read_ledger, remove, sweep_partials
from workers.store.layout import dumped, has_peak, heatmap_attributes, write_heatmap
from workers.store.ngff import peak_attributes

if TYPE_CHECKING:
    import dask.array as da


class HeatmapStore:
    """An open `heatmap.ome.zarr`. Make one with `create` (the driver) or `open` (workers, viewers)."""

    def __init__(self, path: Path, group: zarr.Group, info: HeatmapInfo) -> None:
        self.path = path
        self.info = info
        self.grid = info.grid
        self._group = group
        self._arrays: dict[str, Any] = {}

    @classmethod
    def create(cls, path: str | Path, info: HeatmapInfo, name: str = "", *, fresh: bool = False) -> Self:
        """Make the store; or open the one of the same run; or replace one of the same tiles stitched otherwise.

        Parameters
        ----------
        path
            Folder of the store.
        info
            What is stitched.
        name
            Name of the image in viewers; empty: that of the folder it lies in.
        fresh
            Move whatever gigacam store lies there aside (`<name>.old-N`) and begin anew.

        Raises
        ------
        StoreError
            The folder holds a heatmap of other tiles, or no store of ours.
        """
        path = Path(path)
        ledger = read_ledger(path, "run_id")
        if ledger is not None and fresh:
            move_aside(path)
            ledger = None
        if ledger is not None and ledger.get("tiles_id") != info.tiles_id:
            msg = (
                f"{path}: holds a heatmap of other tiles ({ledger.get('tiles_id')}, asked {info.tiles_id}); "
                "choose another output folder, or use --fresh, which moves this one aside"
            )
            raise StoreError(msg)
        if ledger is not None and ledger["run_id"] != info.run_id:
            remove(path)
            ledger = None
        if ledger is None:
            with new_folder(path) as draft:
                write_heatmap(draft, info, name or path.absolute().parent.name)
        else:
            sweep_partials(path)
        return cls.open(path, "r+")

    @staticmethod
    def move_aside(path: str | Path) -> None:
        """Rename the heatmap at `path`, if there is one, to `<name>.old-N`; StoreError where something else lies."""
        if read_ledger(Path(path), "run_id") is not None:
            move_aside(Path(path))

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r") -> Self:
        """Open an existing store.

        Raises
        ------
        StoreError
            There is none, or it is of another version.
        """
        path = Path(path)
        ledger = read_ledger(path, "run_id")
        if ledger is None:
            msg = f"{path}: no heatmap; expected the heatmap.ome.zarr of an explained image"
            raise StoreError(msg)
        ledger.pop("registration", None)
        try:
            info = HeatmapInfo.model_validate(ledger)
        except ValidationError as error:
            msg = f"{path}: its ledger is not of this version of gigacam ({error}); use --fresh to begin anew"
            raise StoreError(msg) from error
        group = zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)
        return cls(path, group, info)

    @property
    def has_peak(self) -> bool:
        return has_peak(self.info)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:  # opening reads metadata, which never changes
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    def image(self, level: int) -> Any:
        """The `(c, *S)` float32 Zarr array of a level."""
        return self._array(str(level))

    def peak(self, level: int) -> Any:
        """The `(c, *S)` float32 Zarr array of the peaks at a level from 1 on."""
        return self._array(f"peak/{level}")

    def coverage(self, level: int, channel: int | None = None) -> Any:
        """The `(*S)` uint8 Zarr array of `Coverage` at a level; of a channel, where channels differ."""
        return self.label(
            "coverage" if channel is None else self.info.label_of(self.info.channels[channel]), level
        )

    def label(self, name: str, level: int) -> Any:
        """The `(*S)` uint8 Zarr array of one of `HeatmapInfo.labels` at a level."""
        return self._array(f"labels/{name}/{level}")

    def as_dask(self, level: int = 0, channel: int | None = None) -> da.Array:
        """A level as a lazy dask array `(c, *S)`, or `(*S)` of one channel; one shard a chunk."""
        import dask.array as da

        array = self.image(level)
        lazy: da.Array = da.from_array(
            array, chunks=array.shards, meta=np.empty((0,) * array.ndim, array.dtype)
        )
        return lazy if channel is None else cast("da.Array", lazy[channel])

    def write_block(
        self,
        level: int,
        block: Block,
        coverage: NDArray[np.uint8],
        channels: Iterable[NDArray[np.float32]],
        peaks: Iterable[NDArray[np.float32]] = (),
        inside: NDArray[np.uint8] | None = None,
    ) -> int:
        """Write one whole block, its ledger entry last; the same values give the same bytes, however often.

        Parameters
        ----------
        level, block
            Which.
        coverage
            `(*block)` uint8 of `Coverage`.
        channels
            `(*block)` of each channel, in order; consumed one at a time.
        peaks
            The same for `peak/`, where the store has one and the level is above 0.
        inside
            `(*block)` uint8 of `Coverage` for the channels of maps inside some of the tiles, where there are such.

        Returns
        -------
        int
            Bytes before compression.

        Raises
        ------
        StoreError
            The block does not exist, values do not fill it exactly, channels are missing, or a px is finite
            without being evaluated (or the reverse).
        """
        counts = self.grid.blocks(level) if 0 <= level < len(self.grid.levels) else ()
        if len(block) != len(counts) or not all(0 <= b < n for b, n in zip(block, counts, strict=True)):
            msg = f"{self.path}: level {level} has no block {block}; it has {counts} an axis"
            raise StoreError(msg)
        start, stop = block_box(self.grid, level, block).tolist()
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        labels = {"coverage": coverage} | ({} if inside is None else {"inside": inside})
        if tuple(labels) != self.info.labels:
            msg = f"{self.path}: level {level} block {block} is given {', '.join(labels)}; expected {', '.join(self.info.labels)}"
            raise StoreError(msg)
        written = sum(self._write_region(f"labels/{n}/{level}", region, codes) for n, codes in labels.items())
        evaluated = {name: codes == Coverage.EVALUATED for name, codes in labels.items()}
        groups = [(str(level), channels)]
        if level > 0 and self.has_peak:
            groups.append((f"peak/{level}", peaks))
        for name, values_of in groups:
            count = 0
            for values in values_of:
                if count == len(self.info.channels):
                    msg = f"{self.path}: {name} block {block}: more than {count} channels were given"
                    raise StoreError(msg)
                expected = evaluated[self.info.label_of(self.info.channels[count])]
                if values.shape == expected.shape and not np.array_equal(np.isfinite(values), expected):
                    msg = f"{self.path}: {name} block {block} channel {count}: finite and evaluated px differ"
                    raise StoreError(msg)
                written += self._write_region(name, (count, *region), values)
                count += 1
            if count != len(self.info.channels):
                msg = (
                    f"{self.path}: {name} block {block}: {count} channels; expected {len(self.info.channels)}"
                )
                raise StoreError(msg)
        self._array(f"blocks/{level}")[block] = 1
        return written

    def _write_region(self, name: str, region: tuple[int | slice, ...], values: NDArray[Any]) -> int:
        """Write whole shards only: two writers of one shard would lose each other's data without a word."""
        array = self._array(name)
        for part, shard, size in zip(region, array.shards, array.shape, strict=True):
            a, b = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
            if a % shard or not (b % shard == 0 or b == size):
                msg = f"{self.path}: unaligned write of {region} to {name}; expected whole shards {array.shards}"
                raise StoreError(msg)
        expected = tuple(s.stop - s.start for s in region if isinstance(s, slice))
        if values.shape != expected or values.dtype != array.dtype:
            msg = (
                f"{self.path}: unaligned write to {name} at {region}: values are {values.dtype} {values.shape}, "
                f"the block is {array.dtype} {expected}"
            )
            raise StoreError(msg)
        array[region] = values
        return values.nbytes

    def done_blocks(self, level: int) -> set[Block]:
        """Which blocks of a level are written, as it is on disk now."""
        return {tuple(block) for block in np.argwhere(self._array(f"blocks/{level}")[:] != 0).tolist()}

    def is_done(self, level: int, block: Block) -> bool:
        """Whether one block is written."""
        return bool(self._array(f"blocks/{level}")[block] != 0)

    def pending_blocks(self) -> list[BlockTask]:
        """Blocks not yet written, finest level first."""
        tasks = []
        for level in range(len(self.grid.levels)):
            done = self.done_blocks(level)
            tasks += [BlockTask(level=level, block=b) for b in all_blocks(self.grid, level) if b not in done]
        return tasks

    def clear_blocks(self, boxes: NDArray[np.int64]) -> list[BlockTask]:
        """Mark the blocks that level-0 boxes touch, and all above them, as not written; values stay till then.

        Parameters
        ----------
        boxes
            `(n, 2, axes)`.

        Returns
        -------
        list of BlockTask
            What was cleared, coarsest level first: killed in between, nothing coarse is left standing on
            something cleared. Only while no worker runs.
        """
        flat = np.unique(blocks_touched(self.grid, boxes)[1]).tolist()
        if not flat:
            return []
        count = self.grid.blocks(0)
        level_blocks = {tuple(int(i) for i in np.unravel_index(f, count)) for f in flat}
        tasks = [BlockTask(level=0, block=b) for b in sorted(level_blocks)]
        for level in range(len(self.grid.levels) - 1):
            level_blocks = {parent(self.grid, level, b) for b in level_blocks}
            tasks += [BlockTask(level=level + 1, block=b) for b in sorted(level_blocks)]
        self._write_info(self.info.model_copy(update={"complete": False}))
        tasks.reverse()
        for task in tasks:
            self._array(f"blocks/{task.level}")[task.block] = 0
        return tasks

    def publish(
        self, value_range: Sequence[tuple[float, float]], display: Sequence[tuple[float, float]]
    ) -> None:
        """Say that the heatmap is complete, and how it is shown.

        Parameters
        ----------
        value_range
            Smallest and largest raw value of each channel.
        display
            Display window of each channel; the stored values stay raw.

        Raises
        ------
        StoreError
            Blocks are missing, or a channel has no range.
        """
        if pending := self.pending_blocks():
            msg = f"{self.path}: {len(pending)} blocks are not written (first: {pending[0].key}); run again first"
            raise StoreError(msg)
        if not len(value_range) == len(display) == len(self.info.channels):
            msg = (
                f"{self.path}: {len(value_range)} value ranges and {len(display)} display windows; "
                f"expected one of each for the {len(self.info.channels)} channels"
            )
            raise StoreError(msg)
        update = {"complete": True, "value_range": tuple(value_range), "display": tuple(display)}
        self._write_info(HeatmapInfo.model_validate(self.info.model_dump() | update))

    def _write_info(self, info: HeatmapInfo) -> None:
        name = ImageAttributes.model_validate(self._group.attrs["ome"]).multiscales[0].name
        if self.has_peak:
            self._group["peak"].attrs.put({"ome": dumped(peak_attributes(info, name))})
        self._group.attrs.put(heatmap_attributes(info, name))
        self.info = info
