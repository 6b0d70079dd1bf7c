"""Drawing H&E-like tissue whose right answer is known: where things lie, then pixels, band by band.

A slide is laid out once (`lay_out`) and painted in bands of rows (`paint`), so that memory follows the band
and not the slide. Colour is Beer-Lambert: two stains, hematoxylin (nuclei; optical density a channel of Ruifrok and
Johnston, 2001) and eosin (stroma).

Two kinds of foci are planted, lesions and distractors: equally many, of the same radii, cell density, nuclear
shape and stain. Only the direction of their nuclei differs: a lesion's long axes rise to the right (+45
degrees), a distractor's fall (-45 degrees), so that mean and contrast cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

DISTRACTOR, LESION, MIXED = 1, 2, 3
"""Truth values; 0 is everything else, ordinary tissue and glass alike. Mixed foci are planted only where asked for: as dense
as the others, their nuclei point in every direction."""
DIRECTIONS_DEG: dict[int, float | None] = {LESION: 45.0, DISTRACTOR: -45.0, MIXED: None}
"""Of the long axes of a kind's nuclei, rising to the right; None: every direction."""

TISSUE_FRACTION = 0.45
BAND_PX = 512

_CELL = 16  # px a cell of the low-resolution fields
_STAMP = 12  # half side of a nucleus stamp in px
_ANGLE_STEP_DEG = 5
_ANGLES = 180 // _ANGLE_STEP_DEG
_VARIANTS = 6
_H_OD, _E_OD = (0.650, 0.704, 0.286), (0.100, 0.900, 0.420)  # R, G, B
_H_FULL, _E_FULL = 1.5, 1.0  # optical density that 255 stands for
_FOCUS_PITCH, _STROMA_PITCH = 15, 24  # px between nuclei

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    """A focus that is asked for, wherever there is room."""

    kind: int
    """Its value in the truth: one of those above, or another where the direction is no kind's."""
    radius_px: float
    direction_deg: float | None


@dataclass(frozen=True)
class Focus:
    """One planted focus; its outline is a circle with a few harmonics."""

    planted: Planted
    centre_px: tuple[float, float]
    """(y, x), level 0."""
    phases: tuple[float, float, float]

    @property
    def kind(self) -> int:
        return self.planted.kind

    @property
    def radius_px(self) -> float:
        return self.planted.radius_px

    def contains(self, y: F64, x: F64) -> NDArray[np.bool_]:
        dy, dx = y - self.centre_px[0], x - self.centre_px[1]
        angle = np.arctan2(dy, dx)
        outline = 1.0 + sum(
            amplitude * np.cos(order * angle + phase)
            for order, amplitude, phase in zip((2, 3, 5), (0.10, 0.07, 0.04), self.phases, strict=True)
        )
        return np.asarray(np.hypot(dy, dx) < self.radius_px * outline)


@dataclass(frozen=True)
class Layout:
    """Where everything lies on a slide of `size` x `size` px; `paint` makes pixels of it."""

    size: int
    foci: tuple[Focus, ...]
    field: F32
    """Tissue where positive, cells of `_CELL` px."""
    tone: F32
    """Slow variation of the stroma's stain, the same cells; none inside foci, so that both kinds match."""
    cellularity: F32
    """1 inside foci, 0 elsewhere, softened; the same cells."""
    fibres: tuple[F32, F32]
    """Two periodic textures with coprime periods: their sum does not visibly repeat."""
    lumina: F64
    """(lumen, 4): y, x, radius along y, radius along x."""
    nuclei: NDArray[np.int64]
    """(nucleus, 3): y, x, stamp; sorted by y."""
    stamps: tuple[U8, ...]


def lay_out(size: int, seed: int | tuple[int, ...], planted: Sequence[Planted] = ()) -> Layout:
    """Place tissue, foci, gland lumina and nuclei of a slide.

    Parameters
    ----------
    size
        Side of the slide in level-0 px, a multiple of 256, at least 1024. From 4096 px on it holds six
        lesions and six distractors with radii of 100-450 px, below two of each and smaller.
    seed
        Equal seeds give equal slides.
    planted
        Foci instead of those, the largest best first.
    """
    rng = np.random.default_rng(seed)
    cells = size // _CELL
    blobs = _noise(rng, cells, 40.0 * min(1.0, size / 8192 + 0.3)) + 0.25 * _noise(rng, cells, 5.0)
    foci = _place_foci(rng, size, blobs, planted or _usual(size))
    field = _tissue_field(size, blobs, foci)
    lumina = _place_lumina(rng, size, field, foci)
    stamps = _draw_stamps(rng)
    nuclei = _place_nuclei(rng, size, field, foci, lumina)
    cellularity = _cellularity(cells, foci)
    tone = _noise(rng, cells, 12.0) * (1.0 - cellularity)
    fibres = (_fibre_texture(rng, 1021, 7.0), _fibre_texture(rng, 769, 3.0))
    return Layout(size, foci, field, tone, cellularity, fibres, lumina, nuclei, stamps)


def paint(layout: Layout, seed: int | tuple[int, ...]) -> Iterator[tuple[int, U8, U8]]:
    """Yield `(first row, rgb (rows, size, 3), truth (rows, size))` for bands of `BAND_PX` rows, from the top."""
    lut = _stain_lut()
    source = (seed,) if isinstance(seed, int) else seed
    for y0 in range(0, layout.size, BAND_PX):
        y1 = min(y0 + BAND_PX, layout.size)
        truth = truth_of(layout.foci, layout.size, y0, y1)
        alpha = np.clip(_upsample(layout.field, y0, y1, layout.size) * 25.0, 0.0, 1.0)
        _cut_lumina(alpha, layout.lumina, y0)
        eosin = 0.30 + 0.05 * _upsample(layout.tone, y0, y1, layout.size)
        eosin += 0.10 * _periodic(layout.fibres[0], y0, y1, layout.size)
        eosin += 0.06 * _periodic(layout.fibres[1], y0, y1, layout.size)
        eosin *= alpha
        # glass is not quite white, and a camera is never still
        eosin += 0.008 + 0.006 * np.random.default_rng((*source, y0)).standard_normal(eosin.shape, np.float32)
        hematoxylin = _stamp_nuclei(layout, y0, y1)
        # basophilic cytoplasm, denser in both kinds of focus
        haze = (10.0 + 28.0 * _upsample(layout.cellularity, y0, y1, layout.size)) * alpha
        np.maximum(hematoxylin, haze.astype(np.uint8), out=hematoxylin)
        stain = hematoxylin.astype(np.uint16) << 8
        stain |= np.clip(eosin * (255.0 / _E_FULL), 0, 255).astype(np.uint8)
        yield y0, lut[stain], truth


def truth_of(foci: tuple[Focus, ...], size: int, y0: int, y1: int) -> U8:
    """Truth `(y1 - y0, size)` of rows `y0` to `y1`: a pixel belongs to a focus if its centre does."""
    truth = np.zeros((y1 - y0, size), np.uint8)
    for focus in foci:
        (cy, cx), reach = focus.centre_px, 1.25 * focus.radius_px
        top, bottom = max(y0, int(cy - reach)), min(y1, int(cy + reach) + 1)
        left, right = max(0, int(cx - reach)), min(size, int(cx + reach) + 1)
        if top >= bottom:
            continue
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        truth[top - y0 : bottom - y0, left:right][focus.contains(y, x)] = focus.kind
    return truth


def _noise(rng: np.random.Generator, cells: int, sigma: float) -> F32:
    field = ndimage.gaussian_filter(rng.standard_normal((cells, cells), np.float32), sigma, mode="reflect")
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def _usual(size: int) -> tuple[Planted, ...]:
    pairs = 6 if size >= 4096 else 2
    largest, smallest = min(450.0, 0.11 * size), min(100.0, 0.06 * size)
    return tuple(
        Planted(kind, float(radius), DIRECTIONS_DEG[kind])
        for radius in np.linspace(largest, smallest, pairs)
        for kind in (LESION, DISTRACTOR)
    )


def _place_foci(
    rng: np.random.Generator, size: int, blobs: F32, planted: Sequence[Planted]
) -> tuple[Focus, ...]:
    placed: list[Focus] = []
    for one in planted:
        placed.append(_place_focus(rng, size, blobs, one, placed))
    return tuple(placed)


def _place_focus(
    rng: np.random.Generator, size: int, blobs: F32, planted: Planted, placed: list[Focus]
) -> Focus:
    radius = planted.radius_px
    margin = 0.05 * size + 1.25 * radius
    wanted = float(np.quantile(blobs, 0.6))
    gap = 0.02 * size
    for attempt in range(4000):
        y, x = rng.uniform(margin, size - margin, 2)
        # foci belong where tissue would lie anyway; where that is full, anywhere
        lies_well = blobs[int(y) // _CELL, int(x) // _CELL] > wanted or attempt > 1000
        apart = all(
            np.hypot(y - f.centre_px[0], x - f.centre_px[1]) > 1.25 * (radius + f.radius_px) + gap
            for f in placed
        )
        if lies_well and apart:
            a, b, c = rng.uniform(0, 2 * np.pi, 3)
            return Focus(planted, (float(y), float(x)), (float(a), float(b), float(c)))
    msg = f"no room for a focus of radius {radius:.0f} px on a slide of {size} px beside {len(placed)} others"
    raise ValueError(msg)


def _tissue_field(size: int, blobs: F32, foci: tuple[Focus, ...]) -> F32:
    cells = size // _CELL
    y, x = (np.mgrid[:cells, :cells] + 0.5) * _CELL
    edge = np.minimum(np.minimum(y, size - y), np.minimum(x, size - x)) / (0.05 * size)
    field = blobs - 4.0 * np.clip(1.0 - edge, 0.0, 1.0)
    for focus in foci:
        distance = np.hypot(y - focus.centre_px[0], x - focus.centre_px[1])
        field += 5.0 * np.clip((1.35 * focus.radius_px + 100.0 - distance) / 200.0, 0.0, 1.0)
    return np.asarray(field - np.quantile(field, 1.0 - TISSUE_FRACTION), np.float32)


def _cellularity(cells: int, foci: tuple[Focus, ...]) -> F32:
    y, x = (np.mgrid[:cells, :cells] + 0.5) * _CELL
    inside = np.zeros((cells, cells), np.float32)
    for focus in foci:
        inside[focus.contains(y, x)] = 1.0
    return np.asarray(ndimage.gaussian_filter(inside, 1.5), np.float32)


def _place_lumina(rng: np.random.Generator, size: int, field: F32, foci: tuple[Focus, ...]) -> F64:
    """Gland-like gaps in ordinary tissue, away from its border, each other and the foci."""
    kept: list[tuple[float, float, float, float]] = []
    for _ in range(size * size // 200_000):
        y, x = rng.uniform(100, size - 100, 2)
        radius = rng.uniform(14, 45)
        ry, rx = radius * rng.uniform(0.7, 1.3, 2)
        clear = all(
            np.hypot(y - f.centre_px[0], x - f.centre_px[1]) > 1.25 * f.radius_px + 90.0 for f in foci
        ) and all(np.hypot(y - a, x - b) > 140.0 for a, b, _, _ in kept)
        if clear and field[int(y) // _CELL, int(x) // _CELL] > 0.15:
            kept.append((float(y), float(x), float(ry), float(rx)))
    return np.array(kept, np.float64).reshape(-1, 4)


def _place_nuclei(
    rng: np.random.Generator, size: int, field: F32, foci: tuple[Focus, ...], lumina: F64
) -> NDArray[np.int64]:
    rows: list[NDArray[np.int64]] = []

    # ordinary tissue: sparse, round or spindle, in every direction
    y, x = _jittered_grid(rng, 0, size, 0, size, _STROMA_PITCH)
    keep = (field[(y // _CELL).astype(int), (x // _CELL).astype(int)] > 0.02) & (rng.random(y.size) < 0.75)
    for focus in foci:
        keep &= ~focus.contains(y, x)
    for cy, cx, ry, rx in lumina:
        keep &= np.hypot((y - cy) / (ry + 14), (x - cx) / (rx + 14)) > 1.0
    y, x = y[keep], x[keep]
    spindle = _spindle(rng, rng.uniform(0, 180, y.size))
    stamp = np.where(rng.random(y.size) < 0.5, spindle, _ANGLES * _VARIANTS + rng.integers(0, 12, y.size))
    rows.append(np.stack([y.astype(np.int64), x.astype(np.int64), stamp], axis=1))

    # glands: one row of nuclei around the lumen, pointing at it
    for cy, cx, ry, rx in lumina:
        count = int(2 * np.pi * (ry + rx + 22) / 2 / 11)
        turn = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.04, count)
        y, x = cy + (ry + 11) * np.sin(turn), cx + (rx + 11) * np.cos(turn)
        stamp = _spindle(rng, -np.degrees(turn) + rng.normal(0, 8, count))
        rows.append(np.stack([y.astype(np.int64), x.astype(np.int64), stamp], axis=1))

    # foci: dense, spindle; the only difference between the kinds is the direction
    for focus in foci:
        (cy, cx), reach = focus.centre_px, 1.25 * focus.radius_px
        y, x = _jittered_grid(rng, cy - reach, cy + reach, cx - reach, cx + reach, _FOCUS_PITCH)
        keep = focus.contains(y, x) & (rng.random(y.size) < 0.9)
        y, x = y[keep], x[keep]
        direction = focus.planted.direction_deg
        turned = rng.uniform(0, 180, y.size) if direction is None else direction + rng.normal(0, 10, y.size)
        stamp = _spindle(rng, turned)
        rows.append(np.stack([y.astype(np.int64), x.astype(np.int64), stamp], axis=1))

    nuclei = np.concatenate(rows)
    return np.asarray(nuclei[np.argsort(nuclei[:, 0], kind="stable")], np.int64)


def _jittered_grid(
    rng: np.random.Generator, y0: float, y1: float, x0: float, x1: float, pitch: int
) -> tuple[F64, F64]:
    y, x = np.meshgrid(np.arange(y0, y1, pitch), np.arange(x0, x1, pitch), indexing="ij")
    y, x = y.ravel(), x.ravel()
    jitter = rng.uniform(0.1 * pitch, 0.9 * pitch, (2, y.size))
    y, x = y + jitter[0], x + jitter[1]
    inside = (y < y1) & (x < x1)
    return y[inside], x[inside]


def _spindle(rng: np.random.Generator, angle_deg: F64) -> NDArray[np.int64]:
    step = np.round(angle_deg / _ANGLE_STEP_DEG).astype(np.int64) % _ANGLES
    return np.asarray(step * _VARIANTS + rng.integers(0, _VARIANTS, angle_deg.size))


def _draw_stamps(rng: np.random.Generator) -> tuple[U8, ...]:
    """Hematoxylin of single nuclei: spindles by angle and variant, then round ones."""
    v, u = np.mgrid[-_STAMP:_STAMP, -_STAMP:_STAMP] + 0.5  # y down, x
    sizes = [(rng.uniform(7.0, 9.0), rng.uniform(2.7, 3.4)) for _ in range(_VARIANTS)]
    stamps = []
    for step in range(_ANGLES):
        angle = np.radians(step * _ANGLE_STEP_DEG)
        along, across = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
        stamps += [_nucleus(rng, along / a, across / b) for a, b in sizes]
    stamps += [_nucleus(rng, u / a, v / a) for a in rng.uniform(3.8, 5.2, 12)]
    return tuple(stamps)


def _nucleus(rng: np.random.Generator, along: F64, across: F64) -> U8:
    q = along**2 + across**2
    chromatin = ndimage.gaussian_filter(rng.standard_normal(q.shape), 1.0) * 0.25
    density = np.clip((1.0 - q) * 2.5, 0, 1) * (0.85 + 0.2 * (q > 0.55) + chromatin)
    return np.asarray(np.clip(density * (255.0 / _H_FULL), 0, 255), np.uint8)


def _fibre_texture(rng: np.random.Generator, period: int, sigma: float) -> F32:
    """Ridged noise (period, period), wavy lines in every direction, mean 0."""
    noise = ndimage.gaussian_filter(rng.standard_normal((period, period)), sigma, mode="wrap")
    ridges = -np.abs(noise) / noise.std()
    return np.asarray(ridges - ridges.mean(), np.float32)


def _periodic(texture: F32, y0: int, y1: int, size: int) -> F32:
    period = texture.shape[0]
    rows = texture[np.arange(y0, y1) % period]
    return np.tile(rows, (1, -(-size // period)))[:, :size]


def _upsample(field: F32, y0: int, y1: int, size: int) -> F32:
    """Rows `y0` to `y1` of `field` in px, linear between cell centres, constant beyond the outermost."""

    def weights(start: int, stop: int, cells: int) -> tuple[NDArray[np.int64], F32]:
        place = np.clip((np.arange(start, stop) + 0.5) / _CELL - 0.5, 0, cells - 1)
        low = np.minimum(place.astype(np.int64), cells - 2)
        return low, (place - low).astype(np.float32)

    i, wy = weights(y0, y1, field.shape[0])
    j, wx = weights(0, size, field.shape[1])
    rows = field[i] * (1 - wy)[:, None] + field[i + 1] * wy[:, None]
    return np.asarray(rows[:, j] * (1 - wx) + rows[:, j + 1] * wx, np.float32)


def _cut_lumina(alpha: F32, lumina: F64, y0: int) -> None:
    rows, size = alpha.shape
    for cy, cx, ry, rx in lumina:
        top, bottom = max(0, int(cy - ry) - y0), min(rows, int(cy + ry) + 1 - y0)
        if top >= bottom:
            continue
        left, right = max(0, int(cx - rx)), min(size, int(cx + rx) + 1)
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        q = ((y + y0 - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
        alpha[top:bottom, left:right] *= np.clip((q - 0.8) * 5.0, 0.0, 1.0).astype(np.float32)


def _stamp_nuclei(layout: Layout, y0: int, y1: int) -> U8:
    """Hematoxylin of the band: each pixel takes the densest nucleus over it."""
    canvas = np.zeros((y1 - y0 + 4 * _STAMP, layout.size + 2 * _STAMP), np.uint8)
    first, last = np.searchsorted(layout.nuclei[:, 0], (y0 - _STAMP, y1 + _STAMP))
    for y, x, stamp in layout.nuclei[first:last].tolist():
        part = canvas[y - y0 + _STAMP : y - y0 + 3 * _STAMP, x : x + 2 * _STAMP]
        np.maximum(part, layout.stamps[stamp], out=part)
    return canvas[2 * _STAMP : 2 * _STAMP + y1 - y0, _STAMP : _STAMP + layout.size]


def _stain_lut() -> U8:
    """(65536, 3): RGB of `hematoxylin << 8 | eosin`."""
    h, e = np.divmod(np.arange(65536), 256)
    density = np.outer(h * (_H_FULL / 255), _H_OD) + np.outer(e * (_E_FULL / 255), _E_OD)
    return np.asarray(np.round(246.0 * np.exp(-density)), np.uint8)
