"""Which part of an image is worth computing: tissue on a slide, the body in a volume.

Slides are judged in optical density relative to the slide's own glass, where a dye keeps its hue
whatever its amount (van der Laak et al., Cytometry 39:275, 2000): tissue is what absorbs one
colour more than another, ink is what absorbs in a way no histological stain does. Otsu sets the
saturation threshold between a floor (an empty slide stays empty) and a ceiling (a full one stays
full).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from schemas.errors import SpecError
from schemas.grid import TissueSpec

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_GLASS = 240.0  # assumed where a slide shows no glass
_FLOOR, _CEILING = 0.03, 0.055  # saturation in optical density: above glass and its noise, below pale tissue
_PALE = 0.02  # what adjoins tissue need only reach this
_RELATIVE = 0.2  # of the strongest channel: below it an absorber is grey (dust, shadow, bar, line)
_SMOOTH_UM = 8.0
_INK_UM = 32.0  # ink is looked for at this scale: nuclei and folds average out, a stroke does not
_INK_REACH_UM = 800.0  # about a pen's width: how far ink is followed from where it is unmistakable
_INK_RIM_UM = 32.0
_STROKE_UM = 150.0  # narrower than any pen
_COLD = 0.05  # red over green density, beyond any haematoxylin
_HU_BODY = -500.0  # midway between air and soft tissue
_HU_AIR_SHARE = 0.005
_VOLUME_CEILING = 0.15
_KEEP_SHARE = 0.1  # of the largest piece: both legs stay, the table goes


@dataclass(frozen=True)
class TissueMask:
    """What is worth computing, and how that was decided."""

    mask: Mask
    """`(*S)`, the shape of the image it was made from."""
    method: str
    threshold: float
    """In the method's own unit; `nan` where none was used."""
    fraction: float
    """Share of the mask that is True."""
    notes: tuple[str, ...] = ()


def tissue_mask(image: NDArray[Any], pixel_um: tuple[float, ...], spec: TissueSpec) -> TissueMask:
    """Find the tissue of a slide.

    Parameters
    ----------
    image
        `(C, y, x)`. Three channels are brightfield RGB: uint8, or float on the scale 0..255 (0..1 when
        no value exceeds 1). Any other number of channels is judged by intensity: Otsu on the
        largest distance, over the channels, from the background, which is the end of the
        channel's range (1 % or 99 %) nearer to the median of the image's border.
    pixel_um
        Pixel size (y, x). Pixels finer than `spec.mask_um` are averaged to about that first.
    spec
        Method and sizes.

    Returns
    -------
    TissueMask
        In the image's own pixels.

    Raises
    ------
    SpecError
        `image` is not `(C, y, x)`, or `pixel_um` does not fit it.
    """
    if image.ndim != 3 or len(pixel_um) != 2 or min(pixel_um, default=0.0) <= 0:
        raise SpecError(
            f"A slide's tissue mask needs a (C, y, x) array and two positive pixel sizes; "
            f"found shape {image.shape} and pixel_um {pixel_um}."
        )
    shape = image.shape[1:]
    if spec.method == "none" or 0 in shape:
        return _whole(shape)
    factor = tuple(max(1, int(spec.mask_um / um + 1e-6)) for um in pixel_um)
    coarse_um = tuple(um * f for um, f in zip(pixel_um, factor, strict=True))
    if image.shape[0] == 3:
        mask, method, threshold, notes = _stained(image, factor, coarse_um, spec)
    else:
        mask, method, threshold, notes = _contrasting(image, factor, coarse_um)
        mask = _clean(mask, coarse_um, spec)
    mask = _enlarge(mask, factor, shape)
    return TissueMask(mask, method, threshold, float(mask.mean()), notes)


def foreground_mask(volume: NDArray[Any], spacing_mm: tuple[float, ...], spec: TissueSpec) -> TissueMask:
    """Find the body (or organ) in a volume.

    Hounsfield units (recognised by air: a share of voxels below -500) are cut at -500. Otherwise
    the distance from the background is cut by Otsu on its square root, never above 15 % of its
    98th percentile; the background is the commonest value of the volume's faces. Pieces
    smaller than a tenth of the largest go, holes are filled in 3-D and slice by slice (lungs stay).

    Parameters
    ----------
    volume
        `(C, z, y, x)`; a voxel is foreground if any channel says so.
    spacing_mm
        Voxel size (z, y, x).
    spec
        `method` "none" keeps everything; its sizes are a slide's and not used.

    Returns
    -------
    TissueMask
        `threshold` is that of the first channel.

    Raises
    ------
    SpecError
        `volume` is not `(C, z, y, x)`, or `spacing_mm` does not fit it.
    """
    if volume.ndim != 4 or len(spacing_mm) != 3 or min(spacing_mm, default=0.0) <= 0:
        raise SpecError(
            f"A volume's foreground mask needs a (C, z, y, x) array and three positive spacings; "
            f"found shape {volume.shape} and spacing_mm {spacing_mm}."
        )
    shape = volume.shape[1:]
    if spec.method == "none" or 0 in shape:
        return _whole(shape)
    mask = np.zeros(shape, bool)
    decided: list[tuple[str, float]] = []
    for channel in volume:
        found, method, threshold = _above_background(channel.astype(np.float32))
        decided.append((method, threshold))
        mask |= found
    mask = _solid(mask)
    notes = () if mask.any() else ("nothing stands out from the background",)
    return TissueMask(mask, decided[0][0], decided[0][1], float(mask.mean()), notes)


def tissue_fraction(
    mask: Mask,
    starts_l0: NDArray[np.integer[Any]],
    tile_l0: tuple[int, ...],
    mask_downsample: tuple[float, ...],
) -> Floats:
    """Share of each tile that is tissue, from a summed-area table.

    Parameters
    ----------
    mask
        `(*S)`; a mask pixel covers `mask_downsample` level-0 pixels an axis, the first from 0.
    starts_l0
        `(N, axes)` first level-0 pixel of each tile.
    tile_l0
        Tile size in level-0 pixels.
    mask_downsample
        Level-0 pixels of a mask pixel.

    Returns
    -------
    ndarray
        `(N,)` float32 in 0..1: tissue area over tile area; what lies outside the mask is not tissue.

    Notes
    -----
    The integral of a piecewise constant mask is piecewise multilinear, so interpolating the table
    linearly is exact, also at fractional mask coordinates (Crow, SIGGRAPH 1984).
    """
    axes = mask.ndim
    if starts_l0.ndim != 2 or not starts_l0.shape[1] == len(tile_l0) == len(mask_downsample) == axes:
        raise SpecError(
            f"Tiles and mask differ in axes: starts {starts_l0.shape}, tile {tile_l0}, "
            f"downsample {mask_downsample}, mask {mask.shape}."
        )
    table = np.zeros(tuple(n + 1 for n in mask.shape), np.float64)
    table[(slice(1, None),) * axes] = mask
    for axis in range(axes):
        np.cumsum(table, axis=axis, out=table)
    downsample = np.asarray(mask_downsample, np.float64)
    limit = np.asarray(mask.shape, np.float64)
    ends = [
        np.clip(corner / downsample, 0.0, limit).T
        for corner in (starts_l0, starts_l0 + np.asarray(tile_l0, np.int64))
    ]
    total = np.zeros(len(starts_l0), np.float64)
    for corner in np.ndindex(*(2,) * axes):
        at = np.stack([ends[side][axis] for axis, side in enumerate(corner)])
        sign = (-1) ** (axes - sum(corner))
        total += sign * ndimage.map_coordinates(table, at, order=1, mode="nearest")
    area = float(np.prod(np.asarray(tile_l0, np.float64) / downsample))
    return np.clip(total / area, 0.0, 1.0).astype(np.float32)


def _whole(shape: tuple[int, ...]) -> TissueMask:
    return TissueMask(np.ones(shape, bool), "none", float("nan"), 1.0)


def _stained(
    image: NDArray[Any], factor: tuple[int, ...], um: tuple[float, ...], spec: TissueSpec
) -> tuple[Mask, str, float, tuple[str, ...]]:
    notes: list[str] = []
    scale = 255.0 if image.dtype.kind == "f" and image.size and float(image.max()) <= 1.0 else 1.0
    glass = _glass(image, scale)
    if glass is None:
        glass = np.full(3, _GLASS, np.float32)
        notes.append(f"no glass in view: {_GLASS:g} assumed")
    coarse = _reduce(image, factor)
    if scale != 1.0:
        coarse *= np.float32(scale)
    padding = (coarse >= 255.0).all(0) | (coarse <= 0.0).all(0)
    ink_factor = tuple(max(1, int(_INK_UM / u + 1e-6)) for u in um)
    ink_um = tuple(u * f for u, f in zip(um, ink_factor, strict=True))
    inks = _ink(_density(_reduce(coarse, ink_factor), glass), ink_um)
    ink = _enlarge(np.logical_or.reduce(list(inks.values())), ink_factor, coarse.shape[1:])
    notes.extend(f"{name} ink removed" for name, found in inks.items() if found.any())

    density = _density(coarse, glass)
    for channel in density:
        ndimage.gaussian_filter(channel, [max(0.7, _SMOOTH_UM / u) for u in um], output=channel)
    strongest = density.max(0)
    saturation = strongest - density.min(0)
    ink |= density[0] - density[1] > _COLD
    threshold = _between(saturation[~(padding | ink)])
    coloured = (saturation > _PALE) & (saturation > _RELATIVE * strongest) & ~(padding | ink)
    mask = ndimage.binary_propagation(coloured & (saturation > threshold), mask=coloured)
    mask = _clean(mask, um, spec) & ~ink
    return _clean(mask, um, spec, holes=False), "saturation+otsu", threshold, tuple(notes)


def _glass(image: NDArray[Any], scale: float) -> Floats | None:
    """RGB of the empty slide: the commonest bright, nearly neutral colour that is not padding."""
    step = max(1, int((image[0].size / 1e6) ** 0.5))
    pixels = image[:, ::step, ::step].reshape(3, -1).astype(np.float32) * np.float32(scale)
    low, high = pixels.min(0), pixels.max(0)
    bright = pixels[:, (low >= 180) & (high - low <= 40) & (low < 255)]
    if bright.shape[1] < max(1, 0.005 * pixels.shape[1]):
        return None
    level = bright.sum(0)
    counts, edges = np.histogram(level, bins=np.arange(540, 771, 6))
    peak = int(counts.argmax())
    at_peak = (level >= edges[peak]) & (level <= edges[peak + 1])
    return np.median(bright[:, at_peak], axis=1).astype(np.float32)


def _density(rgb: Floats, glass: Floats) -> Floats:
    """Optical density against the glass, not below 0."""
    density = np.log10(rgb + np.float32(1))
    np.subtract(np.log10(glass + 1)[:, None, None], density, out=density)
    return np.maximum(density, 0, out=density)


def _ink(density: Floats, um: tuple[float, ...]) -> dict[str, Mask]:
    """Pen strokes by colour, in `(3, y, x)` optical densities averaged to about 32 um.

    Each ink is sought where it is unmistakable, followed along its stroke, and then, within a pen's
    width of that, taken to be what it tints. Haematoxylin, eosin and DAB absorb green at
    least as much as red; green and blue inks don't. Red ink passes red light more completely than
    eosin or blood do. Black ink is dark in every channel, as no section is at this scale.
    """
    red, green, blue = density
    strongest, least = density.max(0), density.min(0)
    saturation = strongest - least
    red_share = red / (density.sum(0) + np.float32(1e-6))
    cold = red - green > _COLD
    reddish = (blue > 0.5 * green) & (saturation > 0.1)
    dark = (least > 0.55) & (red <= green) & (saturation < 0.45 * strongest)
    inks = {
        "green or blue": (cold, cold, red - 0.75 * green > 0.03),
        "red": (
            _broad(
                reddish & (saturation > 0.3) & (red_share < 0.03 + 0.05 * np.minimum(saturation, 0.8)), um
            ),
            reddish & (red_share < 0.065),
            reddish & (red_share < 0.13) & (saturation > 0.22),
        ),
        "black": (_broad(dark, um), dark, (least > 0.22) & (saturation < 0.45 * strongest)),
    }
    rim = max(_INK_RIM_UM, 1.5 * max(um))
    found: dict[str, Mask] = {}
    for name, (seed, along, tinted) in inks.items():
        stroke = seed
        if seed.any():
            stroke = ndimage.binary_propagation(seed, mask=seed | along)
            near = ndimage.distance_transform_edt(~stroke, sampling=um) <= _INK_REACH_UM
            stroke = ndimage.binary_propagation(stroke, mask=stroke | (tinted & near))
            stroke = ndimage.distance_transform_edt(~stroke, sampling=um) <= rim
        found[name] = stroke
    return found


def _broad(mask: Mask, um: tuple[float, ...]) -> Mask:
    """What holds a square as wide as a pen stroke: no vessel, fold or nucleus."""
    sides = [int(_STROKE_UM / u) | 1 for u in um]  # odd: an even square would shift
    wide = np.ones((sides[0], sides[1]), bool)
    return ndimage.binary_dilation(ndimage.binary_erosion(mask, wide, border_value=1), wide)


def _between(saturation: Floats) -> float:
    """Otsu's threshold, kept between what glass can reach and what pale tissue has."""
    if saturation.size == 0:
        return _CEILING
    clipped = np.minimum(saturation, np.float32(0.3))
    if float(clipped.max()) - float(clipped.min()) < 1e-6:
        return _CEILING
    otsu = float(threshold_otsu(clipped))  # type: ignore[no-untyped-call]
    return min(max(otsu, _FLOOR), _CEILING)


def _clean(mask: Mask, um: tuple[float, ...], spec: TissueSpec, *, holes: bool = True) -> Mask:
    area = float(np.prod(um))
    cleaned: Mask = remove_small_objects(mask, max_size=max(0, int(spec.min_speck_um**2 / area) - 1))
    if holes:
        cleaned = remove_small_holes(cleaned, max_size=int(spec.max_hole_um**2 / area))
    return cleaned


def _contrasting(
    image: NDArray[Any], factor: tuple[int, ...], um: tuple[float, ...]
) -> tuple[Mask, str, float, tuple[str, ...]]:
    coarse = _reduce(image, factor)
    distance = np.zeros(coarse.shape[1:], np.float32)
    noise = 0.0
    for channel in coarse:
        ndimage.gaussian_filter(channel, [max(0.7, _SMOOTH_UM / u) for u in um], output=channel)
        low, high = np.percentile(channel, [1, 99])
        border = np.concatenate([channel[0], channel[-1], channel[:, 0], channel[:, -1]])
        background = low if abs(np.median(border) - low) <= abs(np.median(border) - high) else high
        away = np.abs(channel - background)
        near = away[away <= np.median(away)]
        noise = max(noise, float(near.max(initial=0.0)))
        np.maximum(distance, away, out=distance)
    if float(np.ptp(distance)) == 0.0:
        return np.zeros(distance.shape, bool), "distance+otsu", float("nan"), ("the image is constant",)
    threshold = float(threshold_otsu(distance))  # type: ignore[no-untyped-call]
    return distance > threshold, "distance+otsu", threshold, ()


def _above_background(channel: Floats) -> tuple[Mask, str, float]:
    finite = np.isfinite(channel)
    if not finite.all():
        channel = np.where(finite, channel, np.float32(np.nanmin(channel) if finite.any() else 0))
    if float((channel < _HU_BODY).mean()) >= _HU_AIR_SHARE:
        return channel > _HU_BODY, "hounsfield", _HU_BODY
    faces = np.concatenate([np.take(channel, i, axis).ravel() for axis in range(3) for i in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    background = values[counts.argmax()] if counts.max() >= 0.05 * faces.size else np.percentile(faces, 1)
    distance = np.abs(channel - np.float32(background))
    top = float(np.percentile(distance, 98))
    if top <= 0:
        return np.zeros(channel.shape, bool), "distance+otsu", float("nan")
    otsu = float(threshold_otsu(np.sqrt(np.minimum(distance, top)))) ** 2
    threshold = min(otsu, _VOLUME_CEILING * top)
    return distance > threshold, "distance+otsu", threshold


def _solid(mask: Mask) -> Mask:
    """The largest pieces, filled."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    solid: Mask = (sizes >= _KEEP_SHARE * sizes.max())[labels]
    solid[labels == 0] = False
    ndimage.binary_fill_holes(solid, output=solid)
    for plane in solid:
        ndimage.binary_fill_holes(plane, output=plane)
    return solid


def _reduce(image: NDArray[Any], factor: tuple[int, ...]) -> Floats:
    """`(C, y, x)` averaged over blocks of `factor`; an incomplete last block repeats the edge."""
    if all(f == 1 for f in factor):
        return image.astype(np.float32)
    fy, fx = factor
    channels = []
    for channel in image:
        rest = [(0, -n % f) for n, f in zip(channel.shape, factor, strict=True)]
        padded = np.pad(channel, rest, mode="edge")
        blocks = padded.reshape(padded.shape[0] // fy, fy, padded.shape[1] // fx, fx)
        channels.append(blocks.mean(axis=(1, 3), dtype=np.float32))
    return np.stack(channels)


def _enlarge(mask: Mask, factor: tuple[int, ...], shape: tuple[int, ...]) -> Mask:
    for axis, f in enumerate(factor):
        mask = np.repeat(mask, f, axis)
    return mask[tuple(slice(n) for n in shape)]
