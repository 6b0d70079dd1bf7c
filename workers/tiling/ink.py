"""Pen marks on slides, told from stains by how they absorb."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

COLD = 0.05  # red over green density, beyond any haematoxylin
_REACH_UM = 800.0  # how far from a stroke its tint is followed
_RIM_UM = 32.0
_STROKE_UM = 150.0  # narrower than any pen


def find_ink(density: NDArray[np.float32], um: tuple[float, ...]) -> dict[str, Mask]:
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
    cold = red - green > COLD
    reddish = (blue > 0.5 * green) & (saturation > 0.1)
    dark = (least > 0.55) & (red <= green) & (saturation < 0.45 * strongest)
    inks = {
        "green or blue": (cold, cold, red - 0.75 * green > 0.03),
        "red": (
            _broad(
                reddish & (saturation > 0.3) & (red_share < 0.03 + 0.05 * np.minimum(saturation, 0.8)), um
            ),
            reddish & ((red_share < 0.065) | ((red_share < 0.25) & (saturation > 0.65))),
            reddish & (red_share < 0.1 + 0.25 * saturation**2) & (saturation > 0.22),
        ),
        "black": (_broad(dark, um), dark, (least > 0.22) & (saturation < 0.45 * strongest)),
    }
    rim = max(_RIM_UM, 1.5 * max(um))
    found: dict[str, Mask] = {}
    for name, (seed, along, tinted) in inks.items():
        stroke = seed
        if seed.any():
            stroke = ndimage.binary_propagation(seed, mask=seed | along)
            near = ndimage.distance_transform_edt(~stroke, sampling=um) <= _REACH_UM
            stroke = ndimage.binary_propagation(stroke, mask=stroke | (tinted & near))
            stroke = ndimage.distance_transform_edt(~stroke, sampling=um) <= rim
        found[name] = stroke
    return found


def _broad(mask: Mask, um: tuple[float, ...]) -> Mask:
    """What holds a square as wide as a pen stroke: no vessel, fold or nucleus."""
    sides = [int(_STROKE_UM / u) | 1 for u in um]  # odd: an even square would shift
    # Minimum, then maximum: an opening by a square, axis by axis, which costs far less than a binary one.
    eroded = ndimage.minimum_filter(mask.view(np.uint8), sides, mode="constant", cval=1)
    broad: Mask = ndimage.maximum_filter(eroded, sides, mode="constant", cval=0).view(bool)
    return broad
