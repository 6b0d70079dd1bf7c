"""The flags of the commands, and the requests they make."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import SpecError

if TYPE_CHECKING:
    from schemas.image import ReadOptions
    from schemas.run import ExplainRequest, PoolSettings

INTERRUPTED = "interrupted: run the same command again to resume; what was computed is kept"

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
    str,
    typer.Option(
        "--method",
        help="CAM methods, comma separated; gigacam methods lists them. Default: gradcam; inside the tiles of a bag hirescam.",
    ),
]
BagMethods = Annotated[
    str,
    typer.Option(
        "--bag-method",
        help="Of a model with a bag head: what each tile gave to the slide's score, comma separated; gigacam methods lists "
        "them. Default: contribution, or gradient_input where the head has none.",
    ),
]
Features = Annotated[
    str,
    typer.Option(
        "--features",
        help="Features made before (.h5 of CLAM or TRIDENT with coords, or what gigacam embed left): the file, or a folder with "
        "one named like each image. Default: the tiles are embedded here.",
    ),
]
Inside = Annotated[
    str,
    typer.Option(
        "--inside",
        help="Tiles of a bag explained inside by --method: all, none, a share of largest relevance by the first bag "
        "method such as 0.1, or 0.1+0.02 with a random sample of the rest. Followed by ,constant: with the attention held "
        "constant, as contribution and lrp hold it.",
    ),
]
Targets = Annotated[
    str,
    typer.Option(
        "--target",
        help="What to explain: class names, indices, predicted or all; A~B: A rather than B; minus~A: what lowers A; "
        "sum: all symbols of a sequence; comma separated. Default: the card's default_target, else all where there are "
        "at most 8 classes.",
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
    int | None,
    typer.Option("--unit", help="Tiles a task, the step of resume. Default: 64 to 256; volumes 8."),
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
PrecisionTier = Annotated[
    str,
    typer.Option(
        "--precision",
        help="fp32, or fast: batch norms folded, channels last, bfloat16 where this machine's processor multiplies in it "
        "(fast-fp32, fast-bf16: that one anywhere); other numbers than fp32, so a run of its own.",
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
Words = Annotated[
    int,
    typer.Option(
        "--words",
        help="Rank the layer's channels, for and against each target, over so many tiles that score it highest; named where "
        "the model card names them. Default: 0, not ranked.",
    ),
]
Exports = Annotated[
    str,
    typer.Option(
        "--export",
        help="Formats to write of each complete image, comma separated; gigacam export lists them. Default: none.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on standard output; messages go to standard error."),
]
Direct = Annotated[bool, typer.Option("--direct", help="Run without Prefect.")]


def explain_request(flags: dict[str, Any]) -> ExplainRequest:
    """Flags by name, as the command received them -> the request; SpecError names the flag that is wrong."""
    from pydantic import ValidationError

    from schemas.bag import InsideSpec
    from schemas.run import ExplainRequest

    if flags["method"] and not words(flags["method"]):
        msg = f"--method {flags['method']!r}: names no method; gigacam methods lists them"
        raise SpecError(msg)
    heatmap = {k: flags[k] for k in ("importance", "downsample") if flags[k] != _DEFAULTS[k]}
    values: dict[str, Any] = {
        "images": tuple(flags["image"]),
        "model": flags["model"],
        "out": flags["out"],
        "methods": words(flags["method"]),
        "bag_methods": words(flags["bag_method"]),
        "inside": InsideSpec.parse(flags["inside"]) if flags["inside"] != _DEFAULTS["inside"] else None,
        "targets": words(flags["target"]),
        "tile": _tile(flags["tile"]),
        "read": read_options(flags["mpp"], flags["spacing"], flags["channel"], flags["time"]),
        "heatmap": heatmap,
        "exports": words(flags.get("export", "")),
    }
    for name, value in flags.items():
        if name in ExplainRequest.model_fields and name not in values and value != _DEFAULTS.get(name, value):
            values[name] = value
    values = {name: value for name, value in values.items() if value not in ((), None, {})}
    try:
        return ExplainRequest.model_validate(values)
    except ValidationError as error:
        raise SpecError(flag_errors(error)) from error


_DEFAULTS: dict[str, Any] = {
    "inside": "all", "features": "", "importance": "hann", "downsample": None, "layer": "", "overlap": 0.0, "edge": "shift", "tissue": "auto",
    "region": "", "mask": "", "batch": 32, "unit": None, "cell_centres": "receptive_field", "precision": "fp32",
    "allow_upsampling": False, "fresh": False, "retry_failed": False, "words": 0, "strict": False, "image_id": "stem",
}  # fmt: skip
"""Flag defaults: a value equal to its default is not passed on, so that `plan` can tell what was given."""


_FLAGS = {"kind": "pool", "address": "ray-address"}
"""Fields whose flag has another name."""


def flag_errors(error: Any) -> str:
    lines = []
    for item in error.errors():
        name = [part for part in item["loc"] if isinstance(part, str)][-1]
        flag = "--" + _FLAGS.get(name, name).replace("_", "-")
        lines.append(f"{flag} {item['input']}: {item['msg'].replace('Input should be', 'expected')}")
    return "; ".join(lines)


def pool_settings(kind: str, address: str, workers: int | None, threads: int | None) -> PoolSettings:
    """Where to run; SpecError names the flag that is wrong."""
    from pydantic import ValidationError

    from schemas.run import PoolSettings

    try:
        return PoolSettings(kind=kind, address=address, workers=workers, threads=threads)
    except ValidationError as error:
        raise SpecError(flag_errors(error)) from error


def read_options(mpp: float | None, spacing: str, channel: int | None, time: int | None) -> ReadOptions:
    """What the user settles over the metadata; SpecError names the flag that is wrong."""
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


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words, each once."""
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
