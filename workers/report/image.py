"""The report of one image: one page that needs nothing but itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.errors import GigacamError, SourceError
from schemas.explanation import MethodInfo
from schemas.heatmap import ChannelInfo
from schemas.run import HeatmapInfo, ImageReport
from workers.export import words
from workers.export.context import ExportContext
from workers.export.overview import display_window
from workers.report import facts, limits
from workers.report.pages import write_page
from workers.report.pictures import Panel, SlidePictures, VolumePictures, colour_bar, pictures_of
from workers.report.private import Clean, cleaner, without_folders
from workers.store.tops import TopTile, top_tiles
from workers.store.values import Spread, spreads

log = logging.getLogger("gigacam")

NAME = "report.html"
BINS = 64
BESIDE_WINDOW = 0.25
"""How much of the display window's width a histogram shows beyond either end of it; the rest goes into its last bar."""
MOST_FAILURES = 100
"""Failed tiles named one by one."""
AGAINST = 2
"""Strongest tiles against the target, of a signed map, at most."""


@dataclass(frozen=True)
class Shown:
    """A tile of a report: where it lies, and its pictures without and with heat."""

    mark: str
    top: TopTile
    pictures: tuple[tuple[Panel, Panel], ...]
    missing: str = ""
    """Why there is no picture."""


@dataclass(frozen=True)
class Histogram:
    """Raw values over evaluated pixels, and the colours they are shown in."""

    spread: Spread
    heights: tuple[float, ...]
    """Of its bars, 0 to 1, by the logarithm of their counts."""
    decades: tuple[tuple[str, float], ...]
    """Powers of ten on its upright axis: what is written there, and how high, 0 to 1."""
    ticks: tuple[tuple[str, float], ...]
    """On its level axis, 0 to 1."""
    unit: str
    bar: str
    """Its colours, as a data URI."""
    window: tuple[float, float]
    under: bool
    """The first bar holds values below the axis, too; the last one `over`."""
    over: bool


@dataclass(frozen=True)
class Section:
    """All a report says of one channel."""

    channel: ChannelInfo
    target: str
    unit: str
    cell: str
    knows_class: bool | None
    limit: str
    panels: tuple[Panel, ...]
    histogram: Histogram
    tops: tuple[Shown, ...]
    """For the target, then against it."""
    positive: bool
    """Some tile has a value above zero."""


def write_image_page(
    folder: Path,
    name: str,
    report: ImageReport,
    tile_methods: Mapping[str, MethodInfo],
    bag_methods: Mapping[str, MethodInfo],
    top: int = 4,
) -> Path:
    """Write `report.html` beside an image's heatmap.

    Parameters
    ----------
    folder
        `OUT/<image_id>`.
    name
        What the image is called: no folder of it is ever named.
    report
        Its `report.json`.
    tile_methods, bag_methods
        The tables of methods, without options.
    top
        Strongest tiles to show of each channel.

    Raises
    ------
    StoreError
        The image was explained, and its stores are gone or of another version.
    """
    clean = cleaner(report, name)
    shown = without_folders(report, name)
    sections: list[Section] = []
    whole: list[Panel] = []
    areas: dict[str, list[facts.Area]] = {}
    notes: list[str] = []
    if facts.tiles_have(report) == "features":
        notes.append("The tiles were embedded, and nothing is explained yet: there is no map.")
    if report.status in ("complete", "gaps") and report.channels:
        context = ExportContext.open(folder)
        heatmap, tiles = context.heatmap, context.tiles
        info = heatmap.info
        windows = [display_window(heatmap, c, 0) for c in range(len(info.channels))]
        found, coverage = spreads(heatmap, [_edges(info, c, w) for c, w in enumerate(windows)])
        areas = {label: facts.areas(counts, info) for label, counts in coverage.items()}
        with ExitStack() as stack:
            reader = None
            try:
                reader = stack.enter_context(context.source())
            except SourceError as error:
                notes.append(
                    f"The image itself could not be opened, so that only heat is shown here: {clean(error.message)}"
                )
            try:
                pictures = pictures_of(context.image, heatmap, reader)
            except SourceError as error:
                notes.append(
                    f"The image itself could not be read, so that only heat is shown here: {clean(error.message)}"
                )
                pictures = pictures_of(context.image, heatmap, None)
            if pictures.unreadable:
                notes.append(
                    f"{pictures.unreadable} places of the slide could not be read for its pictures and are drawn as background."
                )
            whole = pictures.whole()
            for c, channel in enumerate(info.channels):
                table = bag_methods if channel.bag_method else tile_methods
                method = table.get(channel.method.partition("+")[0])
                best = top_tiles(tiles, channel, top)
                worst = top_tiles(tiles, channel, min(top, AGAINST), -1) if channel.signed else ()
                cells = None if channel.bag_method else tiles.info.grids[channel.method]
                sections.append(
                    Section(
                        channel=channel,
                        target=words.target(channel),
                        unit=words.UNITS[channel.unit],
                        cell=limits.ONE_VALUE if cells is None else words.cell(cells, info),
                        knows_class=None if method is None else method.class_specific,
                        limit=limits.limit(channel.method, bool(channel.bag_method)),
                        panels=tuple(pictures.under_heat(c, best)),
                        histogram=_histogram(found[c], windows[c], channel.signed),
                        tops=_shown(pictures, c, best, "", clean) + _shown(pictures, c, worst, "against ", clean),
                        positive=found[c].above > 0,
                    )
                )  # fmt: skip
    return write_page(
        folder / NAME,
        "image.html",
        title=name,
        report=shown,
        status=facts.STATUS[report.status],
        sections=sections,
        whole=whole,
        areas=areas,
        notes=[*notes, *shown.notes],
        flags=facts.flags(shown),
        failures=shown.failures[:MOST_FAILURES],
        tiles_have=facts.tiles_have(report),
        source=facts.source(shown),
        model=facts.model(shown),
        how=facts.how(shown),
        recorded=facts.recorded(shown),
        metrics=facts.metrics(folder, clean),
        general=_general(report),
        spacing_unit=_unit(report),
        scale_bar=scale_bar,
    )  # fmt: skip


def _general(report: ImageReport) -> tuple[str, ...]:
    return (*limits.GENERAL, limits.OF_TILES if report.bag is None else limits.OF_A_BAG)


def _unit(report: ImageReport) -> str:
    return "mm" if report.provenance.get("image", {}).get("kind") == "volume" else "um"


def _shown(
    pictures: SlidePictures | VolumePictures, channel: int, tops: Sequence[TopTile], mark: str, clean: Clean
) -> tuple[Shown, ...]:
    shown = []
    for n, top in enumerate(tops, 1):
        try:
            shown.append(Shown(f"{mark}{n}", top, tuple(pictures.tile(channel, top))))
        except GigacamError as error:
            shown.append(Shown(f"{mark}{n}", top, (), clean(error.message)))
    return tuple(shown)


def _edges(info: HeatmapInfo, channel: int, window: tuple[float, float]) -> NDArray[np.float64]:
    """Bins of a histogram: the display window, and what there is beside it, up to a quarter of its width."""
    start, stop = window
    low, high = info.value_range[channel] if info.value_range else window
    reach = BESIDE_WINDOW * (stop - start)
    return np.linspace(min(start, max(low, start - reach)), max(stop, min(high, stop + reach)), BINS + 1)


def _histogram(spread: Spread, window: tuple[float, float], signed: bool) -> Histogram:
    first, last = float(spread.edges[0]), float(spread.edges[-1])
    most = math.log10(1 + int(spread.counts.max()))
    power = words.power_of_ten((first, last))
    start, stop = window
    ticks = (start, (start + stop) / 2, stop)
    return Histogram(
        spread=spread,
        heights=tuple((np.log10(1.0 + spread.counts) / (most or 1.0)).tolist()),
        decades=tuple(
            (str(10**n) if n < 4 else f"10{str(n).translate(words.RAISED)}", math.log10(1 + 10**n) / most)
            for n in range(int(most) + 1)
            if most and math.log10(1 + 10**n) <= most
        ),
        ticks=tuple((words.number(t / 10**power), (t - first) / (last - first)) for t in ticks),
        unit=f"× 10{str(power).translate(words.RAISED)}" if power else "",
        bar=colour_bar(window, (first, last), signed),
        window=window,
        under=bool(spread.number) and spread.low < first,
        over=bool(spread.number) and spread.high > last,
    )


def scale_bar(panel: Panel, unit: str) -> tuple[str, float]:
    """What is written on a panel's scale bar, and how much of its width it takes."""
    size = words.nice_length(0.3 * panel.size[1])
    return words.length(size, unit), size / panel.size[1]
