"""The rim phantom: lesions that differ in nothing but where their signal sits.

After paramagnetic rim lesions on quantitative susceptibility maps (ppb): a *rim+* lesion is a core inside a
brighter shell that covers most of its surface; a *rim-* lesion is uniform. They come in twins of equal shape
and equal mean, so that mean, size and place carry no label and an explanation must look at the arrangement.
Vein-like bright tubes are distractors. Arrays are (z, y, x), lengths in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from schemas.errors import SpecError

REST, RIM_MINUS, CORE, SHELL = 0, 1, 2, 3
"""Truth values: background and veins, rim- lesion, core and shell of a rim+ lesion."""

BACKGROUND_SD = 10.0  # ppb, after smoothing
NOISE_SD = 3.0
_SMOOTHING_MM = 1.0
_PSF_VOXELS = 0.5
_SUBVOXELS = 3  # samples an axis and voxel for partial volume
_PAIRS = 5

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Mm = tuple[float, float, float]


@dataclass(frozen=True)
class Lesion:
    """Shape and signal of a pair of twins."""

    axes_mm: Mm
    """Semi-axes of the ellipsoid."""
    rotation: F64
    """(3, 3): from (z, y, x) in mm to the ellipsoid's own axes."""
    shell_mm: float
    gap: tuple[float, float, float]
    """Unit vector, own axes: middle of the part of the surface without shell."""
    covered: float
    """Share of the directions (own axes, scaled to a sphere) that carry a shell."""
    core_ppb: float
    rim_ppb: float
    """What the shell adds to the core."""

    @property
    def volume_mm3(self) -> float:
        return 4.0 / 3.0 * float(np.pi * np.prod(self.axes_mm))


@dataclass(frozen=True)
class Stamp:
    """A pair of twins on voxels, centred on the middle of the middle voxel."""

    truth: U8
    """Of the rim+ twin; every non-zero voxel is lesion."""
    rim_plus: F32
    rim_minus: F32
    """ppb above background, blurred by the point spread; equal means over the lesion's voxels."""


@dataclass(frozen=True)
class Phantom:
    """A volume and what is in it."""

    values: F32
    """(z, y, x), ppb."""
    truth: U8
    """(z, y, x): 0 rest, 1 rim- lesion, 2 rim+ core, 3 rim+ shell."""
    spacing_mm: Mm
    lesions: tuple[Lesion, ...]
    """One a pair of twins."""


def rim_phantom(
    shape: tuple[int, int, int] = (96, 96, 96), spacing_mm: Mm = (1.0, 1.0, 1.0), *, seed: int
) -> Phantom:
    """Draw a volume with five pairs of twins and some veins.

    Parameters
    ----------
    shape
        Voxels, (z, y, x).
    spacing_mm
        Voxel size, (z, y, x). Sizes are physical: coarser voxels mean fewer of them a lesion.
    seed
        Equal seeds give equal phantoms.

    Raises
    ------
    SpecError
        The lesions do not fit into the volume.
    """
    rng = np.random.default_rng((seed, 10))
    values = _background(rng, shape, spacing_mm)
    truth = np.zeros(shape, np.uint8)
    lesions = tuple(_draw_lesion(rng) for _ in range(_PAIRS))
    taken = np.zeros(shape, np.bool_)
    for lesion in sorted(lesions, key=lambda one: -one.volume_mm3):
        stamp = rasterise(lesion, spacing_mm)
        for has_rim in (True, False):
            box = _free_box(rng, stamp.truth.shape, taken)
            inside = stamp.truth > 0
            values[box] += stamp.rim_plus if has_rim else stamp.rim_minus
            truth[box][inside] = stamp.truth[inside] if has_rim else RIM_MINUS
            taken[box] = True
    values += _veins(rng, shape, spacing_mm, count=4, keep_clear=truth > 0)
    values += rng.normal(0.0, NOISE_SD, shape).astype(np.float32)
    return Phantom(values, truth, spacing_mm, lesions)


def write_phantom(
    path: Path,
    truth_path: Path,
    shape: tuple[int, int, int] = (96, 96, 96),
    spacing_mm: Mm = (1.0, 1.0, 1.0),
    *,
    seed: int,
) -> Phantom:
    """Write `rim_phantom` as NIfTI (float32, RAS, centred on the origin) with its truth (uint8)."""
    phantom = rim_phantom(shape, spacing_mm, seed=seed)
    step = np.array(spacing_mm[::-1])
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -step * (np.array(shape[::-1]) - 1) / 2
    for where, array in ((path, phantom.values), (truth_path, phantom.truth)):
        image = nib.nifti1.Nifti1Image(array.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, where)
    return phantom


def training_crops(
    n: int, tile: tuple[int, int, int] = (32, 32, 32), *, seed: int, spacing_mm: Mm = (1.0, 1.0, 1.0)
) -> tuple[F32, F32]:
    """Draw `n` labelled crops: of six in a row, two pairs of twins and two without a lesion.

    Twins share shape, place, background, veins and noise. Lesions lie anywhere in the crop, also partly
    outside.

    Returns
    -------
    x
        `(n, 1, *tile)` float32, ppb.
    y
        `(n, 1)` float32: 1 for rim+, 0 for rim- and for crops without a lesion.
    """
    rng = np.random.default_rng((seed, 11))
    x = np.empty((n + n % 2, 1, *tile), np.float32)
    y = np.zeros((n + n % 2, 1), np.float32)
    for i in range(0, n, 2):
        if i % 6 == 4:
            for k in (i, i + 1):
                x[k, 0] = _scene(rng, tile, spacing_mm, np.zeros(tile, np.bool_))
            continue
        stamp = rasterise(_draw_lesion(rng), spacing_mm)
        crop, part = _overlap(rng, tile, stamp.truth.shape)
        lesion = np.zeros(tile, np.bool_)
        lesion[crop] = stamp.truth[part] > 0
        x[i : i + 2, 0] = _scene(rng, tile, spacing_mm, lesion)
        x[i, 0][crop] += stamp.rim_plus[part]
        x[i + 1, 0][crop] += stamp.rim_minus[part]
        y[i] = 1.0
    return x[:n], y[:n]


def rasterise(lesion: Lesion, spacing_mm: Mm) -> Stamp:
    """Put a pair of twins on voxels, with partial volume from `_SUBVOXELS`^3 samples a voxel."""
    spacing, axes = np.array(spacing_mm), np.array(lesion.axes_mm)
    reach = np.sqrt(np.square(axes[:, None] * lesion.rotation).sum(axis=0))  # of the rotated ellipsoid
    shape = tuple(int(side) for side in 2 * (np.ceil(reach / spacing).astype(int) + 2) + 1)
    z, y, x = np.meshgrid(
        *(
            ((np.arange(side * _SUBVOXELS) + 0.5) / _SUBVOXELS - side / 2) * step
            for side, step in zip(shape, spacing, strict=True)
        ),
        indexing="ij",
        sparse=True,
    )
    # own axes, scaled so that the ellipsoid is the unit sphere
    sphere = [(row[0] * z + row[1] * y + row[2] * x) for row in lesion.rotation / axes[:, None]]
    squares = [np.square(part) for part in sphere]
    distance2 = squares[0] + squares[1] + squares[2]
    inside = distance2 <= 1.0
    shrunk = np.square(axes / (axes - lesion.shell_mm))
    hollow = shrunk[0] * squares[0] + shrunk[1] * squares[1] + shrunk[2] * squares[2] > 1.0
    towards_gap = sum(g * part for g, part in zip(lesion.gap, sphere, strict=True)) / np.sqrt(
        distance2 + 1e-12
    )
    # a cap of the sphere around `gap` with this cosine has the share 1 - covered of its surface
    shell = inside & hollow & (towards_gap < 2.0 * lesion.covered - 1.0)

    lesion_part, shell_part = _voxel_share(inside, shape), _voxel_share(shell, shape)
    voxels = lesion_part >= 0.5
    truth = np.zeros(shape, np.uint8)
    truth[voxels] = np.where(shell_part[voxels] >= 0.5 * lesion_part[voxels], SHELL, CORE)
    rim_plus = _blur(lesion.core_ppb * lesion_part + lesion.rim_ppb * shell_part)
    uniform = _blur(lesion_part)
    rim_minus = uniform * (rim_plus[voxels].mean() / uniform[voxels].mean())
    return Stamp(truth, rim_plus.astype(np.float32), rim_minus.astype(np.float32))


def _draw_lesion(rng: np.random.Generator) -> Lesion:
    a, b, c = (float(value) for value in rng.uniform(3.0, 8.0, 3))
    rotation, upper = np.linalg.qr(rng.standard_normal((3, 3)))
    rotation *= np.sign(
        np.diag(upper)
    )  # uniform over rotations (and reflections, which an ellipsoid ignores)
    gap = rng.standard_normal(3)
    gap /= np.linalg.norm(gap)
    return Lesion(
        axes_mm=(a, b, c),
        rotation=rotation,
        shell_mm=float(rng.uniform(1.0, 2.0)),
        gap=(float(gap[0]), float(gap[1]), float(gap[2])),
        covered=float(rng.uniform(0.7, 1.0)),
        core_ppb=float(rng.uniform(10.0, 25.0)),
        rim_ppb=float(rng.uniform(30.0, 60.0)),
    )


def _voxel_share(fine: NDArray[np.bool_], shape: tuple[int, ...]) -> F64:
    z, y, x = shape
    n = _SUBVOXELS
    return np.asarray(fine.reshape(z, n, y, n, x, n).mean(axis=(1, 3, 5)))


def _blur(values: F64) -> F64:
    return np.asarray(ndimage.gaussian_filter(values, _PSF_VOXELS, mode="constant"))


def _background(rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: Mm) -> F32:
    noise = rng.standard_normal(shape, np.float32)
    smooth = ndimage.gaussian_filter(noise, [_SMOOTHING_MM / s for s in spacing_mm], mode="wrap")
    # the filter's own gain, not the sample's: a crop keeps the statistics of the whole
    impulse = np.zeros(shape, np.float32)
    impulse[tuple(n // 2 for n in shape)] = 1.0
    kernel = ndimage.gaussian_filter(impulse, [_SMOOTHING_MM / s for s in spacing_mm], mode="wrap")
    return np.asarray(smooth * (BACKGROUND_SD / np.linalg.norm(kernel)), np.float32)


def _scene(
    rng: np.random.Generator, tile: tuple[int, int, int], spacing_mm: Mm, lesion: NDArray[np.bool_]
) -> F32:
    values = _background(rng, tile, spacing_mm)
    values += _veins(rng, tile, spacing_mm, count=int(rng.integers(0, 2)), keep_clear=lesion)
    values += rng.normal(0.0, NOISE_SD, tile).astype(np.float32)
    return values


def _veins(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    spacing_mm: Mm,
    *,
    count: int,
    keep_clear: NDArray[np.bool_],
) -> F32:
    """Straight bright tubes across the volume, cut where they would come within 3 mm of a lesion."""
    step = np.array(spacing_mm)
    size = np.array(shape) * step
    place = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(shape, step, strict=True)), indexing="ij"),
        axis=-1,
    )
    veins = np.zeros(shape, np.float64)
    for _ in range(count):
        through, direction = rng.uniform(0, size), rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        radius, ppb = rng.uniform(0.8, 1.6), rng.uniform(60.0, 150.0)
        offset = place - through
        along = offset @ direction
        distance = np.sqrt(np.maximum(np.square(offset).sum(-1) - along**2, 0.0))
        # linear over one voxel at the wall stands for partial volume
        veins = np.maximum(veins, ppb * np.clip((radius - distance) / step.mean() + 0.5, 0.0, 1.0))
    if keep_clear.any():
        veins[ndimage.distance_transform_edt(~keep_clear, sampling=step) < 3.0] = 0.0
    return _blur(veins).astype(np.float32)


def _free_box(
    rng: np.random.Generator, side: tuple[int, ...], taken: NDArray[np.bool_]
) -> tuple[slice, slice, slice]:
    room = np.array(taken.shape) - np.array(side)
    for _ in range(2000 if room.min() >= 0 else 0):
        z, y, x = rng.integers(0, room + 1)
        box = (slice(z, z + side[0]), slice(y, y + side[1]), slice(x, x + side[2]))
        if not taken[box].any():
            return box
    msg = (
        f"rim phantom: no room for {2 * _PAIRS} lesions in {taken.shape} voxels (the next needs {side}); "
        "ask for a larger volume"
    )
    raise SpecError(msg)


def _overlap(
    rng: np.random.Generator, tile: tuple[int, ...], side: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the crop and of the stamp that meet, the stamp's centre being 4 voxels or more inside the crop."""
    crop, part = [], []
    for n, m in zip(tile, side, strict=True):
        start = int(rng.integers(min(4, n // 2), max(n - 4, n // 2 + 1))) - m // 2
        low, high = max(0, start), min(n, start + m)
        crop.append(slice(low, high))
        part.append(slice(low - start, high - start))
    return tuple(crop), tuple(part)
