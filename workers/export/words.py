"""What an overview says in words: numbers, lengths, units, scopes, written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from schemas.explanation import Unit
from schemas.heatmap import ChannelInfo, Coverage
from schemas.image import ImageMeta
from schemas.model import BETWEEN, MINUS
from schemas.run import HeatmapInfo, MapGrid

INTENDED_USE = "For research use only. Not for use in diagnostic procedures."
UNITS: Mapping[Unit, str] = {
    "logit": "logit",
    "logit/cell": "logit per cell",
    "score": "unit of the score",
    "score/cell": "unit of the score, per cell",
    "1": "no unit",
}
COVERAGE_WORDS: Mapping[Coverage, str] = {
    Coverage.PENDING: "not computed yet",
    Coverage.EVALUATED: "evaluated: outlined",
    Coverage.FAILED: "failed: no value",
    Coverage.BACKGROUND: "background: not evaluated",
    Coverage.LEFT_OUT: "left out by choice",
}


RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float) -> str:
    r"""Three significant digits, a true minus sign, a written power of ten.

    >>> number(-2.86e-05)
    '−2.86\xa0×\xa010⁻⁵'
    """
    digits, _, power = f"{value:.3g}".partition("e")
    times = f"\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(int(power)).translate(RAISED)}" if power else ""
    return digits.replace("-", "−") + times


def power_of_ten(window: tuple[float, float]) -> int:
    """What to divide a scale's numbers by, as a power of ten, so that they stay short; mostly 0."""
    power = math.floor(math.log10(max(map(abs, window))))
    return power if not -3 < power < 4 else 0


def unit(name: str, power: int) -> str:
    """A unit as it stands under a scale whose numbers were divided by a power of ten."""
    return f"{name}, × 10{str(power).translate(RAISED)}" if power else name


def length(size: float, unit: str) -> str:
    """A length in um or mm, in the unit people would use."""
    if unit == "um":
        return f"{number(size / 1000)} mm" if size >= 1000 else f"{number(size)} µm"
    return f"{number(size)} mm"


def sides(sizes: Sequence[float], unit: str) -> str:
    """`(z,) y, x` sizes as `x × y (× z)` in one unit, once where all are equal."""
    shown = [f"{v:.3g}" for v in reversed(sizes)]
    name = "µm" if unit == "um" else "mm"
    return f"{shown[0]} {name}" if len(set(shown)) == 1 else f"{' × '.join(shown)} {name}"


def nice_length(most: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(m * power for m in (1, 2, 5) if m * power <= most * (1 + 1e-9))


def subtitle(meta: ImageMeta, info: HeatmapInfo) -> str:
    """Size and scale of image and heatmap."""
    size = " × ".join(str(n) for n in reversed(meta.shape_l0))
    pixel = "pixel" if meta.kind == "slide" else "voxel"
    heat = [d * s for d, s in zip(info.grid.downsample, info.spacing, strict=True)]
    return (
        f"{size} {pixel}s of {sides(info.spacing, info.spacing_unit)}   ·   "
        f"heatmap {pixel} {sides(heat, info.spacing_unit)}"
    )


def target(channel: ChannelInfo) -> str:
    """What the channel explains."""
    if channel.target_index is None:
        return f"Target: the class predicted for {'the whole bag' if channel.bag else 'each tile'}"
    first, contrast, second = channel.target.partition(BETWEEN)
    if not contrast:
        return f"Target: {channel.target}"
    if first == MINUS:
        return f"Target: what speaks against {second}, or lowers it"
    return f"Target: {first} rather than {second}"


def cell(grid: MapGrid, info: HeatmapInfo) -> str:
    """Native size of a CAM cell: detail below it is interpolation."""
    size = [c * s for c, s in zip(grid.cell_l0, info.spacing, strict=True)]
    cells = " × ".join(str(n) for n in reversed(grid.shape))
    return f"Native CAM cell {sides(size, info.spacing_unit)} ({cells} cells a tile); finer detail is interpolated"


def display(signed: bool, kind: str, published: bool) -> str:
    """Where the display window comes from, and over what."""
    values = "|value|" if signed else "values"
    scope = (
        f"all evaluated {'pixels' if kind == 'slide' else 'voxels'} of this {kind}"
        if published
        else "the resolution drawn here"
    )
    return f"Display window: 99.5 % of {values} over {scope}"
