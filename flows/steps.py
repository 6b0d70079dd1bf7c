"""The stages of one image, in order: probe, plan, explain with stitch as blocks become ready, publish, export."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from workers.export.overview import write_overview

from flows.blocks import BlockOrder
from flows.progress import Event
from flows.settings import keep_rate, last_rate, versions
from schemas.errors import GigacamError, SourceError, SpecError
from schemas.explanation import CamSpec
from schemas.frozen import digest
from schemas.grid import GridSpec, TissueSpec
from schemas.heatmap import ChannelInfo, HeatmapSpec
from schemas.image import ImageRequest, ReadOptions
from schemas.model import ModelCard, ModelFacts
from schemas.run import (
    BlockTask,
    ExplainRequest,
    HeatmapInfo,
    ImageReport,
    MapGrid,
    PlanSummary,
    PoolSettings,
    TilesInfo,
    TilesSpec,
    UnitTask,
)
from workers.cam.methods import METHODS
from workers.explainer import Explainer, ExplainInit, pick_device, tiles_per_second
from workers.export.nifti import write_nifti
from workers.models.card import load_card
from workers.models.facts import model_facts, retarget
from workers.pool import Pool, Stage
from workers.publisher import predictions, publish_heatmap, write_image_report
from workers.readers import open_image
from workers.readers.overview import read_mask, read_overview
from workers.readers.reader import Reader
from workers.readers.regions import read_polygons
from workers.stitcher import Stitcher, StitchInit
from workers.stitching.grid import block_dependencies, heatmap_grid
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore
from workers.tiling.plan import DEFAULT_UNIT, Plan, heatmap_bytes, make_plan, peak_memory_bytes, tiles_bytes
from workers.tiling.positions import make_lattice
from workers.tiling.tissue import foreground_mask, tissue_mask

log = logging.getLogger("gigacam")

VOLUME_FULL_GRID_VOXELS = 64_000_000
"""A volume up to this size gets a heatmap on its own voxel grid."""


@dataclass(frozen=True)
class Model:
    """A model card, and what its network turned out to be."""

    path: str
    card: ModelCard
    facts: ModelFacts


@dataclass(frozen=True)
class Job:
    """One planned image."""

    request: ImageRequest
    folder: Path
    plan: Plan
    tiles: TilesInfo
    heatmap: HeatmapInfo
    tissue_method: str
    tissue_fraction: float
    notes: tuple[str, ...]


def open_model(request: ExplainRequest) -> Model:
    """Load the card and its network once, here, so that a wrong request fails before any image."""
    loaded = load_card(request.model)
    if loaded.card.bag is not None:
        msg = (
            f"{request.model}: the card has a [bag] head; bags of tiles are not explained by this version. "
            "Remove [bag] to explain the tile encoder itself"
        )
        raise SpecError(msg)
    unknown = [m for m in request.methods if m not in METHODS]
    if unknown:
        msg = f"--method {','.join(unknown)}: unknown; the methods are {', '.join(METHODS)}"
        raise SpecError(msg)
    layer = request.layer or loaded.card.cam.layer
    facts = model_facts(loaded, layer, request.targets, request.tile, request.cell_centres)
    return Model(str(Path(request.model).resolve()), loaded.card, facts)


def plan_image(
    image: ImageRequest, request: ExplainRequest, model: Model, tell: Callable[[Event], None] | None = None
) -> Job:
    """Probe one image and lay its tiles; reads an overview, computes no tile.

    Raises
    ------
    SourceError, SpecError
        The image cannot be read or does not fit the model or the request.
    """
    reader = open_image(image.uri, image.options)
    try:
        return _plan(reader, image, request, model)
    finally:
        reader.close()


def _plan(reader: Reader, image: ImageRequest, request: ExplainRequest, model: Model) -> Job:
    meta, card, facts = reader.meta, model.card, model.facts
    if image.target:
        facts = retarget(facts, card.output, (image.target,))
    if meta.kind != card.input.kind:
        msg = f"{image.uri}: is a {meta.kind}; model {card.name!r} takes a {card.input.kind}"
        raise SpecError(msg)
    if meta.channels != card.input.channels:
        msg = f"{image.uri}: has {meta.channels} channels; model {card.name!r} takes {card.input.channels}"
        raise SpecError(msg)
    if meta.spacing is None:
        msg = f"{image.uri}: the file does not say its pixel size; give --mpp or --spacing"
        raise SourceError(msg)
    tissue = TissueSpec(method=request.tissue)
    grid = GridSpec(
        tile_px=facts.tile,
        spacing=card.input.spacing,
        overlap=request.overlap,
        edge=request.edge,
        tissue=tissue,
        region_l0=read_polygons(request.region) if request.region else (),
    )
    if grid.region_l0 and meta.kind != "slide":
        msg = f"{image.uri}: --region takes polygons on a slide; use --mask for a volume"
        raise SpecError(msg)
    lattice = make_lattice(
        image.uri, meta.levels, meta.spacing, grid, allow_upsampling=request.allow_upsampling
    )
    notes = list(meta.notes)
    mask: Any = None
    downsample: tuple[float, ...] = (1.0,) * meta.ndim
    method, fraction = "every tile", 1.0
    if request.mask:
        mask, sha256 = read_mask(request.mask, meta.ndim)
        downsample = tuple(n / m for n, m in zip(meta.shape_l0, mask.shape, strict=True))
        grid = grid.model_copy(update={"mask_sha256": sha256})
        method, fraction = f"mask {Path(request.mask).name}", float(mask.mean())
    elif tissue.method == "auto":
        spacing = (tissue.mask_um,) * 2 if meta.kind == "slide" else None
        pixels, downsample, bad = read_overview(reader, spacing=spacing)
        size = tuple(s * d for s, d in zip(meta.spacing, downsample, strict=True))
        found = (tissue_mask if meta.kind == "slide" else foreground_mask)(pixels, size, tissue)
        mask, method, fraction = found.mask.copy(), found.method, found.fraction
        notes += found.notes
        for box in bad:
            # Whether an unreadable place is tissue is unknown: it is tried, and fails by name.
            mask[
                tuple(
                    slice(int(a // d), int(np.ceil(b / d)))
                    for a, b, d in zip(box.start, box.stop, downsample, strict=True)
                )
            ] = True
        if bad:
            notes.append(f"{len(bad)} places of the overview could not be read and are tried as tissue")
    unit = request.unit or DEFAULT_UNIT[meta.kind]
    plan = make_plan(lattice, unit, mask, downsample, tissue, grid.region_l0)
    if lattice.upsampling > 1.25:
        notes.append(f"read {lattice.upsampling:.2f} times finer than the source, as allowed")
    cam = CamSpec(
        methods=request.methods,
        targets=facts.targets,
        layer=facts.layer,
        cell_centres=request.cell_centres,
        precision=request.precision,
    )
    spec = TilesSpec(
        identity=meta.identity,
        read=image.options,
        spacing=meta.spacing,
        card=facts.card,
        cam=cam,
        grid=grid,
        unit=unit,
        batch=min(request.batch, unit),
    )
    map_grid = MapGrid.of(facts.cells, lattice.tile_l0, lattice.tile_px)
    tiles = TilesInfo(
        tiles_id=spec.tiles_id,
        spec=spec,
        image=meta,
        lattice=lattice,
        grids=dict.fromkeys(request.methods, map_grid),
        classes=facts.classes,
        planned=plan.planned,
        tiles=plan.tiles,
        units=plan.units,
        versions=versions(),
    )
    folder = Path(request.out) / meta.image_id(request.image_id)
    heatmap = _heatmap_info(tiles, request.heatmap, map_grid, facts)
    return Job(image, folder, plan, tiles, heatmap, method, fraction, tuple(notes))


def _heatmap_info(tiles: TilesInfo, asked: HeatmapSpec, map_grid: MapGrid, facts: ModelFacts) -> HeatmapInfo:
    meta, cam = tiles.image, tiles.spec.cam
    downsample = asked.downsample or auto_downsample(meta.kind, meta.shape_l0, map_grid.cell_l0)
    channels = tuple(
        ChannelInfo(
            method=name,
            target=target,
            target_index=index,
            unit=METHODS[name].info.unit,
            signed=METHODS[name].info.signed,
            grid=map_grid.shape,
        )
        for name in cam.methods
        for target, index in zip(facts.targets, facts.target_index, strict=True)
    )
    spec = asked.model_copy(update={"downsample": downsample})
    return HeatmapInfo(
        run_id=tiles.spec.run_id(spec),
        tiles_id=tiles.tiles_id,
        spec=spec,
        grid=heatmap_grid(meta.shape_l0, downsample),
        channels=channels,
        spacing=tiles.spec.spacing,
        spacing_unit="um" if meta.kind == "slide" else "mm",
    )


def auto_downsample(kind: str, shape_l0: tuple[int, ...], cell_l0: tuple[float, ...]) -> int:
    """Level-0 px a heatmap px: the largest power of two not above half a CAM cell.

    A volume that fits keeps its own voxel grid, since radiology viewers lay the map on it.
    """
    if kind == "volume" and int(np.prod(shape_l0)) <= VOLUME_FULL_GRID_VOXELS:
        return 1
    half = min(cell_l0) / 2
    return 1 << max(0, int(np.floor(np.log2(half)))) if half >= 1 else 1


def summarise(job: Job, request: ExplainRequest, model: Model, pool: PoolSettings) -> PlanSummary:
    """What the plan costs, for people and machines."""
    tiles, heat, plan = job.tiles, job.heatmap, job.plan
    rate = last_rate(digest(model.facts.card), pick_device("auto"))
    given = request.model_fields_set | {f"heatmap.{name}" for name in request.heatmap.model_fields_set}
    used = {
        "methods": ",".join(tiles.spec.cam.methods),
        "targets": ",".join(tiles.spec.cam.targets),
        "layer": tiles.spec.cam.layer,
        "tile": "x".join(map(str, tiles.lattice.tile_px)),
        "overlap": str(request.overlap),
        "edge": request.edge,
        "tissue": request.tissue,
        "batch": str(tiles.spec.batch),
        "unit": str(tiles.spec.unit),
        "cell_centres": request.cell_centres,
        "precision": request.precision,
        "heatmap.downsample": str(heat.spec.downsample),
        "heatmap.importance": heat.spec.importance,
    }
    out = Path(request.out).absolute()
    parent = next(p for p in (out, *out.parents) if p.exists())
    workers = pool.workers or 1
    return PlanSummary(
        image=job.request.uri,
        image_id=job.folder.name,
        kind=tiles.image.kind,
        shape_l0=tiles.image.shape_l0,
        spacing=tiles.spec.spacing,
        spacing_unit=tiles.image.spacing_unit,
        spacing_source=tiles.image.spacing_source,
        level=tiles.lattice.level,
        tile_l0=tiles.lattice.tile_l0,
        stride_l0=tiles.lattice.stride_l0,
        size_error=tiles.lattice.size_error,
        tissue_fraction=job.tissue_fraction,
        tissue_method=job.tissue_method,
        tiles=plan.planned,
        left_out=plan.tiles - plan.planned,
        units=plan.units,
        batches=sum(
            -(-min(plan.unit, plan.planned - u * plan.unit) // tiles.spec.batch) for u in range(plan.units)
        ),
        blocks=sum(int(np.prod(heat.grid.blocks(lv))) for lv in range(len(heat.grid.levels))),
        heatmap_shape=heat.grid.levels[0],
        heatmap_downsample=heat.grid.downsample,
        channels=tuple(c.label for c in heat.channels),
        tiles_bytes=tiles_bytes(plan, tiles.grids, len(tiles.classes), len(tiles.spec.cam.targets)),
        heatmap_bytes=heatmap_bytes(heat.grid, len(heat.channels)),
        disk_free_bytes=shutil.disk_usage(parent).free,
        peak_memory_bytes=peak_memory_bytes(
            plan, heat.grid, tiles.image.channels, tiles.spec.batch, model.facts.weights_bytes
        ),
        seconds=None if rate is None else plan.planned / (rate * workers),
        defaults={name: value for name, value in used.items() if name not in given},
        notes=job.notes,
    )


def measure_rate(job: Job, model: Model, threads: int) -> None:
    """Run one batch of the planned tiles and keep the rate for this and later plans; writes no output."""
    if job.plan.planned:
        init = ExplainInit(tiles="", model=model.path, threads=threads, decode_threads=min(4, threads))
        batch = job.plan.boxes[: min(job.tiles.spec.batch, job.plan.planned)]
        rate = tiles_per_second(job.tiles, init, batch)
        keep_rate(digest(model.facts.card), pick_device("auto"), rate)


def explain_image(
    image: ImageRequest,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Callable[[Event], None],
) -> ImageReport:
    """Take one image the whole way; what goes wrong ends in the report, not in an exception.

    `SpecError` is raised where nothing was computed and only the request can mend it; KeyboardInterrupt
    is left to the caller, since what was computed so far is in the store.
    """
    name = Path(image.uri.partition("?")[0]).name or image.uri
    began = time.perf_counter()
    try:
        tell(Event(name, "probe"))
        job = plan_image(image, request, model)
        tell(Event(name, "plan", message=f"{job.plan.planned} tiles in {job.plan.units} units"))
        report = _compute(job, name, request, model, pool, settings, tell)
    except (GigacamError, OSError) as error:
        message = str(error) if isinstance(error, GigacamError) else f"{image.uri}: {error}"
        tell(Event(name, "failed", message=message))
        return ImageReport(image=image.uri, status="failed", error=message)
    seconds = {**report.seconds, "all": time.perf_counter() - began}
    report = report.model_copy(update={"seconds": seconds})
    write_image_report(job.folder, report)
    tell(Event(name, report.status, message=report.error or report.output))
    return report


def _compute(
    job: Job,
    name: str,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Callable[[Event], None],
) -> ImageReport:
    notes = list(job.notes)
    tiles = TilesStore.create(job.folder / "tiles.zarr", job.tiles, job.plan.boxes, fresh=request.fresh)
    heatmap = HeatmapStore.create(
        job.folder / "heatmap.ome.zarr", job.heatmap, job.folder.name, fresh=request.fresh
    )
    if request.retry_failed:
        heatmap.clear_blocks(tiles.failed_boxes())
        tiles.reset_failed()
    stages = _Stages(job, model, settings, tiles, heatmap)
    run = _Run(job, name, pool, stages, tiles, heatmap, tell)
    clock = time.perf_counter()
    run.explain_and_stitch()
    seconds = {"explain+stitch": time.perf_counter() - clock, **run.seconds}
    clock = time.perf_counter()
    tell(Event(name, "publish"))
    failures = tuple(tiles.failures())
    if not run.blocks_lost:
        publish_heatmap(heatmap)
    seconds["publish"] = time.perf_counter() - clock
    clock = time.perf_counter()
    reader = open_image(job.request.uri, job.request.options)
    try:
        if not run.blocks_lost:
            write_overview(job.folder / "overview.png", reader, heatmap, tiles.info)
            if job.tiles.image.kind == "volume":
                write_nifti(job.folder / "heatmap.nii.gz", heatmap, reader)
    finally:
        reader.close()
    seconds["export"] = time.perf_counter() - clock
    if run.tiles_computed and run.seconds.get("explain"):
        keep_rate(digest(model.facts.card), pick_device("auto"), run.tiles_computed / run.seconds["explain"])
    counts = tiles.counts()
    if counts.planned == 0:
        notes.append(f"no tile holds enough tissue ({job.tissue_method}): nothing was computed")
    if failures and not request.retry_failed:
        notes.append(f"{len(failures)} tiles have no map; --retry-failed computes them again")
    status = "gaps" if failures or run.lost else "complete"
    return ImageReport(
        image=job.request.uri,
        image_id=job.folder.name,
        status=status,
        error=_gap_line(job, len(failures), counts.planned, failures[0].reason if failures else "", run.lost),
        output=str(job.folder),
        counts=counts,
        failures=failures,
        failed_tasks=tuple(run.lost),
        prediction=predictions(tiles),
        channels=heatmap.info.channels,
        value_range=heatmap.info.value_range,
        display=heatmap.info.display,
        seconds=seconds,
        notes=tuple(dict.fromkeys([*notes, *run.notes])),
        flags=dict(run.flags),
        provenance={
            "tiles_id": job.tiles.tiles_id,
            "run_id": job.heatmap.run_id,
            "spec": job.tiles.spec.model_dump(mode="json"),
            "heatmap": job.heatmap.spec.model_dump(mode="json"),
            "image": job.tiles.image.model_dump(mode="json"),
            "lattice": job.tiles.lattice.model_dump(mode="json"),
            "cells": {m: g.model_dump(mode="json") for m, g in job.tiles.grids.items()},
            "tissue": {"method": job.tissue_method, "fraction": job.tissue_fraction},
            "versions": versions(),
            "pool": pool.description,
            "device": pick_device("auto"),
            "tiles_this_run": run.tiles_computed,
            "intended_use": model.card.intended_use,
        },
    )


def _gap_line(job: Job, failed: int, planned: int, first: str, lost: list[str]) -> str:
    if failed:
        return f"{job.request.uri}: {failed} of {planned} tiles have no map, the first since: {first}"
    return f"{job.request.uri}: {lost[0]}" if lost else ""


class _Stages:
    """The stages of one image, each with its frozen init value."""

    def __init__(
        self, job: Job, model: Model, settings: PoolSettings, tiles: TilesStore, heatmap: HeatmapStore
    ) -> None:
        threads = settings.threads or 1
        self.explain = Stage(
            "explain",
            Explainer,
            ExplainInit(
                tiles=str(tiles.path), model=model.path, threads=threads, decode_threads=min(4, threads)
            ),
            "device",
        )
        self.stitch = Stage(
            "stitch", Stitcher, StitchInit(tiles=str(tiles.path), heatmap=str(heatmap.path)), "cpu"
        )


class _Run:
    """Explain what is still to do, and write each block as soon as its last tile is there."""

    def __init__(
        self,
        job: Job,
        name: str,
        pool: Pool,
        stages: _Stages,
        tiles: TilesStore,
        heatmap: HeatmapStore,
        tell: Callable[[Event], None],
    ) -> None:
        self._name, self._pool, self._stages, self._tell = name, pool, stages, tell
        self._tiles, self._heatmap = tiles, heatmap
        self.pending = tiles.pending_units()
        plan = job.plan
        self._order = BlockOrder(
            job.heatmap.grid,
            block_dependencies(job.heatmap.grid, plan.boxes, plan.unit, plan.planned),
            heatmap.pending_blocks(),
            set(range(plan.units)) - set(self.pending),
        )
        self.lost: list[str] = []
        self.blocks_lost = False
        self.notes: list[str] = []
        self.flags: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.tiles_computed = 0
        self._began = time.perf_counter()

    def explain_and_stitch(self) -> None:
        self._stitch(self._order.ready())
        counts = self._tiles.counts()
        done, failed, total = counts.done + counts.failed, counts.failed, counts.planned
        tasks = [UnitTask(unit=unit) for unit in self.pending]
        self._tell(Event(self._name, "explain", done, total, failed))
        for report in self._pool.run(self._stages.explain, tasks):
            assert isinstance(report.task, UnitTask)
            unit, given_up = report.task.unit, report.failed
            if report.error:
                self._tiles.fail_unit(unit, report.error)
                self.lost.append(f"{report.key}: {report.error}")
                given_up = len(self._tiles.unit_rows(unit))
            self._add(report.seconds_by, "explain", report.seconds)
            self.notes.extend(report.notes)
            self.flags.update(report.flags)
            self.tiles_computed += report.done
            done, failed = done + report.done + given_up, failed + given_up
            rate = self.tiles_computed / max(1e-9, time.perf_counter() - self._began)
            self._tell(Event(self._name, "explain", min(done, total), total, failed, rate))
            self._stitch(self._order.unit_done(unit))

    def _stitch(self, tasks: list[BlockTask]) -> None:
        while tasks:
            released: list[BlockTask] = []
            for report in self._pool.run(self._stages.stitch, tasks):
                assert isinstance(report.task, BlockTask)
                if report.error:
                    self.lost.append(f"{report.key}: {report.error}")
                    self.blocks_lost = True
                    continue
                stage = "downsample" if report.task.level else "stitch"
                self._add(report.seconds_by, stage, report.seconds)
                self._tell(Event(self._name, stage, self._order.done, self._order.total))
                released += self._order.block_done(report.task)
            tasks = released

    def _add(self, parts: dict[str, float], stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for part, value in parts.items():
            key = f"{stage}.{part}"
            self.seconds[key] = self.seconds.get(key, 0.0) + value


class Claims:
    """Which image of a run holds an identity: two sources of one identity are one image."""

    def __init__(self) -> None:
        self._holder: dict[str, str] = {}
        self._identity: dict[str, str] = {}

    def claim(self, identity: str, uri: str) -> None:
        """Note that `uri` has this identity; the first to claim it holds it."""
        self._holder.setdefault(identity, uri)
        self._identity[uri] = identity

    def owner(self, uri: str) -> str:
        """URI of the image that holds the identity of `uri`; itself where it has none."""
        identity = self._identity.get(uri)
        return uri if identity is None else self._holder[identity]


def with_row_options(image: ImageRequest, read: ReadOptions) -> ImageRequest:
    """The request's read options, overridden by what the image's own CSV row says."""
    row = image.options.model_dump(exclude_none=True)
    return image.model_copy(update={"options": read.model_copy(update=row)})
