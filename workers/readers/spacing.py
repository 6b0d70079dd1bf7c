"""Physical pixel size: where it was found, whether it can be believed, what to do if not."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.errors import SourceError
from schemas.image import MPP_EXPLICIT_UM, MPP_PLAUSIBLE_UM, ReadOptions

Spacing = tuple[float, ...]


def slide_spacing(
    uri: str, options: ReadOptions, found: Sequence[tuple[str, tuple[float, float]]]
) -> tuple[tuple[float, float], str, tuple[str, ...]]:
    """Settle a slide's `(y, x)` pixel size in um.

    Parameters
    ----------
    found
        What the metadata say, best source first: (where, (y, x) in um).

    Returns
    -------
    spacing, source, notes

    Raises
    ------
    SourceError
        No pixel size is known, or it is implausible.
    """
    remedy = "give the pixel size: --mpp <um>, or a CSV with the columns image,mpp"
    if options.mpp_um is not None:
        low, high = MPP_EXPLICIT_UM
        if not low <= options.mpp_um <= high:
            msg = f"{uri}: mpp {options.mpp_um:g} um/px (given explicitly) is outside {low:g}-{high:g} um/px; check the unit"
            raise SourceError(msg)
        low, high = MPP_PLAUSIBLE_UM
        unusual = not low <= options.mpp_um <= high
        note = f"explicit mpp {options.mpp_um:g} um/px is unusual for a slide ({low:g}-{high:g} um/px)"
        return (options.mpp_um, options.mpp_um), "--mpp", (note,) if unusual else ()
    if not found:
        msg = f"{uri}: no pixel size in its metadata (neither OpenSlide nor TIFF nor OME tags have one); {remedy}"
        raise SourceError(msg)
    where, spacing = found[0]
    low, high = MPP_PLAUSIBLE_UM
    if not all(low <= s <= high for s in spacing):
        msg = (
            f"{uri}: mpp {spacing[1]:.6g} x {spacing[0]:.6g} um/px (x, y; from {where}) is implausible, "
            f"expected {low:g}-{high:g} um/px; {remedy}"
        )
        raise SourceError(msg)
    return spacing, where, ()


def volume_spacing(
    uri: str, options: ReadOptions, found: tuple[float, ...] | None, where: str
) -> tuple[tuple[float, float, float], str]:
    """Settle a volume's `(z, y, x)` voxel size in mm; `found` None where the source has none.

    Raises
    ------
    SourceError
        No voxel size is known, or one is not above 0.
    """
    spacing, source = (options.spacing_mm, "--spacing") if options.spacing_mm is not None else (found, where)
    remedy = "give it: --spacing <z> <y> <x> in mm, or a CSV with the columns image,spacing"
    if spacing is None:
        msg = f"{uri}: no voxel size in its metadata; {remedy}"
        raise SourceError(msg)
    if len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing):
        msg = f"{uri}: voxel size {tuple(spacing)} mm (z, y, x; from {source}) is not above 0 on every axis; {remedy}"
        raise SourceError(msg)
    return (float(spacing[0]), float(spacing[1]), float(spacing[2])), source


def resolution_um(x: float, y: float, unit: str) -> tuple[float, float] | None:
    """TIFF resolution tags (px per `inch` or `centimeter`) as `(y, x)` um; None where they say nothing."""
    um = {"inch": 25_400.0, "centimeter": 10_000.0}.get(unit.lower())
    if um is None or x <= 0 or y <= 0:
        return None
    return (um / y, um / x)
