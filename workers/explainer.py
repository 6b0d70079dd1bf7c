"""One unit of tiles: pixels in, raw maps and scores out, to the store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import ModelError, StoreError
from schemas.explanation import Precision
from schemas.frozen import Frozen, digest
from schemas.run import Report, TilesInfo, UnitTask
from workers.allocator import keep_freed_memory
from workers.cam.explain import Explained, explain
from workers.cam.method import Solved
from workers.cam.targets import TileTarget, resolve
from workers.decoding import TileReader
from workers.models.adapter import ModelAdapter
from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.models.facts import identified
from workers.models.fast import make_fast
from workers.pool import Task
from workers.store.reductions import Reductions, reduction_targets
from workers.store.tiles import TilesStore

Ask = Callable[[Tensor, slice], Explained]
"""(prepared tiles `(B, C, *S)`, which of the rows asked for they are) -> what is found of them."""

DECODERS_MOST = 4
"""Decode threads beside a network that computes on the same cores."""


class ExplainInit(Frozen):
    """What an `Explainer` needs: where the ledger, the source and the model are, and how to run."""

    tiles: str
    """Path of `tiles.zarr`, which holds the specification."""
    tiles_id: str
    """Of the store that was planned: another one in its place is refused."""
    model: str
    """Path of the model card."""
    threads: int = 1
    """torch threads on a CPU."""
    device: str = "auto"


@lru_cache(maxsize=2)
def _model(
    card_path: str, card_digest: str, layer: str, device: str, tile: tuple[int, ...], precision: Precision
) -> ModelAdapter:
    """Load once a process, whichever image comes next; the digest is part of the key."""
    loaded = load_card(card_path)
    model = load_model(loaded, device=device, layer=layer, tile=tile)
    found = digest(identified(loaded.card, model))
    if found != card_digest:
        msg = (
            f"{card_path}: the card or its weights changed since the run was planned "
            f"(digest {found[:12]}, expected {card_digest[:12]}); restore it, or explain again with --fresh"
        )
        raise ModelError(msg)
    make_fast(model, precision, tile)
    return model


def pick_device(asked: str) -> str:
    """`auto` is CUDA where this process sees a device, else the CPU."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_summary() -> str:
    """Torch's version and the devices it sees."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, " + (", ".join(names) or "CPU only")


def open_planned(tiles: str, tiles_id: str) -> TilesStore:
    """The `tiles.zarr` that was planned; StoreError where another one is in its place."""
    store = TilesStore.open(tiles, mode="r+")
    if store.info.tiles_id != tiles_id:
        msg = (
            f"{tiles}: holds the tiles of another request (found {store.info.tiles_id[:12]}, "
            f"expected {tiles_id[:12]}); two runs write to one folder: run one at a time"
        )
        raise StoreError(msg)
    return store


def _stored_states(store: TilesStore) -> dict[str, tuple[Solved, ...]]:
    """What was solved for the whole image, by the methods that need it."""
    found = Reductions(store.path, store.info)
    cells = {name: int(np.prod(store.info.grids[name].shape)) for name in store.info.reductions}
    return {
        name: tuple(
            Solved(torch.from_numpy(state), s.tiles * cells[name], s.explained, s.doubtful)
            for state, s in zip(found.state(name), found.solved(name), strict=True)
        )
        for name in store.info.reductions
    }


def _any_states(info: TilesInfo) -> dict[str, tuple[Solved, ...]]:
    """States of no meaning, for timing."""
    return {
        name: (Solved(torch.zeros(r.state, dtype=torch.float64), 0.0, 0.0, False),)
        * reduction_targets(r, info)
        for name, r in info.reductions.items()
    }


class Explainer:
    """Computes units of one image; kept from task to task."""

    def __init__(self, init: ExplainInit) -> None:
        self._store = open_planned(init.tiles, init.tiles_id)
        self._tiles = TileComputer(self._store.info, init, _stored_states(self._store))
        self._unit: int | None = None
        """Being computed, or the last that was: a hint of it comes too late."""

    def run(self, task: Task) -> Report:
        """Compute every tile of the unit and write its chunks; a tile that cannot be read is recorded."""
        if not isinstance(task, UnitTask):
            msg = f"an explainer computes units; found {task!r}"
            raise TypeError(msg)
        began = time.perf_counter()
        self._unit = task.unit
        rows = self._store.unit_rows(task.unit)
        found = self._tiles.compute(self._store.boxes(rows), rows)
        clock = time.perf_counter()
        got = found.arrays
        written = self._store.write_unit(
            task.unit, got.scores, got.target_index, got.maps, found.errors, got.flags, self._tiles.device
        )
        seconds_by = {**found.seconds_by, "write": time.perf_counter() - clock}
        return Report(
            stage="explain",
            key=task.key,
            task=task,
            done=len(rows) - len(found.errors),
            failed=len(found.errors),
            seconds=time.perf_counter() - began,
            seconds_by=seconds_by,
            bytes_written=written,
            notes=found.notes,
            device=self._tiles.device,
        )

    def expect(self, task: Task) -> None:
        """Begin to decode the first mini-batch of a unit."""
        if isinstance(task, UnitTask) and task.unit != self._unit:
            self._tiles.reader.expect(self._store.boxes(self._store.unit_rows(task.unit)))

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self._tiles.close()


def tiles_per_second(info: TilesInfo, init: ExplainInit, boxes: NDArray[np.int64]) -> float:
    """Rate of one worker over `boxes` `(n, 2, axes)`, decoding included, after a first tile that is not counted."""
    tiles = TileComputer(info, init, _any_states(info))
    rows = np.arange(len(boxes))
    ask: Ask | None = None
    if info.features:
        v, seeds = torch.ones(len(boxes), len(info.spec.cam.targets), info.features), torch.from_numpy(rows)
        ask = lambda x, part: tiles.inside(x, v[part], seeds[part])  # noqa: E731
    try:
        tiles.compute(boxes[:1], rows[:1], ask)
        began = time.perf_counter()
        tiles.compute(boxes, rows, ask)
        return len(boxes) / (time.perf_counter() - began)
    finally:
        tiles.close()


@dataclass(frozen=True)
class Arrays:
    """Results of n tiles on the host."""

    scores: NDArray[np.float32]
    """`(n, C)`."""
    target_index: NDArray[np.int32]
    """`(n, T)`."""
    maps: dict[str, NDArray[np.float32]]
    """By method: `(n, T, *grid)`."""
    flags: dict[str, NDArray[np.uint8]]
    """By method: `(n, T)`, bits of `MapFlag`."""

    @classmethod
    def joined(cls, parts: Sequence[Arrays]) -> Arrays:
        """One after the other."""
        return cls(
            np.concatenate([p.scores for p in parts]),
            np.concatenate([p.target_index for p in parts]),
            {name: np.concatenate([p.maps[name] for p in parts]) for name in parts[0].maps},
            {name: np.concatenate([p.flags[name] for p in parts]) for name in parts[0].flags},
        )


@dataclass(frozen=True)
class Computed:
    """What a run of tiles gave; rows in `errors` are NaN."""

    arrays: Arrays
    errors: dict[int, str]
    seconds_by: dict[str, float]
    notes: tuple[str, ...]


class TileComputer:
    """Reads tiles of one image, ahead of the device, and explains them in mini-batches.

    Parameters
    ----------
    info, init
        What is computed, and where.
    states
        Of the methods that need the whole image.
    """

    def __init__(
        self, info: TilesInfo, init: ExplainInit, states: Mapping[str, Sequence[Solved]] | None = None
    ) -> None:
        self.info = info
        self._states = states or {}
        spec = info.spec
        self.device = pick_device(init.device)
        self.model = _model(
            init.model, digest(spec.card), spec.cam.layer, self.device, spec.grid.tile_px, spec.cam.precision
        )
        self.targets = resolve(spec.cam.targets, self.model.card.output, len(info.classes))
        # float32 is promised to 1e-5 on any device; TensorFloat-32, convolutions' default on a GPU, keeps three digits.
        torch.backends.cudnn.allow_tf32 = spec.cam.precision != "fp32"
        if self.device == "cpu":
            torch.set_num_threads(init.threads)
            keep_freed_memory()
            decoders = min(DECODERS_MOST, init.threads)
        else:
            # The host's threads are free while the device computes.
            decoders = int(os.environ.get("OMP_NUM_THREADS", DECODERS_MOST))
        self.reader = TileReader(info, decoders)

    def compute(self, boxes: NDArray[np.int64], rows: NDArray[np.int64], ask: Ask | None = None) -> Computed:
        """Explain the tiles at `boxes` `(n, 2, axes)`, n at least 1; `rows` `(n,)` number them in the plan.

        `ask` finds something else of them.
        """
        seeds = torch.from_numpy(rows)  # noise belongs to the tile, whichever worker computes it
        ask = ask or (lambda x, part: self._explained(x, seeds[part]))
        errors: dict[int, str] = {}
        notes: list[str] = []
        parts = {"decode": 0.0, "compute": 0.0}
        batches = []
        for first, pixels, bad in self.reader.batches(boxes, parts):
            errors.update({first + i: reason for i, reason in bad.items()})
            clock = time.perf_counter()
            batches.append(self._ask(pixels, first, ask, notes))
            parts["compute"] += time.perf_counter() - clock
        found = Arrays.joined(batches)
        reason = "the network gave values that are not finite"
        for name, states in self._states.items():
            if any(s.cells == 0 for s in states):
                reason = f"no tile of the image entered the sum that {name} needs"
        for row in _not_finite(found.scores, found.maps):
            errors.setdefault(int(row), f"non-finite map: {reason}")
        for row in errors:
            found.scores[row] = np.nan
            for values in found.maps.values():
                values[row] = np.nan
        return Computed(found, errors, parts, tuple(dict.fromkeys(notes)))

    def _explained(self, x: Tensor, seeds: Tensor) -> Explained:
        methods = self.info.spec.cam.methods
        return explain(self.model.net, x, self.targets, methods, seeds, states=self._states)

    def embedded(self, x: Tensor) -> Explained:
        """The scores of prepared tiles `(B, C, *S)` alone: of an encoder, its embedding."""
        none = torch.zeros(len(x), 0, dtype=torch.int32)
        with torch.no_grad():
            return Explained(self.model.scores(x).float(), none, {}, {})

    def inside(self, x: Tensor, v: Tensor, seeds: Tensor) -> Explained:
        """Maps of `<v, enc(x)>`: what a tile gives to each target of its bag, whose gradient by its features is v `(B, T, D)`."""
        cam = self.info.spec.cam
        targets = [TileTarget(name, v[:, t].to(x.device)) for t, name in enumerate(cam.targets)]
        return explain(self.model.net, x, targets, cam.methods, seeds)

    def _ask(self, pixels: NDArray[Any], first: int, ask: Ask, notes: list[str]) -> Arrays:
        """Ask of a mini-batch; on out-of-memory, in halves, which is noted since it changes the bits."""
        out = self._attempt(pixels, first, ask)
        if out is None:
            torch.cuda.empty_cache()
            half = -(-len(pixels) // 2)
            notes.append(f"out of device memory at batch {len(pixels)}: computed in halves")
            parts = (pixels[:half], first), (pixels[half:], first + half)
            return Arrays.joined([self._ask(*part, ask, notes) for part in parts])
        return Arrays(
            out.scores.float().cpu().numpy(),
            out.target_index.to(torch.int32).cpu().numpy(),
            {name: values.float().cpu().numpy() for name, values in out.maps.items()},
            {name: bits.cpu().numpy() for name, bits in out.flags.items()},
        )

    def _attempt(self, pixels: NDArray[Any], first: int, ask: Ask) -> Explained | None:
        """Ask of a mini-batch; None where device memory ran out: on return all that it held is free."""
        try:
            return ask(self.model.prepare(pixels), slice(first, first + len(pixels)))
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            return None

    def close(self) -> None:
        """Stop the decode threads and close their handles."""
        self.reader.close()


def _not_finite(scores: NDArray[np.float32], maps: dict[str, NDArray[np.float32]]) -> NDArray[np.int64]:
    finite = np.isfinite(scores).all(axis=1)
    for values in maps.values():
        finite &= np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return np.flatnonzero(~finite).astype(np.int64)
