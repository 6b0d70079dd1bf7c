"""The `gigacam` command: words in, exit codes out. Heavy libraries load inside the commands that need them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flows import desktop, embedding, export, report, training, view
from flows.options import (
    INTERRUPTED,
    Address,
    AsJson,
    BagMethods,
    Batch,
    CellCentres,
    Channel,
    Direct,
    Downsample,
    Edge,
    Exports,
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
    Words,
    WorkerCount,
    explain_request,
    pool_settings,
    read_options,
    words,
)
from schemas.errors import GigacamError, ModelError, SourceError, SpecError

if TYPE_CHECKING:
    from schemas.run import ExplainRequest, PoolSettings, RunReport

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Class activation maps of whole slides and volumes, stitched into OME-Zarr heatmap pyramids.",
)

EXIT_OK, EXIT_INCOMPLETE, EXIT_WRONG_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


@app.command()
def inspect(image: Images, mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
            time: TimePoint = None, as_json: AsJson = False) -> None:  # fmt: skip
    """Print what the readers know of an image: size, levels, pixel size and where it was read, identity."""
    from workers.readers import expand, open_image

    read = read_options(mpp, spacing, channel, time)
    failed = False
    documents = []
    for request in expand(image):
        options = read.model_copy(update=request.options.model_dump(exclude_none=True))
        try:
            reader = open_image(request.uri, options)
        except GigacamError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        meta = reader.meta
        reader.close()
        documents.append({"image_id": meta.image_id(), **meta.model_dump(mode="json")})
        if not as_json:
            print("\n".join(f"{name:20} {value}" for name, value in documents[-1].items()))
    if as_json:
        print(json.dumps(documents))
    if failed:
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def plan(image: Images, model: ModelCardPath, out: Out = "out", method: Methods = "",
         bag_method: BagMethods = "", inside: Inside = "all", features: Features = "",
         target: Targets = "", mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
         time: TimePoint = None, layer: Layer = "", tile: Tile = "", overlap: Overlap = 0.0,
         edge: Edge = "shift", tissue: Tissue = "auto", region: Region = "", mask: Mask = "",
         batch: Batch = 32, unit: Unit = None, importance: Importance = "hann",
         downsample: Downsample = None, cell_centres: CellCentres = "receptive_field",
         precision: PrecisionTier = "fp32", allow_upsampling: Upsampling = False,
         workers: WorkerCount = None, image_id: ImageIdStyle = "stem",
         measure: Annotated[bool, typer.Option("--measure", help="Run one batch to estimate the time; writes no output.")] = False,
         as_json: AsJson = False) -> None:  # fmt: skip
    """Print tiles, units, bytes, memory and estimated time; compute nothing."""
    request = explain_request(locals())
    from flows.batch import list_images
    from workers.costs import measure_rate, summarise
    from workers.planner import open_model, plan_image

    settings = pool_settings("serial", "", workers, None)
    images = list_images(request)
    loaded = open_model(request)
    failed = False
    summaries = []
    for one in images:
        try:
            job = plan_image(one, request, loaded)
            if measure:
                measure_rate(job, loaded, os.cpu_count() or 1)
            summary = summarise(job, request, loaded, settings)
        except (SourceError, SpecError) as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        summaries.append(summary.model_dump(mode="json"))
        if not as_json:
            from flows.tables import plan_lines

            print("\n".join(plan_lines(summary)))
    if as_json:
        print(json.dumps(summaries))
    if failed:
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def explain(image: Images, model: ModelCardPath, out: Out, method: Methods = "",
            bag_method: BagMethods = "", inside: Inside = "all", features: Features = "",
         target: Targets = "", mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
            time: TimePoint = None, layer: Layer = "", tile: Tile = "", overlap: Overlap = 0.0,
            edge: Edge = "shift", tissue: Tissue = "auto", region: Region = "", mask: Mask = "",
            batch: Batch = 32, unit: Unit = None, importance: Importance = "hann",
            downsample: Downsample = None, cell_centres: CellCentres = "receptive_field",
            precision: PrecisionTier = "fp32", allow_upsampling: Upsampling = False,
            pool: PoolKind = "auto", ray_address: Address = "",
            workers: WorkerCount = None, threads: Threads = None,
            fresh: Annotated[bool, typer.Option("--fresh", help="Where OUT holds a result of another request, move it aside first.")] = False,
            retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Compute tiles that failed before once more.")] = False,
            direct: Direct = False,
            words: Words = 0,
            strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that is not complete.")] = False,
            image_id: ImageIdStyle = "stem", export: Exports = "", as_json: AsJson = False) -> None:  # fmt: skip
    """Explain images: tiles, class activation maps, stitched heatmap pyramids."""
    request = explain_request(locals())
    settings = pool_settings(pool, ray_address, workers, threads)
    try:
        _run(request, settings, direct, as_json)
    except KeyboardInterrupt:
        _interrupted()


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List every CAM method and every bag method: name, unit, what it needs, citation."""
    from workers.cam.bag_methods import BAG_METHODS
    from workers.cam.methods import METHODS

    rows = {
        "--method": [row.info for row in METHODS.values()],
        "--bag-method": [row.info for row in BAG_METHODS.values()],
    }
    if as_json:
        print(
            json.dumps([{"flag": f, **r.model_dump(mode="json")} for f, infos in rows.items() for r in infos])
        )
        return
    from flows.tables import method_table, print_table

    for flag, infos in rows.items():
        print_table(method_table(infos, flag))


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder to write to.")] = "demo",
    slide: Annotated[
        str, typer.Option("--slide", help="A slide of your own to explain too. Default: none.")
    ] = "",
    methods: Annotated[
        str,
        typer.Option(
            "--methods", help="CAM methods, comma separated; all: every method. Default: a quick selection."
        ),
    ] = "",
    mil: Annotated[
        bool,
        typer.Option(
            "--mil",
            help="The demo of bags instead: 40 slides, two heads trained on them, two held-out slides explained.",
        ),
    ] = False,
    pool: PoolKind = "ray",
    workers: WorkerCount = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data and of the training.")] = 0,
    direct: Direct = False,
) -> None:
    """Make a slide and a volume, train two small networks, explain both, and measure the maps."""
    settings = pool_settings(pool, "", workers, threads)
    names = words(methods)
    _check_demo(names, slide)
    if mil:
        if slide or "all" in names:
            msg = "--mil: takes no --slide, and --methods by name: inside the tiles of a bag not every method can be had"
            raise SpecError(msg)
        from flows.demo_mil import run_mil_demo

        _exit(run_mil_demo(Path(out), names, settings, seed, direct).exit_code)
    from flows.demo import run_demo

    _exit(run_demo(Path(out), slide, names, settings, seed, direct).exit_code)


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="Name of a value; without one the names are listed.")] = "",
) -> None:
    """Print the JSON Schema of one of the project's values."""
    from flows.tables import json_schemas

    known = json_schemas()
    if not name:
        print("\n".join(sorted(known)))
    elif name in known:
        print(json.dumps(known[name].model_json_schema(), indent=2))
    else:
        msg = f"schema {name!r}: unknown; the schemas are {', '.join(sorted(known))}"
        raise SpecError(msg)


@app.command()
def doctor() -> None:
    """Check the environment, and say what to fix."""
    from flows.doctor import checks

    failed = False
    for check in checks():
        failed |= not check.ok
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.found}")
        if not check.ok:
            print(f"      {check.remedy}")
    _exit(int(failed))


embedding.register(app)
training.register(app)
export.register(app)
report.register(app)
view.register(app)
desktop.register(app)


def _run(request: ExplainRequest, asked: PoolSettings, direct: bool, as_json: bool) -> NoReturn:
    """Explain directly, or through Prefect where there is more than one image or an API to report to."""
    from flows.progress import listener
    from flows.settings import resolve_pool

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from workers.readers import expand

    settings, why = resolve_pool(asked, len(expand(request.images)))
    through_prefect = not direct and (settings.kind == "ray" or bool(os.environ.get("PREFECT_API_URL")))
    how = "Prefect" if through_prefect else "direct"
    print(f"pool: {why}; {how}", file=sys.stderr)
    told = listener(as_json)
    try:
        if through_prefect:
            from flows.server import recorded

            with recorded(told, settings) as run:
                report = run(request, settings)
        else:
            from flows.batch import explain_batch

            report = explain_batch(request, settings, told)
    finally:
        told.close()
    _finish(report, request.out, as_json)


def _check_demo(methods: tuple[str, ...], slide: str) -> None:
    """Refuse what would only fail after minutes of training."""
    from workers.cam.methods import method
    from workers.readers import open_image

    try:
        for name in methods:
            if name != "all":
                method(name)
    except SpecError as error:
        msg = f"--methods {error}"
        raise SpecError(msg) from error
    if slide:
        try:
            open_image(slide).close()
        except SourceError as error:
            msg = f"--slide {error}"
            raise SpecError(msg) from error


def _finish(report: RunReport, out: str, as_json: bool) -> NoReturn:
    if as_json:
        print(report.model_dump_json())
    else:
        from flows.tables import report_lines

        print("\n".join(report_lines(report, out)))
    if report.exit_code == EXIT_INTERRUPTED:
        _interrupted()
    _exit(report.exit_code)


def _interrupted() -> NoReturn:
    print(INTERRUPTED, file=sys.stderr)
    _exit(EXIT_INTERRUPTED)


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"gigacam {version('gigacam')}")
        _exit(EXIT_OK)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run the command in `words` (None: the process's own); a wrong request is one line and exit code 2."""
    from flows.settings import quiet_environment

    quiet_environment()
    try:
        app(words, prog_name="gigacam")
    except (SpecError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_WRONG_REQUEST)
    except GigacamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INCOMPLETE)


if __name__ == "__main__":
    main()
