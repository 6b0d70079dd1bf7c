"""What a plan costs: counted, estimated from rates that were measured, or measured on one batch."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np

from schemas.plan import PlanSummary
from schemas.run import ExplainRequest, PoolSettings
from workers.bag_plan import bag_bytes
from workers.explainer import ExplainInit, pick_device, tiles_per_second
from workers.planner import Job, Model
from workers.provenance import keep_rate, last_rate, rate_key
from workers.store.reductions import collected_bytes, group_count, group_rows
from workers.tiling.plan import heatmap_bytes, peak_memory_bytes, tiles_bytes


def summarise(job: Job, request: ExplainRequest, model: Model, pool: PoolSettings) -> PlanSummary:
    """What the plan costs, for people and machines."""
    tiles, heat, plan = job.tiles, job.heatmap, job.plan
    rate = last_rate(rate_key(tiles.spec), pick_device("auto"))
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
        "precision": tiles.spec.cam.precision,
        "heatmap.downsample": str(heat.spec.downsample),
        "heatmap.importance": heat.spec.importance,
    }
    if tiles.features:
        used |= {"bag_methods": ",".join(tiles.spec.cam.bag_methods), "inside": str(request.inside)}
    groups = range(group_count(plan.units)) if tiles.reductions else range(0)
    twice = (
        f"{', '.join(tiles.reductions)}: every tile is read and goes through the network twice, first to be summed in "
        f"{len(groups)} groups, then to be explained"
    )
    passes, said = _passes(job)
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
        batches=math.ceil(
            passes
            * sum(
                -(-min(plan.unit, plan.planned - u * plan.unit) // tiles.spec.batch)
                for u in range(plan.units)
            )
        )
        + sum(-(-len(group_rows(g, tiles)) // tiles.spec.batch) for g in groups),
        blocks=sum(int(np.prod(heat.grid.blocks(lv))) for lv in range(len(heat.grid.levels))),
        heatmap_shape=heat.grid.levels[0],
        heatmap_downsample=heat.grid.downsample,
        channels=tuple(c.label for c in heat.channels),
        tiles_bytes=tiles_bytes(plan, tiles.grids, len(tiles.classes), len(tiles.spec.cam.targets))
        + collected_bytes(tiles)
        + bag_bytes(tiles),
        heatmap_bytes=heatmap_bytes(heat.grid, len(heat.channels)),
        disk_free_bytes=shutil.disk_usage(parent).free,
        peak_memory_bytes=peak_memory_bytes(
            plan, heat.grid, tiles.image.channels, tiles.spec.batch, model.facts.weights_bytes
        )
        + (2 * collected_bytes(tiles) // len(groups) if groups else 0),
        seconds=None if rate is None else (passes + bool(groups)) * plan.planned / (rate * workers),
        defaults={name: value for name, value in used.items() if name not in given},
        notes=(*job.notes, *([twice] if groups else []), *said),
    )


def _passes(job: Job) -> tuple[float, list[str]]:
    """How often a tile goes through the network to be embedded and explained, on average; and that in words."""
    cam = job.tiles.spec.cam
    if not job.tiles.features:
        return 1.0, []
    inside = min(1.0, cam.inside.top + cam.inside.sample) if cam.methods else 0.0
    embedded = float(not job.features)
    share = "every tile is" if inside == 1 else f"{inside:.0%} of the tiles are"
    said = f"bag: {'features are imported' if job.features else 'every tile is embedded'}; {share} explained inside"
    return embedded + inside, [said]


def measure_rate(job: Job, model: Model, threads: int) -> None:
    """Run one batch of the planned tiles and keep the rate for this and later plans; writes no output."""
    if job.plan.planned and job.tiles.image.pixels:
        init = ExplainInit(tiles="", tiles_id="", model=model.path, threads=threads)
        batch = job.plan.boxes[: min(job.tiles.spec.batch, job.plan.planned)]
        rate = tiles_per_second(job.tiles, init, batch)
        keep_rate(rate_key(job.tiles.spec), pick_device("auto"), rate)
