"""`gigacam embed`: the features of images' tiles, to train a bag head on or to explain with later."""

from __future__ import annotations

import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.options import (
    INTERRUPTED,
    Address,
    AsJson,
    BagMethods,
    Batch,
    CellCentres,
    Channel,
    Downsample,
    Edge,
    Features,
    ImageIdStyle,
    Images,
    Importance,
    Inside,
    Layer,
    Mask,
    Methods,
    ModelCardPath,
    Mpp,
    Out,
    Overlap,
    PoolKind,
    PrecisionTier,
    Region,
    Spacing,
    Targets,
    Threads,
    Tile,
    TimePoint,
    Tissue,
    Unit,
    Upsampling,
    WorkerCount,
    explain_request,
    pool_settings,
)

if TYPE_CHECKING:
    from flows.steps import Tell
    from schemas.run import ExplainRequest, ImageReport, PoolSettings, RunReport
    from workers.planner import Job, Model
    from workers.pool import Pool

Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Where OUT holds a result of another request, move it aside first."),
]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Embed tiles that failed before once more.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that is not complete.")]
H5 = Annotated[
    str,
    typer.Option(
        "--h5",
        help="Folder to write NAME.h5 of each image to as well: features and coords, as CLAM and TRIDENT do. Default: none.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def embed(image: Images, model: ModelCardPath, out: Out, h5: H5 = "", method: Methods = "",
              bag_method: BagMethods = "", inside: Inside = "all", features: Features = "",
              target: Targets = "", mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
              time: TimePoint = None, layer: Layer = "", tile: Tile = "", overlap: Overlap = 0.0,
              edge: Edge = "shift", tissue: Tissue = "auto", region: Region = "", mask: Mask = "",
              batch: Batch = 32, unit: Unit = None, importance: Importance = "hann",
              downsample: Downsample = None, cell_centres: CellCentres = "receptive_field",
              precision: PrecisionTier = "fp32", allow_upsampling: Upsampling = False,
              pool: PoolKind = "auto", ray_address: Address = "",
              workers: WorkerCount = None, threads: Threads = None, fresh: Fresh = False,
              retry_failed: Retry = False, strict: Strict = False,
              image_id: ImageIdStyle = "stem", as_json: AsJson = False) -> None:  # fmt: skip
        """Embed the tiles of images: features into OUT, for train, or for explain with the same flags, which goes on from them."""
        request = explain_request(locals())
        settings = pool_settings(pool, ray_address, workers, threads)
        report = _embed(request, settings, h5, as_json)
        if as_json:
            print(report.model_dump_json())
        else:
            from flows.tables import report_lines

            print("\n".join(report_lines(report, out)))
        if report.exit_code == 130:
            print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(report.exit_code)


def _embed(request: ExplainRequest, asked: PoolSettings, h5: str, as_json: bool) -> RunReport:
    from flows.batch import list_images
    from flows.progress import listener
    from flows.settings import resolve_pool

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings, why = resolve_pool(asked, len(list_images(request)))
    print(f"pool: {why}", file=sys.stderr)
    told = listener(as_json)
    try:
        return embed_batch(request, settings, told, Path(h5) if h5 else None)
    finally:
        told.close()


def embed_batch(
    request: ExplainRequest, settings: PoolSettings, tell: Tell, h5: Path | None = None
) -> RunReport:
    """Embed every image of the request, as `explain_batch` explains; see there.

    Parameters
    ----------
    request
        Its model has a bag head, and explaining the same request goes on from the features; or is an encoder alone.
    h5
        Folder that gets the features of each image as a file.
    """
    from flows.batch import explain_batch
    from flows.steps import one_image
    from workers.planner import open_encoder

    do = partial(one_image, compute=partial(_embed_image, h5=h5))
    return explain_batch(request, settings, tell, opened=open_encoder, do=do)


def _embed_image(
    job: Job,
    name: str,
    request: ExplainRequest,
    model: Model,
    pool: Pool,
    settings: PoolSettings,
    tell: Tell,
    *,
    h5: Path | None,
) -> ImageReport:
    from flows.first_pass import embed, forget_failed
    from flows.steps import tiles_store
    from flows.work import Work
    from schemas.errors import SourceError
    from schemas.heatmap import TileStatus
    from schemas.run import Counts, ImageReport
    from workers.embedder import Embedder
    from workers.explainer import ExplainInit
    from workers.pool import Stage
    from workers.provenance import versions
    from workers.publisher import drop_derived, finished_report
    from workers.store.bags import Bag
    from workers.store.heatmap import HeatmapStore

    if not job.tiles.image.pixels:
        msg = (
            f"{job.request.uri}: holds features already; give the slide to embed it, or explain what is here"
        )
        raise SourceError(msg)
    tiles = tiles_store(job, request)
    bag = Bag(tiles.path, tiles.info, "r+")
    heatmap = job.folder / "heatmap.ome.zarr"
    if request.retry_failed and bag.failed():
        drop_derived(job.folder)  # first: killed in between, no report outlives its decision
        forget_failed(tiles, HeatmapStore.open(heatmap, "r+") if heatmap.exists() else None, bag, None)
    work = Work(job, name, pool, tell)
    clock = time.perf_counter()
    if bag.pending_units():
        init = ExplainInit(
            tiles=str(tiles.path),
            tiles_id=job.tiles.tiles_id,
            model=model.path,
            threads=settings.threads or 1,
        )
        embed(work, Stage("embed", Embedder, init, "device"), bag, tiles)
    seconds = {"embed": time.perf_counter() - clock, **work.seconds}
    if h5 is not None:
        from workers.export.features import write_features

        work.notes.append(f"features in {write_features(h5, tiles)}")
    earlier = finished_report(job.folder, job.heatmap.run_id)
    if earlier is not None:  # explained already: what is known of it is more than this
        return earlier.model_copy(update={"image": job.request.uri, "output": str(job.folder)})
    status = bag.statuses()
    done, failed, left_out = (
        int((status == s).sum()) for s in (TileStatus.DONE, TileStatus.FAILED, TileStatus.LEFT_OUT)
    )
    failures = bag.failures(tiles.boxes())
    error = (
        f"{job.request.uri}: {failed} of {job.plan.planned} tiles have no features, the first since: {failures[0].reason}"
        if failed
        else ""
    )
    return ImageReport(
        image=job.request.uri,
        image_id=job.folder.name,
        status="gaps" if failed or work.lost else "complete",
        error=error,
        output=str(job.folder),
        counts=Counts(planned=job.plan.planned, done=done, failed=failed, left_out=left_out),
        failures=failures,
        failed_tasks=tuple(work.lost),
        seconds=seconds,
        notes=tuple(dict.fromkeys([*job.notes, *work.notes])),
        provenance={
            "tiles_id": job.tiles.tiles_id,
            "stage": "embed",
            "spec": job.tiles.spec.model_dump(mode="json"),
            "image": job.tiles.image.model_dump(mode="json"),
            "lattice": job.tiles.lattice.model_dump(mode="json"),
            "versions": versions(),
            "pool": pool.description,
            "device": ", ".join(sorted(work.devices)),
            "intended_use": model.card.intended_use,
        },
    )
