"""AUROC of a raw map against planted truth, on the heatmap's own pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.metrics.localisation import auroc

DISTRACTOR, LESION, MIXED = 1, 2, 3
RIM_MINUS, RIM_CORE, RIM_SHELL = 1, 2, 3


def at_pixel_centres(
    array: NDArray[Any], array_downsample: tuple[float, ...], shape: tuple[int, ...], downsample: int
) -> NDArray[Any]:
    """Value of `array` `(*S)` under the centre of each heatmap pixel: `(*shape)`.

    Parameters
    ----------
    array_downsample
        Level-0 px of a pixel of `array`, by axis.
    shape, downsample
        The heatmap's grid, anchored at level-0 pixel 0.
    """
    index = []
    for n, own, size in zip(shape, array_downsample, array.shape, strict=True):
        centre_l0 = (np.arange(n) + 0.5) * downsample
        index.append(np.clip((centre_l0 / own).astype(np.int64), 0, size - 1))
    found: NDArray[Any] = array[np.ix_(*index)]
    return found


def lesion_scores(values: NDArray[Any], truth: NDArray[Any], tissue: NDArray[np.bool_]) -> dict[str, float]:
    """AUROC of lesion pixels on the demo slide; all arrays `(y, x)`, NaN where nobody looked."""
    seen = np.isfinite(values)
    in_tissue = seen & (tissue | (truth > 0))
    planted = seen & (truth > 0)
    return {
        "lesion against all other tissue": auroc(values[in_tissue], truth[in_tissue] == LESION),
        "lesion against lesion + distractor": auroc(values[planted], truth[planted] == LESION),
    }


FOR, AGAINST, NOT_MIXED = "lesion", "look-alike, sign turned", "lesion against mixed foci"
"""Questions to a map of the class `lesion` where look-alikes are evidence against it and mixed foci are none."""


def evidence_scores(values: NDArray[Any], truth: NDArray[Any], tissue: NDArray[np.bool_]) -> dict[str, float]:
    """AUROC of what speaks for a class, and of what speaks against it; arrays of one shape, NaN where nobody looked.

    `FOR`: lesions are higher than all other tissue, look-alikes included. `AGAINST`: look-alikes are lower than all other tissue,
    lesions included; a map that cannot say "against" is below one half here. `NOT_MIXED`: lesions are higher than mixed foci, which
    stand out as much and say nothing.
    """
    seen = np.isfinite(values) & (tissue | (truth > 0))
    two = seen & np.isin(truth, (LESION, MIXED))
    return {
        FOR: auroc(values[seen], truth[seen] == LESION),
        AGAINST: auroc(-values[seen], truth[seen] == DISTRACTOR),
        NOT_MIXED: auroc(values[two], truth[two] == LESION),
    }


def rim_scores(values: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """AUROC of rim+ lesions on the rim phantom; arrays `(z, y, x)`, NaN where nobody looked."""
    seen = np.isfinite(values)
    lesions = seen & (truth > 0)
    rim_plus = np.isin(truth, (RIM_CORE, RIM_SHELL))
    return {
        "rim shell against everything": auroc(values[seen], truth[seen] == RIM_SHELL),
        "rim+ against rim- lesion voxels": auroc(values[lesions], rim_plus[lesions]),
    }
