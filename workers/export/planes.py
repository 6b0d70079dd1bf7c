"""Planes of a volume: the three through one voxel, at physical aspect, in radiological orientation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.geometry import Box
from schemas.image import ImageMeta
from workers.readers.overview import choose_level
from workers.readers.reader import Reader

T = TypeVar("T", bound=np.generic)

PLANE_PX = 560
"""Picture pixels along the longest physical side of the volume."""


@dataclass(frozen=True)
class View:
    """A plane and how it is shown: seen from the feet, the front, the patient's left."""

    name: str
    normal: int
    """Axis of (z, y, x) that stands on the plane."""
    rows: int
    columns: int
    edges: tuple[str, str, str, str]
    """Letters at left, right, top, bottom."""


VIEWS = (
    View("Axial", 0, 1, 2, ("R", "L", "A", "P")),
    View("Coronal", 1, 0, 2, ("R", "L", "S", "I")),
    View("Sagittal", 2, 0, 1, ("A", "P", "S", "I")),
)
"""Of the internal array: x to the right, y to the front, z up."""


def oriented(plane: NDArray[T]) -> NDArray[T]:
    """A plane `(rows, columns, ...)` of the array as it is shown: front, head and the patient's right come first."""
    return plane[::-1, ::-1]


def plane_shape(meta: ImageMeta, view: View) -> tuple[int, int]:
    """Picture pixels of a plane: as many a millimetre on every axis."""
    extent = physical_size(meta)
    per_mm = PLANE_PX / max(extent)
    return max(1, round(extent[view.rows] * per_mm)), max(1, round(extent[view.columns] * per_mm))


def physical_size(meta: ImageMeta) -> tuple[float, ...]:
    """Size of the volume in mm, (z, y, x)."""
    spacing = meta.spacing or (1.0,) * meta.ndim
    return tuple(n * s for n, s in zip(meta.shape_l0, spacing, strict=True))


def read_plane(reader: Reader, view: View, voxel: Sequence[int]) -> NDArray[np.float32]:
    """Source values `(rows, columns)` of the plane through a level-0 voxel, in array order."""
    meta = reader.meta
    start, stop, shape = [0] * 3, list(meta.shape_l0), [1] * 3
    start[view.normal], stop[view.normal] = voxel[view.normal], voxel[view.normal] + 1
    shape[view.rows], shape[view.columns] = plane_shape(meta, view)
    downsample = tuple((b - a) / n for a, b, n in zip(start, stop, shape, strict=True))
    # The plane's own axis is one voxel thick: it must not keep a coarser level from serving the others.
    coarse = tuple(float("inf") if a == view.normal else d for a, d in enumerate(downsample))
    box = Box(frame="l0", start=tuple(start), stop=tuple(stop))
    pixels, _ = reader.read(box, tuple(shape), choose_level(meta, coarse))
    return np.asarray(pixels[0], np.float32).reshape(shape[view.rows], shape[view.columns])


def position_words(meta: ImageMeta, voxel: Sequence[float]) -> str:
    """Where a level-0 voxel position (z, y, x; pixel `i` spans `[i, i + 1)`) lies in the patient, in mm."""
    if meta.affine is None:
        shown = ", ".join(f"{axis} {v:.0f}" for axis, v in zip("xyz", reversed(voxel), strict=True))
        return f"voxel {shown} (orientation unknown)"
    # The affine takes voxel centres at whole numbers.
    xyz1 = np.array([*(v - 0.5 for v in reversed(voxel)), 1.0])
    world = np.asarray(meta.affine)[:3] @ xyz1
    letters = ("RL", "AP", "SI")
    return (
        ", ".join(
            f"{pair[int(v < 0)]}\N{NO-BREAK SPACE}{abs(v):.1f}"
            for pair, v in zip(letters, world, strict=True)
        )
        + "\N{NO-BREAK SPACE}mm"
    )


def grey(
    planes: Sequence[NDArray[np.float32]], evaluated: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.uint8]]:
    """Planes `(H, W)` as `(H, W, 3)` grey, all in one window: 1 to 99.5 % of what was evaluated (else of everything)."""
    body = np.concatenate([p[e & np.isfinite(p)] for p, e in zip(planes, evaluated, strict=True)])
    if not body.size:
        body = np.concatenate([p[np.isfinite(p)] for p in planes])
    low, high = np.percentile(body, [1, 99.5]) if body.size else (0.0, 1.0)
    span = high - low if high > low else 1.0
    shown = [np.rint(255 * np.clip((np.nan_to_num(p, nan=low) - low) / span, 0, 1)) for p in planes]
    return [np.repeat(s.astype(np.uint8)[..., None], 3, axis=2) for s in shown]
