"""FEM: where channels stand out from their own mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.cam.method import Options, row
from workers.cam.view import View


def fem(a: Tensor, k: float = 2.0, library: bool = False) -> Tensor:
    """Feature Explanation Method (Fuad et al., IPTA 2020): where channels stand out from their own mean.

    A cell stands out in a channel from `mean + k std` upward (std over all cells, divided by their number). The map is the
    sum of the channels' means over the cells where they stand out. A channel equal in all cells stands out nowhere.
    No value lies `sqrt(Z - 1)` deviations above the mean of `Z`: on `k^2 + 1` cells or fewer the map is empty.

    Parameters
    ----------
    a
        `(B, K, Z)`.
    k
        Deviations.
    library
        pytorch-grad-cam's form: channels themselves, weighted by the share of cells strictly above the threshold.

    Returns
    -------
    Tensor
        `(B, Z)`.
    """
    m = a.double()
    mean = m.mean(-1, keepdim=True)
    threshold = mean + k * m.std(-1, correction=0, keepdim=True)
    varies = m.amax(-1, keepdim=True) > m.amin(-1, keepdim=True)
    if library:
        share = ((m > threshold) & varies).double().mean(-1)
        raw = torch.einsum("bk,bkz->bz", share, m)
    else:
        raw = torch.where((m >= threshold) & varies, mean, 0.0).sum(1)
    unsound = ~m.isfinite().flatten(1).all(1)
    return torch.where(unsound[:, None], torch.nan, raw).to(a.dtype)


class FemOptions(Options):
    """Options of FEM."""

    k: float = Field(2.0, ge=0, allow_inf_nan=False)
    """Standard deviations above the mean."""
    form: Literal["paper", "pgc"] = "paper"
    """`pgc`: pytorch-grad-cam's."""

    def facts(self) -> dict[str, Any]:
        library = "channels weighted by the share of their cells that stand out (pytorch-grad-cam)"
        return {"edition": library} if self.form == "pgc" else {}


def _fem(view: View, options: Any) -> tuple[Tensor, None]:
    return fem(view.a, options.k, options.form == "pgc"), None


METHODS = (
    row(
        "fem", "FEM", _fem, "1",
        "Fuad et al., Features Understanding in 3D CNNs for Actions Recognition in Video, IPTA 2020", signed=False,
        edition="binary maps weighted by channel means (paper)", needs=("activations",), class_specific=False,
        options=FemOptions(),
    ),
)  # fmt: skip
