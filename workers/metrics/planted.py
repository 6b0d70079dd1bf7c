"""AUROC of a raw map against planted truth, on the heatmap's own pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.metrics.localisation import auroc

DISTRACTOR, LESION = 1, 2
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


def rim_scores(values: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """AUROC of rim+ lesions on the rim phantom; arrays `(z, y, x)`, NaN where nobody looked."""
    seen = np.isfinite(values)
    lesions = seen & (truth > 0)
    rim_plus = np.isin(truth, (RIM_CORE, RIM_SHELL))
    return {
        "rim shell against everything": auroc(values[seen], truth[seen] == RIM_SHELL),
        "rim+ against rim- lesion voxels": auroc(values[lesions], rim_plus[lesions]),
    }
