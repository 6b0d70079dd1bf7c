"""Eigen-CAM and EigenGradCAM with one direction for the whole image.

`M` has a row a cell of every tile of the image. Its first right singular vector is found from its Gram matrix, which adds
up over tiles; every tile is then projected on that one direction, with that one sign. So maps of different tiles are
comparable, where tile by tile each has a direction of its own.

What is summed is the Gram matrix of `M` with a column of ones: its last row holds the channels' sums and the number of
cells, which the sign and the centred form need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from schemas.errors import SpecError
from workers.cam.eigen import (
    TIE,
    EigenOptions,
    arbitrary,
    gram,
    largest_entry,
    leading,
    positive_sum,
    project,
)
from workers.cam.method import GRADIENTS, Slide, Solved, row
from workers.cam.view import View

TILES_AT_ONCE = 8
"""Tiles whose cells are multiplied together: bounds what is held in float64."""


class SlideOptions(EigenOptions):
    """Options of the forms for a whole image."""

    def facts(self) -> dict[str, Any]:
        """Centred maps are signed."""
        edition = (
            "Gram matrix summed over all tiles in a pass of its own, channels centred over the image (pytorch-grad-cam: over a "
            "tile), turned to go along with the sum over channels"
        )
        return {"signed": True, "edition": edition} if self.centred else {}


def shapes(channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """K -> shapes of the sum `(K + 1, K + 1)` and of the state `(K + 1,)`."""
    return (channels + 1, channels + 1), (channels + 1,)


def gram_with_sums(m: Tensor, rows: Sequence[int]) -> Tensor:
    """Gram matrix of the cells of some tiles, with a column of ones.

    Parameters
    ----------
    m
        `(B, K, Z)`, finite in `rows`.
    rows
        Tiles, added in this order.

    Returns
    -------
    Tensor
        `(K + 1, K + 1)` float64: `M^T M`, then the channels' sums, and last the number of cells.
    """
    channels, cells = m.shape[1:]
    total = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=m.device)
    for first in range(0, len(rows), TILES_AT_ONCE):
        some = m[list(rows[first : first + TILES_AT_ONCE])].double()
        total += gram(torch.cat([some, some.new_ones(len(some), 1, cells)], dim=1))
    return total


def along_channel_sum(v: Tensor) -> Tensor:
    """Turn a direction `(K,)` so that its map goes along with the sum over channels, over all tiles together.

    `<M v, M 1> = lambda v.1`, so that the sum of `v` decides; if it vanishes, its largest entry does. For activations times
    gradients the sum over channels is HiResCAM: positive is where there is evidence for the target, even on an image that
    holds mostly evidence against it. A tile's own map is turned by its larger side; over all tiles that would take a pass
    more.
    """
    total = v.sum()
    turn = (largest_entry(v) if total.abs() <= TIE * v.abs().sum() else total) < 0
    return -v if turn else v


def solve(total: Tensor, *, centred: bool, by_sum: bool) -> Solved:
    """First direction of a summed Gram matrix.

    Parameters
    ----------
    total
        `(K + 1, K + 1)` float64, from `gram_with_sums`.
    centred
        Take each channel's mean over the image off first; then no sum is left to go by.
    by_sum
        Sign: the sum of all maps is made positive. Otherwise, and where centred, see `along_channel_sum`.

    Returns
    -------
    Solved
        `state` `(K + 1,)`: the direction, then what is added in each cell (where centred, minus the mean's projection).
        Doubtful as `workers.cam.eigen.arbitrary` says. Without energy the state is 0; without cells it is NaN.
    """
    products, sums, cells = total[:-1, :-1], total[-1, :-1], float(total[-1, -1])
    if cells == 0:
        return Solved(torch.full_like(total[-1], torch.nan), cells, 0.0, True)
    before = float(products.diagonal().sum())
    if centred:
        products = products - torch.outer(sums, sums) / cells
    v, values = leading(products)
    energy = values.clamp_min(0)
    # What rounding leaves of equal numbers that were taken off each other is no direction.
    if float(energy[-1]) <= TIE * before:
        return Solved(torch.zeros_like(total[-1]), cells, 0.0, False)
    magnitudes = torch.stack([sums, sums.abs()])
    v = positive_sum(v, magnitudes) if by_sum and not centred else along_channel_sum(v)
    offset = -(sums @ v) / cells if centred else torch.zeros_like(sums[0])
    explained = float(energy[-1] / energy.sum())
    return Solved(torch.cat([v, offset[None]]), cells, explained, bool(arbitrary(values)))


def on_direction(m: Tensor, state: Tensor) -> Tensor:
    """Maps `(B, Z)` of `(B, K, Z)` by a state of `solve`."""
    return (project(m, state[:-1]) + state[-1]).to(m.dtype)


def _needs_the_image(_view: View, _options: Any) -> NoReturn:
    """The method is asked of a batch without the state of its image."""
    msg = (
        "this method explains a tile by a direction found from the whole image, and no state of one is given: sum with "
        "workers.cam.reduce.collect, solve with workers.cam.reduce.solve, or use 'eigencam' or 'eigengradcam', which explain "
        "each tile by itself"
    )
    raise SpecError(msg)


METHODS = (
    row(
        "eigencam_slide", "Eigen-CAM, one direction an image", _needs_the_image, "1",
        "Muhammad & Yeasin, Eigen-CAM, IJCNN 2020", signed=False,
        edition="uncentred (paper), Gram matrix summed over all tiles in a pass of its own, sum made positive",
        needs=("activations", "slide_reduce"), class_specific=False, options=SlideOptions(),
        slide=Slide(
            shapes,
            collect=lambda view, rows, _: gram_with_sums(view.a, rows),
            solve=lambda total, options: solve(total, centred=options.centred, by_sum=True),
            project=lambda view, state, _: on_direction(view.a, state),
        ),
    ),
    row(
        "eigengradcam_slide", "EigenGradCAM, one direction an image", _needs_the_image, "1",
        "Gildenblat and contributors, pytorch-grad-cam, 2021",
        edition="of A g, uncentred, Gram matrix summed over all tiles in a pass of its own, turned to go along with HiResCAM",
        needs=(*GRADIENTS, "slide_reduce"), options=SlideOptions(),
        slide=Slide(
            shapes,
            collect=lambda view, rows, _: gram_with_sums(view.a * view.g, rows),
            solve=lambda total, options: solve(total, centred=options.centred, by_sum=False),
            project=lambda view, state, _: on_direction(view.a * view.g, state),
        ),
    ),
)  # fmt: skip
