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

from schemas.errors import SpecError
from schemas.grid import TissueSpec
from workers.tiling.ink import COLD, find_ink

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_BLACK = 4  # as black padding is after compression
_GLASS = 240.0  # assumed where a slide shows no glass
_FLOOR, _CEILING = 0.03, 0.055  # saturation in optical density: above glass and its noise, below pale tissue
_PALE = 0.02  # what adjoins tissue need only reach this
_RELATIVE = 0.2  # of the strongest channel: below it an absorber is grey (dust, shadow, bar, line)
_SMOOTH_UM = 8.0
_INK_UM = 32.0  # ink is looked for at this scale: nuclei and folds average out, a stroke does not
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
        mask = _fill(_drop(mask, coarse_um, spec.min_speck_um), coarse_um, spec.max_hole_um)
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
        found, method, threshold = _above_background(np.array(channel, np.float32, order="C"))
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
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        if float(image.max()) <= 1.0:
            image *= np.float32(255)
    notes: list[str] = []
    glass = _glass(image)
    if glass is None:
        glass = np.full(3, _GLASS, np.float32)
        notes.append(f"no glass in view: {_GLASS:g} assumed")
    coarse = _reduce(image, factor)
    ignored = _padding(coarse)
    ink_factor = tuple(max(1, int(_INK_UM / u + 1e-6)) for u in um)
    ink_um = tuple(u * f for u, f in zip(um, ink_factor, strict=True))
    coarser = _reduce(coarse, ink_factor)
    density = _density(coarser, glass)
    density[:, _padding(coarser)] = 0  # black padding is no ink to follow into dark tissue
    inks = find_ink(density, ink_um)
    notes.extend(f"{name} ink removed" for name, found in inks.items() if found.any())

    density = _density(coarse, glass)
    _smooth(density, um)
    ignored |= _enlarge(np.logical_or.reduce(list(inks.values())), ink_factor, coarse.shape[1:])
    ignored |= density[0] - density[1] > COLD
    strongest = np.maximum(np.maximum(density[0], density[1]), density[2])
    saturation = np.minimum(np.minimum(density[0], density[1]), density[2])
    del density
    np.subtract(strongest, saturation, out=saturation)
    threshold = _between(saturation[~ignored])
    coloured = (saturation > _PALE) & (saturation > np.float32(_RELATIVE) * strongest) & ~ignored
    mask = ndimage.binary_propagation(coloured & (saturation > threshold), mask=coloured)
    mask = _fill(_drop(mask, um, spec.min_speck_um), um, spec.max_hole_um)
    if (mask & ignored).any():  # what filling took back; the slivers it leaves are specks
        mask = _drop(mask & ~ignored, um, spec.min_speck_um)
    return mask, "saturation+otsu", threshold, tuple(notes)


def _padding(rgb: NDArray[Any]) -> Mask:
    padding: Mask = (rgb.min(0) == 255) | (rgb.max(0) <= _BLACK)
    return padding


def _glass(image: NDArray[Any]) -> Floats | None:
    """RGB of the empty slide: the commonest bright, nearly neutral colour that is not padding."""
    step = max(1, int(np.ceil((image[0].size / 1e6) ** 0.5)))  # a million pixels are enough to tell
    pixels = image[:, ::step, ::step].reshape(3, -1).astype(np.float32)
    low, high = pixels.min(0), pixels.max(0)
    bright = pixels[:, (low >= 180) & (high - low <= 40) & (low < 255)]
    if bright.shape[1] < max(1, 0.005 * pixels.shape[1]):
        return None
    level = bright.sum(0)
    counts, edges = np.histogram(level, bins=np.arange(540, 771, 6))
    peak = int(counts.argmax())
    at_peak = (level >= edges[peak]) & (level <= edges[peak + 1])
    return np.median(bright[:, at_peak], axis=1).astype(np.float32)


def _density(rgb: NDArray[Any], glass: Floats) -> Floats:
    """Optical density against the glass, not below 0."""
    density = np.empty(rgb.shape, np.float32)
    for out, channel, white in zip(density, rgb, glass, strict=True):
        np.add(channel, np.float32(1), out=out)
        np.log(out, out=out)
        np.subtract(np.log(white + 1), out, out=out)
        np.maximum(out, 0, out=out)
    density *= np.float32(1 / np.log(10))  # numpy's log is several times faster than its log10
    return density


def _smooth(channels: Floats, um: tuple[float, ...]) -> list[float]:
    """Gaussian, in place; returns its width in pixels."""
    sigma = [max(0.7, _SMOOTH_UM / u) for u in um]
    for channel in channels:
        ndimage.gaussian_filter(channel, sigma, output=channel, truncate=2.5)
    return sigma


def _between(saturation: Floats) -> float:
    """Otsu's threshold, kept between what glass can reach and what pale tissue has."""
    if saturation.size == 0:
        return _CEILING
    clipped = np.minimum(saturation, np.float32(0.3))
    if float(clipped.max()) - float(clipped.min()) < 1e-6:
        return _CEILING
    otsu = float(threshold_otsu(clipped))  # type: ignore[no-untyped-call]
    return min(max(otsu, _FLOOR), _CEILING)


def _drop(mask: Mask, um: tuple[float, ...], width_um: float) -> Mask:
    """Without the pieces of less than `width_um` squared."""
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=count + 1) * float(np.prod(um)) >= width_um**2
    keep[0] = False
    kept: Mask = keep[labels]
    return kept


def _fill(mask: Mask, um: tuple[float, ...], width_um: float) -> Mask:
    """With the holes of less than `width_um` squared, also those cut by the border."""
    return ~_drop(~mask, um, width_um)


def _contrasting(
    image: NDArray[Any], factor: tuple[int, ...], um: tuple[float, ...]
) -> tuple[Mask, str, float, tuple[str, ...]]:
    coarse = _reduce(image, factor).astype(np.float32)
    # Of a difference of two normals; the image's edge is mirrored, so that one column will do.
    noises = [
        float(np.median(np.abs(np.diff(np.pad(c, 1, mode="symmetric"), axis=1)))) / 0.954 for c in coarse
    ]
    sigma = _smooth(coarse, um)
    # What smoothing leaves of the noise; the 1 % end lies 2.3 of those below the background, 6 more are rare.
    floor = 8.3 * max(noises) / (2 * (np.pi * sigma[0] * sigma[1]) ** 0.5)
    distance = np.zeros(coarse.shape[1:], np.float32)
    for channel in coarse:
        low, high = np.percentile(channel, [1, 99])
        border = np.median(np.concatenate([channel[0], channel[-1], channel[:, 0], channel[:, -1]]))
        background = low if abs(border - low) <= abs(border - high) else high
        np.maximum(distance, np.abs(channel - background), out=distance)
    if float(np.ptp(distance)) == 0.0:
        return np.zeros(distance.shape, bool), "distance+otsu", float("nan"), ("the image is constant",)
    threshold = max(float(threshold_otsu(distance)), floor)  # type: ignore[no-untyped-call]
    return distance > threshold, "distance+otsu", threshold, ()


def _above_background(channel: Floats) -> tuple[Mask, str, float]:
    """Foreground of one volume; `channel` is used up."""
    finite = np.isfinite(channel)
    if not finite.all():
        channel[~finite] = channel[finite].min() if finite.any() else 0
    sample = channel.ravel()[:: max(1, channel.size // 4_000_000)]
    if float((sample < _HU_BODY).mean()) >= _HU_AIR_SHARE:
        return channel > _HU_BODY, "hounsfield", _HU_BODY
    faces = np.concatenate([np.take(channel, end, axis).ravel() for axis in range(3) for end in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    background = values[counts.argmax()] if counts.max() >= 0.05 * faces.size else np.percentile(faces, 1)
    channel -= np.float32(background)
    np.abs(channel, out=channel)
    top = float(np.percentile(sample, 98))  # a view: by now distances
    if top <= 0:
        return np.zeros(channel.shape, bool), "distance+otsu", float("nan")
    otsu = float(threshold_otsu(np.sqrt(np.minimum(sample, top)))) ** 2  # type: ignore[no-untyped-call]
    threshold = min(otsu, _VOLUME_CEILING * top)
    return channel > threshold, "distance+otsu", threshold


def _solid(mask: Mask) -> Mask:
    """The largest pieces, filled in 3-D and slice by slice."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    solid = _enclosed((sizes >= max(1.0, _KEEP_SHARE * sizes.max()))[labels])
    for plane in solid:
        plane[:] = _enclosed(plane)
    return solid


def _enclosed(mask: Mask) -> Mask:
    """The mask and its holes: all that no path outside it joins to the array's border."""
    labels, count = ndimage.label(~mask)
    faces = [np.take(labels, end, axis).ravel() for axis in range(labels.ndim) for end in (0, -1)]
    inside = np.ones(count + 1, bool)
    inside[np.concatenate(faces)] = False
    inside[0] = True
    filled: Mask = inside[labels]
    return filled


def _reduce(image: NDArray[Any], factor: tuple[int, ...]) -> NDArray[Any]:
    """`(C, y, x)` averaged over blocks of `factor`; an incomplete last block repeats the edge."""
    if all(f == 1 for f in factor):
        return image
    fy, fx = factor
    rest = [(0, -n % f) for n, f in zip(image.shape[1:], factor, strict=True)]
    channels = []
    for channel in image:
        padded = np.pad(channel, rest, mode="edge") if any(n for _, n in rest) else channel
        blocks = padded.reshape(padded.shape[0] // fy, fy, padded.shape[1] // fx, fx)
        channels.append(blocks.mean(axis=(1, 3), dtype=np.float32))
    return np.stack(channels)


def _enlarge(mask: Mask, factor: tuple[int, ...], shape: tuple[int, ...]) -> Mask:
    for axis, f in enumerate(factor):
        mask = np.repeat(mask, f, axis)
    whole: Mask = mask[tuple(slice(n) for n in shape)]
    return whole
