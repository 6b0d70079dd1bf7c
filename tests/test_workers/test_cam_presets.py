"""Pictures of other libraries from raw maps, by their formulas; against the libraries: tests/parity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from schemas.errors import SpecError
from workers.cam.presets import Preset, picture

GRIDS = {1: (5,), 2: (3, 5), 3: (2, 4, 3)}
SIZES = {1: (23,), 2: (12, 17), 3: (7, 9, 8)}

Array = NDArray[np.float64]


def raw_maps(ndim: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(3, *GRIDS[ndim], generator=torch.Generator().manual_seed(seed)) * scale


def slow_linear(x: Array, size: tuple[int, ...]) -> Array:
    """Linear interpolation between cell centres, held constant outside them, a value at a time."""
    out = np.zeros(size)
    for u in np.ndindex(*size):
        corners = []
        for i, n, m in zip(u, size, x.shape, strict=True):
            at = min(max((i + 0.5) * m / n - 0.5, 0), m - 1)
            low = min(int(at), m - 1)
            corners.append([(low, 1 - (at - low)), (min(low + 1, m - 1), at - low)])
        for corner in itertools.product(*corners):
            out[u] += x[tuple(c for c, _ in corner)] * np.prod([w for _, w in corner])
    return out


def slow_pgc(layers: list[Array], size: tuple[int, ...]) -> Array:
    def scaled(x: Array) -> Array:
        x = x - x.min()
        result: Array = x / (1e-7 + x.max())
        return result

    return scaled(
        np.mean([np.maximum(slow_linear(scaled(np.maximum(m, 0)), size), 0) for m in layers], axis=0)
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_pgc(ndim: int, scale: float, layers: int) -> None:
    raw = [raw_maps(ndim, seed, scale) for seed in range(layers)]
    found = picture(raw, SIZES[ndim], "pgc").double().numpy()
    for b in range(3):
        expected = slow_pgc([m[b].double().numpy() for m in raw], SIZES[ndim])
        np.testing.assert_allclose(found[b], expected, atol=1e-5)
    if scale < 1 and layers == 1:
        assert found.max() < 1, "the 1e-7 is absolute"


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_monai_and_torchcam(ndim: int) -> None:
    raw = raw_maps(ndim)
    drawn, scaled = picture(raw, SIZES[ndim], "monai"), picture(raw, SIZES[ndim], "torchcam")
    unrectified = picture(raw, SIZES[ndim], "monai", relu=False)
    for b in range(3):
        positive = np.maximum(raw[b].double().numpy(), 0)
        large = slow_linear(positive, SIZES[ndim])
        np.testing.assert_allclose(
            drawn[b].numpy(), 1 - (large - large.min()) / (large.max() - large.min()), atol=1e-5
        )
        shifted = positive - positive.min()
        np.testing.assert_allclose(scaled[b].numpy(), shifted / (shifted.max() + 1e-8), atol=1e-6)
        signed = slow_linear(raw[b].double().numpy(), SIZES[ndim])
        np.testing.assert_allclose(
            unrectified[b].numpy(), 1 - (signed - signed.min()) / (signed.max() - signed.min()), atol=1e-5
        )


def test_raw_is_what_is_stored() -> None:
    raw = raw_maps(2)
    assert picture(raw, (12, 17)) is raw


@pytest.mark.parametrize("preset", ["pgc", "monai", "torchcam"])
def test_maps_that_show_nothing(preset: Preset) -> None:
    negative = picture(-raw_maps(2).abs(), (12, 17), preset)
    assert (negative == 0).all(), "all-negative: zero, no NaN"
    constant = picture(torch.full((1, 3, 5), 2.0), (12, 17), preset)
    assert (constant == (2 if preset == "monai" else 0)).all()
    bad = raw_maps(2)
    bad[1, 0, 0] = torch.nan
    found = picture(bad, (12, 17), preset)
    assert found[1].isnan().any()
    assert found[[0, 2]].isfinite().all()
    assert found.dtype == picture(raw_maps(2).double(), (12, 17), preset).dtype == torch.float32


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(SpecError, match="expected raw, pgc, monai, torchcam"):
        picture(raw_maps(2), (12, 17), "gradcam")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="only 'pgc' joins layers"):
        picture([raw_maps(2), raw_maps(2)], (12, 17), "monai")
    with pytest.raises(SpecError, match=r"maps of shape \(3, 3, 5\) and input of \(12,\)"):
        picture(raw_maps(2), (12,), "pgc")
