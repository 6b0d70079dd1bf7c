"""Pictures as other libraries draw them, from our raw maps: to go on with earlier figures, never to be stored.

Each preset is scaled by the tile alone: two tiles of one slide, or two classes, cannot be compared. What is stored is
`raw`. Of the tiles of a run, in unit 0, for its first target::

    tiles = TilesStore.open("out/a-01234567/tiles.zarr")
    raw = torch.from_numpy(tiles.maps_of("gradcam", 0, tiles.unit_rows(0)))
    picture(raw, tiles.info.spec.grid.tile_px, "pgc")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.errors import SpecError

Preset = Literal["raw", "pgc", "monai", "torchcam"]

_LINEAR = ("linear", "bilinear", "trilinear")


def picture(
    raw: Tensor | Sequence[Tensor], size: Sequence[int], preset: Preset = "raw", *, relu: bool = True
) -> Tensor:
    """Post-process raw maps as a library does by default.

    Parameters
    ----------
    raw
        `(B, *grid)`, 1 to 3 axes, signed, before any ReLU. Of `pgc` also several, a layer each: their pictures are
        averaged.
    size
        `(*S)` of the network's input.
    preset
        `raw`
            As it is, `(B, *grid)`.
        `pgc`
            pytorch-grad-cam 1.5: ReLU, `(x - min) / (1e-7 + max)`, linear upsampling, mean over layers, the same scaling again.
            The 1e-7 is absolute: a map whose largest value is about that never reaches 1 (large volumes). In 3-D the library
            itself upsamples by a cubic spline, which is not repeated here.
        `monai`
            MONAI's `GradCAM`: ReLU, linear upsampling, `1 - (x - min) / (max - min)`: *small is strong*. A constant map is
            returned as the library does: unscaled.
        `torchcam`
            torch-cam 0.4 and 0.5: ReLU, `(x - min) / (max + 1e-8)`, max taken of the shifted map; `(B, *grid)`, since the
            library leaves upsampling to its overlay.
    relu
        False for `monai` and `torchcam` pictures of method `cam`, which those libraries do not rectify.

    Returns
    -------
    Tensor
        `(B, *S)`, or `(B, *grid)` for `raw` and `torchcam`; float32, on the maps' device.

    Raises
    ------
    SpecError
        No such preset; several maps for another one than `pgc`; sizes that do not fit.

    Notes
    -----
    NaN stays NaN.
    """
    layers = [raw] if isinstance(raw, Tensor) else list(raw)
    if preset not in get_args(Preset):
        msg = f"there is no preset {preset!r}; expected {', '.join(get_args(Preset))}"
        raise SpecError(msg)
    if not layers or (len(layers) > 1 and preset != "pgc"):
        msg = f"preset {preset!r} takes one map a tile, found {len(layers)} layers; only 'pgc' joins layers"
        raise SpecError(msg)
    for layer in layers:
        if layer.ndim != 1 + len(size) or not 1 <= len(size) <= 3:
            msg = f"maps of shape {tuple(layer.shape)} and input of {tuple(size)}: expected (tiles, *grid) and as many axes"
            raise SpecError(msg)
    if preset == "raw":
        return layers[0]
    maps = [layer.float().relu() if relu or preset == "pgc" else layer.float() for layer in layers]
    if preset == "pgc":
        upsampled = [_upsample(_scaled(m, 1e-7), size).relu() for m in maps]
        return _scaled(torch.stack(upsampled).mean(0), 1e-7)
    if preset == "torchcam":
        return _scaled(maps[0], 1e-8)
    large = _upsample(maps[0], size)
    low, high = _extremes(large)
    # MONAI maps (min, max) to (1, 0), and multiplies a constant image by 1
    return torch.where(high == low, large, 1 - (large - low) / torch.where(high == low, 1, high - low))


def _scaled(maps: Tensor, epsilon: float) -> Tensor:
    shifted = maps - _extremes(maps)[0]
    return shifted / (_extremes(shifted)[1] + epsilon)


def _extremes(maps: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(1, maps.ndim))
    return maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)


def _upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    mode = _LINEAR[len(size) - 1]
    return F.interpolate(maps[:, None], tuple(size), mode=mode, align_corners=False)[:, 0]
