"""The stages of one image: plan, collect and solve for methods of the whole image, explain with stitch, publish, export."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from flows.blocks import BlockOrder
from flows.progress import Event
from schemas.errors import GigacamError, StoreError
from schemas.frozen import digest
from schemas.image import ImageRequest
from schemas.run import (
    BlockTask,
    ExplainRequest,
    GroupTask,
    ImageReport,
    PoolSettings,
    Report,
    SolveTask,
    UnitTask,
)
from workers.explainer import Explainer, ExplainInit
from workers.planner import Job, Model, plan_image
from workers.pool import Pool, Stage
from workers.provenance import keep_rate, versions
from workers.publisher import drop_derived, finished_report, predictions, publish_heatmap, write_image_report
from workers.readers import open_image
from workers.reducer import Collector, SolveInit, Solver
from workers.stitcher import Stitcher, StitchInit
from workers.stitching.grid import block_dependencies
from workers.store.heatmap import HeatmapStore
from workers.store.reductions import Reductions
from workers.store.tiles import TilesStore

log = logging.getLogger("gigacam")


def explain_image(
    image: ImageRequest,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Callable[[Event], None],
) -> ImageReport:
    """Take one image the whole way; what goes wrong ends in the report, not in an exception.

    KeyboardInterrupt is left to the caller: what was computed so far is in the store.
    """
    name = Path(image.uri.partition("?")[0]).name or image.uri
    began = time.perf_counter()
    job: Job | None = None
    try:
        tell(Event(name, "probe"))
        job = plan_image(image, request, model)
        tell(Event(name, "plan", message=f"{job.plan.planned} tiles in {job.plan.units} units"))
        report = _compute(job, name, request, model, pool, settings, tell)
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
    tell: Callable[[Event], None],
) -> ImageReport:
    notes = list(job.notes)
    tiles, heatmap = _stores(job, request)
    sums = Reductions(tiles.path, tiles.info, "r+") if tiles.info.reductions else None
    if request.retry_failed:
        if sums is not None:
            sums.retry()
        heatmap.clear_blocks(tiles.retry_boxes())
        tiles.reset_failed()
    if heatmap.pending_blocks():
        drop_derived(job.folder)
    elif earlier := finished_report(job.folder, job.heatmap.run_id):
        # Nothing is left to do: what an earlier run found still holds, its device and flags included.
        provenance = {**earlier.provenance, "tiles_this_run": 0}
        found = {"image": job.request.uri, "output": str(job.folder), "provenance": provenance}
        return earlier.model_copy(update=found)
    stages = _Stages(job, model, settings, tiles, heatmap)
    run = _Run(job, name, pool, stages, tiles, heatmap, tell)
    seconds = {}
    if sums is not None:
        clock = time.perf_counter()
        run.collect_and_solve(sums)
        seconds["collect+solve"] = time.perf_counter() - clock
    clock = time.perf_counter()
    run.explain_and_stitch()
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
    if run.tiles_computed and run.seconds.get("explain"):
        for device in run.devices:
            keep_rate(digest(model.facts.card), device, run.tiles_computed / run.seconds["explain"])
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
            "device": ", ".join(tiles.devices()),
            "tiles_this_run": run.tiles_computed,
            "intended_use": model.card.intended_use,
        },
    )


def _stores(job: Job, request: ExplainRequest) -> tuple[TilesStore, HeatmapStore]:
    """Make or resume both stores; a heatmap never outlives the tiles it was made of.

    It goes first: killed in between, tiles without a heatmap are left, never a heatmap of other tiles.
    """
    tiles, heatmap = job.folder / "tiles.zarr", job.folder / "heatmap.ome.zarr"
    if request.fresh or not TilesStore.exists(tiles):
        HeatmapStore.move_aside(heatmap)
    return (
        TilesStore.create(tiles, job.tiles, job.plan.boxes, fresh=request.fresh),
        HeatmapStore.create(heatmap, job.heatmap, job.folder.name),
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
        path, tiles_id = str(tiles.path), job.tiles.tiles_id
        explain = ExplainInit(tiles=path, tiles_id=tiles_id, model=model.path, threads=threads)
        self.collect = Stage("collect", Collector, explain, "device")
        self.solve = Stage("solve", Solver, SolveInit(tiles=path, tiles_id=tiles_id, threads=threads), "cpu")
        self.explain = Stage("explain", Explainer, explain, "device")
        self.stitch = Stage(
            "stitch",
            Stitcher,
            StitchInit(tiles=path, heatmap=str(heatmap.path), run_id=job.heatmap.run_id),
            "cpu",
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
        self._job, self._name, self._pool, self._stages, self._tell = job, name, pool, stages, tell
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
        self.devices: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.tiles_computed = 0
        self._began = time.perf_counter()

    def collect_and_solve(self, sums: Reductions) -> None:
        """Sum over all tiles and solve, where no earlier run did: nothing can be explained before."""
        self.lost += [
            f"group {group}: given up by an earlier run, so that its tiles did not enter; --fresh sums anew"
            for group in sums.given_up()
        ]
        groups = sums.pending_groups() if self.pending and sums.unsolved() else []
        done, failed, total = 0, 0, sum(len(sums.rows(group)) for group in groups)
        began = time.perf_counter()
        for report in self._pool.run(self._stages.collect, [GroupTask(group=group) for group in groups]):
            assert isinstance(report.task, GroupTask)
            if report.error:
                sums.fail_group(report.task.group)
                self.lost.append(f"{report.key}: {report.error}")
            self._note("collect", report)
            rows = len(sums.rows(report.task.group))
            done, failed = done + rows, failed + (rows if report.error else report.failed)
            rate = done / max(1e-9, time.perf_counter() - began)
            self._tell(Event(self._name, "collect", done, total, failed, rate))
        unsolved = sums.unsolved() if self.pending else []
        for report in self._pool.run(self._stages.solve, [SolveTask(method=name) for name in unsolved]):
            if report.error:
                msg = f"{self._job.request.uri}: {report.key}: {report.error}"
                raise GigacamError(msg)
            self._note("solve", report)
        if not sums.unsolved():
            sums.drop_collected()

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
            self._note("explain", report)
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
                self._note(stage, report)
                released += self._order.block_done(report.task)
                self._tell(Event(self._name, stage, self._order.done, self._order.total))
            tasks = released

    def _note(self, stage: str, report: Report) -> None:
        self.notes.extend(report.notes)
        self.devices |= {report.device} - {""}
        self.seconds[stage] = self.seconds.get(stage, 0.0) + report.seconds
        for part, value in report.seconds_by.items():
            key = f"{stage}.{part}"
            self.seconds[key] = self.seconds.get(key, 0.0) + value
