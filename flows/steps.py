"""The stages of one image: plan, collect and solve for methods of the whole image, explain with stitch, publish, export."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.blocks import BlockOrder
from flows.export import export_image
from flows.first_pass import collect_and_solve, embed_and_attribute, forget_failed
from flows.progress import Event
from flows.work import Work
from schemas.errors import GigacamError, StoreError
from schemas.evidence import Evidence
from schemas.frozen import digest
from schemas.image import ImageRequest
from schemas.run import (
    BlockTask,
    ExplainRequest,
    ImageReport,
    PoolSettings,
    RankTask,
    UnitTask,
)
from workers.attributor import AttributeInit, Attributor
from workers.cam.words import names_of
from workers.embedder import Embedder
from workers.explainer import Explainer, ExplainInit
from workers.inside import InsideExplainer
from workers.planner import Job, Model, plan_image
from workers.pool import Pool, Stage, Worker
from workers.provenance import keep_rate, rate_key, versions
from workers.publisher import drop_derived, finished_report, predictions, publish_heatmap, write_image_report
from workers.ranker import Ranker
from workers.readers import open_image
from workers.reducer import Collector, SolveInit, Solver
from workers.stitcher import Stitcher, StitchInit
from workers.stitching.grid import block_dependencies
from workers.store.bags import Bag
from workers.store.heatmap import HeatmapStore
from workers.store.reductions import Reductions
from workers.store.tiles import TilesStore

log = logging.getLogger("gigacam")

Tell = Callable[[Event], None]
Compute = Callable[[Job, str, ExplainRequest, Model, Pool, PoolSettings, Tell], ImageReport]
"""What is done with a planned image: job, its name for people, and what was asked."""


def explain_image(
    image: ImageRequest,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Tell,
) -> ImageReport:
    """Take one image the whole way; see `one_image`."""
    return one_image(image, request, model, pool, settings, tell, _compute)


def one_image(
    image: ImageRequest,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Tell,
    compute: Compute,
) -> ImageReport:
    """Plan one image and `compute` it; what goes wrong ends in the report, not in an exception.

    KeyboardInterrupt is left to the caller: what was computed so far is in the store.
    """
    name = Path(image.uri.partition("?")[0]).name or image.uri
    began = time.perf_counter()
    job: Job | None = None
    try:
        tell(Event(name, "probe"))
        job = plan_image(image, request, model)
        tell(Event(name, "plan", message=f"{job.plan.planned} tiles in {job.plan.units} units"))
        report = compute(job, name, request, model, pool, settings, tell)
        report = _export(job, name, request, report, tell)
    except Exception as error:  # one image's failure, whatever it is, never ends the others
        if isinstance(error, GigacamError):
            message = error.message
        else:
            message = f"{image.uri}: {type(error).__name__}: {error}"
            log.exception("%s failed", image.uri)
        tell(Event(name, "failed", message=message))
        report = ImageReport(image=image.uri, status="failed", error=message)
        if job is not None and not isinstance(error, StoreError):
            write_image_report(job.folder, report)
        return report
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
    tell: Tell,
) -> ImageReport:
    notes = list(job.notes)
    tiles, heatmap = _stores(job, request)
    sums = Reductions(tiles.path, tiles.info, "r+") if tiles.info.reductions else None
    bag = Bag(tiles.path, tiles.info, "r+") if tiles.info.features else None
    words = _words(job, request, model)
    if request.retry_failed:
        forget_failed(tiles, heatmap, bag, sums)
    if heatmap.pending_blocks():
        drop_derived(job.folder)
    elif (earlier := finished_report(job.folder, job.heatmap.run_id)) and (
        not words or earlier.provenance.get("words") == words
    ):
        # Nothing is left to do: what an earlier run found still holds, its device and flags included.
        provenance = {**earlier.provenance, "tiles_this_run": 0}
        found = {"image": job.request.uri, "output": str(job.folder), "provenance": provenance}
        return earlier.model_copy(update=found)
    stages = Stages(job, model, settings, tiles, heatmap)
    run = Run(job, name, pool, stages, tiles, heatmap, tell)
    seconds = {}
    decided = None
    if sums is not None:
        clock = time.perf_counter()
        collect_and_solve(run, sums)
        seconds["collect+solve"] = time.perf_counter() - clock
    if bag is not None:
        clock = time.perf_counter()
        decided = embed_and_attribute(run, bag, tiles)
        notes.append(decided.line)
        seconds["embed+attribute"] = time.perf_counter() - clock
    clock = time.perf_counter()
    run.explain_and_stitch()
    evidence = run.rank(request.words) if request.words else ()
    notes += [line for found in evidence for line in found.lines]
    seconds |= {"explain+stitch": time.perf_counter() - clock, **run.seconds}
    clock = time.perf_counter()
    tell(Event(name, "publish"))
    failures = tuple(tiles.failures())
    if not run.blocks_lost:
        publish_heatmap(heatmap, settings.threads or 1)
    seconds["publish"] = time.perf_counter() - clock
    clock = time.perf_counter()
    reader = open_image(job.request.uri, job.request.options)
    try:
        if not run.blocks_lost:
            # Loaded here: planning pays for neither matplotlib nor nibabel.
            from workers.export.overview import write_overview

            write_overview(job.folder / "overview.png", reader, heatmap, tiles.info)
            if job.tiles.image.kind == "volume":
                from workers.export.nifti import write_nifti

                write_nifti(job.folder / "heatmap.nii.gz", heatmap, reader)
    finally:
        reader.close()
    seconds["export"] = time.perf_counter() - clock
    cam = job.tiles.spec.cam
    every = bool(cam.methods) and cam.inside.every  # else tiles were done that no network saw
    if every and run.tiles_computed and run.seconds.get("explain"):
        for device in run.devices:
            keep_rate(rate_key(tiles.info.spec), device, run.tiles_computed / run.seconds["explain"])
    counts = tiles.counts()
    if counts.planned == 0:
        notes.append(f"no tile holds enough tissue ({job.tissue_method}): nothing was computed")
    if failures and not request.retry_failed:
        notes.append(f"tiles without a map: {len(failures)}; --retry-failed computes them again")
    states = [] if sums is None else [s for name in tiles.info.reductions for s in sums.solved(name)]
    notes += [state.line for state in states]
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
        prediction=predictions(tiles, model.card.output),
        channels=heatmap.info.channels,
        value_range=heatmap.info.value_range,
        display=heatmap.info.display,
        seconds=seconds,
        notes=tuple(dict.fromkeys([*notes, *run.notes])),
        flags=tiles.flag_counts(),
        states=tuple(states),
        bag=decided,
        evidence=evidence,
        provenance={
            "tiles_id": job.tiles.tiles_id,
            "run_id": job.heatmap.run_id,
            "spec": job.tiles.spec.model_dump(mode="json"),
            "heatmap": job.heatmap.spec.model_dump(mode="json"),
            "image": job.tiles.image.model_dump(mode="json"),
            "lattice": job.tiles.lattice.model_dump(mode="json"),
            "cells": {m: g.model_dump(mode="json") for m, g in job.tiles.grids.items()},
            "tissue": {"method": job.tissue_method, "fraction": job.tissue_fraction},
            "words": words if evidence else {},
            "versions": versions(),
            "pool": pool.description,
            "device": ", ".join(tiles.devices()),
            "tiles_this_run": run.tiles_computed,
            "intended_use": model.card.intended_use,
        },
    )


def _words(job: Job, request: ExplainRequest, model: Model) -> dict[str, Any]:
    """What a ranking of channels hangs on besides the tile maps; empty where none is asked for."""
    if not request.words:
        return {}
    names = names_of(model.card.cam, job.tiles.spec.cam.layer).items()
    return {"tiles": request.words, "names": digest({k: name.model_dump(mode="json") for k, name in names})}


def _export(
    job: Job, name: str, request: ExplainRequest, report: ImageReport, tell: Callable[[Event], None]
) -> ImageReport:
    """Write the formats asked for, once the heatmap is whole; those that an earlier run wrote stay."""
    kept = tuple(e for e in report.exports if e.skipped or (e.files and all(map(os.path.exists, e.files))))
    report = report.model_copy(update={"exports": kept})
    pending = [asked for asked in request.exports if asked not in {e.name for e in kept}]
    if not pending or report.failed_tasks:
        return report
    write_image_report(job.folder, report)  # exports read it
    tell(Event(name, "export"))
    made = export_image(job.folder, pending)
    for one in made:
        if one.error or one.skipped:
            tell(Event(name, "export", message=f"{one.name}: {one.error or one.skipped}"))
    new = {one.name for one in made}
    return report.model_copy(update={"exports": (*(e for e in kept if e.name not in new), *made)})


def _stores(job: Job, request: ExplainRequest) -> tuple[TilesStore, HeatmapStore]:
    """Make or resume both stores."""
    tiles = tiles_store(job, request)
    return tiles, HeatmapStore.create(job.folder / "heatmap.ome.zarr", job.heatmap, job.folder.name)


def tiles_store(job: Job, request: ExplainRequest) -> TilesStore:
    """Make or resume the tiles; a heatmap never outlives those it was made of.

    It goes first: killed in between, tiles without a heatmap are left, never a heatmap of other tiles.
    """
    tiles = job.folder / "tiles.zarr"
    if request.fresh or not TilesStore.exists(tiles):
        HeatmapStore.move_aside(job.folder / "heatmap.ome.zarr")
    return TilesStore.create(tiles, job.tiles, job.plan.boxes, fresh=request.fresh)


def _gap_line(job: Job, failed: int, planned: int, first: str, lost: list[str]) -> str:
    if failed:
        return f"{job.request.uri}: {failed} of {planned} tiles have no map, the first since: {first}"
    return f"{job.request.uri}: {lost[0]}" if lost else ""


class Stages:
    """The stages of one image, each with its frozen init value."""

    def __init__(
        self, job: Job, model: Model, settings: PoolSettings, tiles: TilesStore, heatmap: HeatmapStore
    ) -> None:
        threads = settings.threads or 1
        path, tiles_id = str(tiles.path), job.tiles.tiles_id
        explain = ExplainInit(tiles=path, tiles_id=tiles_id, model=model.path, threads=threads)
        self.collect = Stage("collect", Collector, explain, "device")
        self.solve = Stage("solve", Solver, SolveInit(tiles=path, tiles_id=tiles_id, threads=threads), "cpu")
        worker: type[Worker] = InsideExplainer if job.tiles.features else Explainer
        self.explain = Stage("explain", worker, explain, "device")
        self.rank = Stage("rank", Ranker, explain, "device")
        self.embed = Stage("embed", Embedder, explain, "device")
        self._attribute = AttributeInit(
            tiles=path, tiles_id=tiles_id, model=model.path, encoder="", threads=threads
        )
        self.stitch = Stage(
            "stitch",
            Stitcher,
            StitchInit(tiles=path, heatmap=str(heatmap.path), run_id=job.heatmap.run_id),
            "cpu",
        )

    def attribute(self, encoder: str) -> Stage:
        """The stage that decides a bag; `encoder` says how its features are known to be the encoder's."""
        init = self._attribute.model_copy(update={"encoder": encoder})
        return Stage("attribute", Attributor, init, "cpu")


class Run(Work):
    """Explain what is still to do, and write each block as soon as its last tile is there."""

    def __init__(
        self,
        job: Job,
        name: str,
        pool: Pool,
        stages: Stages,
        tiles: TilesStore,
        heatmap: HeatmapStore,
        tell: Tell,
    ) -> None:
        super().__init__(job, name, pool, tell)
        self.stages = stages
        self._tiles, self._heatmap = tiles, heatmap
        self.pending = tiles.pending_units()
        plan = job.plan
        self._order = BlockOrder(
            job.heatmap.grid,
            block_dependencies(job.heatmap.grid, plan.boxes, plan.unit, plan.planned),
            heatmap.pending_blocks(),
            set(range(plan.units)) - set(self.pending),
        )
        self.blocks_lost = False
        self.tiles_computed = 0
        self._began = time.perf_counter()

    def rank(self, tiles: int) -> tuple[Evidence, ...]:
        """Channels of the layer for and against each target; what goes wrong is noted, as the maps do not hang on it."""
        (report,) = self.pool.run(self.stages.rank, [RankTask(tiles=tiles)])
        if report.error:
            self.notes.append(f"channels are not ranked: {report.error}")
        return report.evidence

    def explain_and_stitch(self) -> None:
        self._stitch(self._order.ready())
        counts = self._tiles.counts()
        done, failed, total = counts.done + counts.failed, counts.failed, counts.planned
        tasks = [UnitTask(unit=unit) for unit in self.pending]
        self.tell(Event(self.name, "explain", done, total, failed))
        for report in self.pool.run(self.stages.explain, tasks):
            assert isinstance(report.task, UnitTask)
            unit, given_up = report.task.unit, report.failed
            if report.error:
                self._tiles.fail_unit(unit, report.error)
                self.lost.append(f"{report.key}: {report.error}")
                given_up = len(self._tiles.unit_rows(unit))
            self.note("explain", report)
            self.tiles_computed += report.done
            done, failed = done + report.done + given_up, failed + given_up
            rate = self.tiles_computed / max(1e-9, time.perf_counter() - self._began)
            self.tell(Event(self.name, "explain", min(done, total), total, failed, rate))
            self._stitch(self._order.unit_done(unit))

    def _stitch(self, tasks: list[BlockTask]) -> None:
        while tasks:
            released: list[BlockTask] = []
            for report in self.pool.run(self.stages.stitch, tasks):
                assert isinstance(report.task, BlockTask)
                if report.error:
                    self.lost.append(f"{report.key}: {report.error}")
                    self.blocks_lost = True
                    continue
                stage = "downsample" if report.task.level else "stitch"
                self.note(stage, report)
                released += self._order.block_done(report.task)
                self.tell(Event(self.name, stage, self._order.done, self._order.total))
            tasks = released
