"""The `gigacam` command: words in, exit codes out. Heavy libraries load inside the commands that need them."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

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

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...",
        help="File, folder, glob (quoted), .csv (column image; may have mpp, target, spacing), or procedural:...",
        show_default=False,
    ),
]
ModelCardPath = Annotated[str, typer.Option("--model", help="Model card (model.toml).")]
Out = Annotated[str, typer.Option("--out", help="Folder for the results; made if absent.")]
Methods = Annotated[
    str, typer.Option("--method", help="CAM methods, comma separated; gigacam methods lists them.")
]
Targets = Annotated[
    str,
    typer.Option(
        "--target",
        help="What to explain: class names, indices, predicted or all; comma separated. Default: the card's "
        "default_target, else all where there are at most 8 classes.",
    ),
]
Mpp = Annotated[
    float | None, typer.Option("--mpp", help="Slide pixel size in um at level 0. Default: the file's.")
]
Spacing = Annotated[
    str, typer.Option("--spacing", help="Voxel size in mm, one number or z,y,x (RAS). Default: the file's.")
]
Channel = Annotated[
    int | None,
    typer.Option("--channel", help="Index on the channel axis of a volume. Default: its only one."),
]
TimePoint = Annotated[
    int | None, typer.Option("--time", help="Index on the time axis of a volume. Default: its only one.")
]
Layer = Annotated[str, typer.Option("--layer", help="Layer to explain, by module name. Default: the card's.")]
Tile = Annotated[
    str, typer.Option("--tile", help="Tile size in model px, one number, y,x or z,y,x. Default: the card's.")
]
Overlap = Annotated[
    float, typer.Option("--overlap", help="Fraction of a tile its neighbour shares, 0 to <1.")
]
Edge = Annotated[
    str,
    typer.Option(
        "--edge", help="Last tile of an axis: shift (moved inward) or pad (reaches past the image)."
    ),
]
Tissue = Annotated[
    str, typer.Option("--tissue", help="auto (tiles on tissue; volumes: on foreground) or none (every tile).")
]
Region = Annotated[
    str,
    typer.Option(
        "--region", help="GeoJSON polygons in level-0 px: only tiles that meet one. Default: the whole image."
    ),
]
Mask = Annotated[
    str,
    typer.Option(
        "--mask",
        help="Image over the whole slide or volume; where it is not 0 takes the place of the tissue mask. "
        "Default: none.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", help="Tiles the device computes at once.")]
Unit = Annotated[
    int | None, typer.Option("--unit", help="Tiles a task, the step of resume. Default: 256; volumes 8.")
]
Importance = Annotated[
    str, typer.Option("--importance", help="Weight of a tile where tiles overlap: flat, hann or gaussian.")
]
Downsample = Annotated[
    int | None,
    typer.Option(
        "--downsample",
        help="Level-0 px a heatmap px. Default: the largest power of two within half a CAM cell; volumes of up "
        "to 64 million voxels 1.",
    ),
]
CellCentres = Annotated[
    str,
    typer.Option(
        "--cell-centres",
        help="Where CAM cells lie: receptive_field (measured through the network) or grid (regular over the tile).",
    ),
]
Upsampling = Annotated[
    bool,
    typer.Option(
        "--allow-upsampling", help="Read more than 1.25 times finer than the source. Default: refused."
    ),
]
PoolKind = Annotated[
    str,
    typer.Option(
        "--pool", help="Where the work runs: serial (this process), ray, or auto (ray for several images)."
    ),
]
Address = Annotated[
    str, typer.Option("--ray-address", help="Ray cluster to join. Default: RAY_ADDRESS, else a local one.")
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", help="Ray actors. Default: one a GPU, or one a CPU without GPUs.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="torch threads a worker. Default: 1 for a Ray actor, all cores in serial."
    ),
]
ImageIdStyle = Annotated[
    str, typer.Option("--image-id", help="Name of an image's folder: stem (file name and digest) or hash.")
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on standard output; messages go to standard error."),
]
Direct = Annotated[bool, typer.Option("--direct", help="Run without Prefect.")]


@app.command()
def inspect(image: Images, mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
            time: TimePoint = None, as_json: AsJson = False) -> None:  # fmt: skip
    """Print what the readers know of an image: size, levels, pixel size and where it was read, identity."""
    from workers.readers import expand, open_image

    read = _read_options(mpp, spacing, channel, time)
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
def plan(image: Images, model: ModelCardPath, out: Out = "out", method: Methods = "gradcam",
         target: Targets = "", mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
         time: TimePoint = None, layer: Layer = "", tile: Tile = "", overlap: Overlap = 0.0,
         edge: Edge = "shift", tissue: Tissue = "auto", region: Region = "", mask: Mask = "",
         batch: Batch = 32, unit: Unit = None, importance: Importance = "hann",
         downsample: Downsample = None, cell_centres: CellCentres = "receptive_field",
         allow_upsampling: Upsampling = False, workers: WorkerCount = None, image_id: ImageIdStyle = "stem",
         measure: Annotated[bool, typer.Option("--measure", help="Run one batch to estimate the time; writes no output.")] = False,
         as_json: AsJson = False) -> None:  # fmt: skip
    """Print tiles, units, bytes, memory and estimated time; compute nothing."""
    request = _request(locals())
    from flows.batch import list_images
    from workers.planner import measure_rate, open_model, plan_image, summarise

    settings = _pool("serial", "", workers, None)
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
def explain(image: Images, model: ModelCardPath, out: Out, method: Methods = "gradcam",
            target: Targets = "", mpp: Mpp = None, spacing: Spacing = "", channel: Channel = None,
            time: TimePoint = None, layer: Layer = "", tile: Tile = "", overlap: Overlap = 0.0,
            edge: Edge = "shift", tissue: Tissue = "auto", region: Region = "", mask: Mask = "",
            batch: Batch = 32, unit: Unit = None, importance: Importance = "hann",
            downsample: Downsample = None, cell_centres: CellCentres = "receptive_field",
            allow_upsampling: Upsampling = False, pool: PoolKind = "auto", ray_address: Address = "",
            workers: WorkerCount = None, threads: Threads = None,
            fresh: Annotated[bool, typer.Option("--fresh", help="Where OUT holds a result of another request, move it aside first.")] = False,
            retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Compute tiles that failed before once more.")] = False,
            direct: Direct = False,
            strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that is not complete.")] = False,
            image_id: ImageIdStyle = "stem", as_json: AsJson = False) -> None:  # fmt: skip
    """Explain images: tiles, class activation maps, stitched heatmap pyramids."""
    request = _request(locals())
    settings = _pool(pool, ray_address, workers, threads)
    try:
        _run(request, settings, direct, as_json)
    except KeyboardInterrupt:
        _interrupted()


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List every CAM method: name, unit, what it needs, citation."""
    from workers.cam.methods import METHODS

    rows = [row.info for row in METHODS.values()]
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows]))
        return
    from flows.tables import method_table

    _print_table(method_table(rows))


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder to write to.")] = "demo",
    slide: Annotated[
        str, typer.Option("--slide", help="A slide of your own to explain too. Default: none.")
    ] = "",
    methods: Annotated[
        str, typer.Option("--methods", help="CAM methods, comma separated. Default: all but cam.")
    ] = "",
    pool: PoolKind = "ray",
    workers: WorkerCount = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data and of the training.")] = 0,
    direct: Direct = False,
) -> None:
    """Make a slide and a volume, train two small networks, explain both, and measure the maps."""
    settings = _pool(pool, "", workers, threads)
    names = _words(methods)
    _check_demo(names, slide)
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


def _run(request: ExplainRequest, asked: PoolSettings, direct: bool, as_json: bool) -> NoReturn:
    """Explain directly, or through Prefect where there is more than one image or an API to report to."""
    from flows.progress import listener
    from flows.settings import resolve_pool

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from workers.readers import expand

    settings, why = resolve_pool(asked, len(expand(request.images)))
    settings = _with_threads(settings)
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
    from workers.cam.methods import METHODS
    from workers.readers import open_image

    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        msg = f"--methods {','.join(unknown)}: unknown; the methods are {', '.join(METHODS)}"
        raise SpecError(msg)
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
    print("interrupted: run the same command again to resume; what was computed is kept", file=sys.stderr)
    _exit(EXIT_INTERRUPTED)


def _with_threads(settings: PoolSettings) -> PoolSettings:
    """Serial takes all cores; a CPU actor one thread, so that actors do not fight for cores."""
    if settings.threads is not None:
        return settings
    threads = (os.cpu_count() or 1) if settings.kind == "serial" else 1
    return settings.model_copy(update={"threads": threads})


def _request(flags: dict[str, Any]) -> ExplainRequest:
    from pydantic import ValidationError

    from schemas.run import ExplainRequest

    if not _words(flags["method"]):
        msg = f"--method {flags['method']!r}: names no method; gigacam methods lists them"
        raise SpecError(msg)
    heatmap = {k: flags[k] for k in ("importance", "downsample") if flags[k] != _DEFAULTS[k]}
    values: dict[str, Any] = {
        "images": tuple(flags["image"]),
        "model": flags["model"],
        "out": flags["out"],
        "methods": _words(flags["method"]),
        "targets": _words(flags["target"]),
        "tile": _tile(flags["tile"]),
        "read": _read_options(flags["mpp"], flags["spacing"], flags["channel"], flags["time"]),
        "heatmap": heatmap,
    }
    for name, value in flags.items():
        if name in ExplainRequest.model_fields and name not in values and value != _DEFAULTS.get(name, value):
            values[name] = value
    values = {name: value for name, value in values.items() if value not in ((), None, {})}
    try:
        return ExplainRequest.model_validate(values)
    except ValidationError as error:
        raise SpecError(_flag_errors(error)) from error


_DEFAULTS: dict[str, Any] = {
    "importance": "hann", "downsample": None, "layer": "", "overlap": 0.0, "edge": "shift", "tissue": "auto",
    "region": "", "mask": "", "batch": 32, "unit": None, "cell_centres": "receptive_field",
    "allow_upsampling": False, "fresh": False, "retry_failed": False, "strict": False, "image_id": "stem",
}  # fmt: skip
"""Flag defaults: a value equal to its default is not passed on, so that `plan` can tell what was given."""


_FLAGS = {"kind": "pool", "address": "ray-address"}
"""Fields whose flag has another name."""


def _flag_errors(error: Any) -> str:
    lines = []
    for item in error.errors():
        name = [part for part in item["loc"] if isinstance(part, str)][-1]
        flag = "--" + _FLAGS.get(name, name).replace("_", "-")
        lines.append(f"{flag} {item['input']}: {item['msg'].replace('Input should be', 'expected')}")
    return "; ".join(lines)


def _pool(kind: str, address: str, workers: int | None, threads: int | None) -> PoolSettings:
    from pydantic import ValidationError

    from schemas.run import PoolSettings

    try:
        return PoolSettings(kind=kind, address=address, workers=workers, threads=threads)
    except ValidationError as error:
        raise SpecError(_flag_errors(error)) from error


def _read_options(mpp: float | None, spacing: str, channel: int | None, time: int | None) -> Any:
    from schemas.image import MPP_EXPLICIT_UM, ReadOptions

    low, high = MPP_EXPLICIT_UM
    if mpp is not None and not low <= mpp <= high:
        msg = f"--mpp {mpp:g}: expected a pixel size of {low} to {high} um; check the unit"
        raise SpecError(msg)
    values = None
    if spacing:
        values = _numbers(spacing, "--spacing")
        values = values * 3 if len(values) == 1 else values
        if len(values) != 3 or not all(0 < value < math.inf for value in values):
            msg = f"--spacing {spacing}: expected one number above 0, or three as z,y,x, in mm"
            raise SpecError(msg)
    return ReadOptions(mpp_um=mpp, spacing_mm=values, channel=channel, time=time)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _tile(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    sizes = _numbers(text, "--tile")
    if not all(size.is_integer() for size in sizes):
        msg = f"--tile {text}: expected whole model px, one number or y,x or z,y,x"
        raise SpecError(msg)
    return tuple(int(size) for size in sizes)


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        msg = f"{flag} {text}: expected numbers separated by commas"
        raise SpecError(msg) from None


def _print_table(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


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
