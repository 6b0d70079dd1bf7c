"""Features of tiles that another program made: `.h5` as CLAM and TRIDENT write them, and plain `.npy`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError

SUFFIXES = (".h5", ".hdf5", ".npy")


@dataclass(frozen=True)
class ImportedFeatures:
    """A bag from a file."""

    features: NDArray[np.floating[Any]]
    """`(N, D)`, in the file's order and precision."""
    corner_l0: NDArray[np.int64] | None
    """`(N, 2)` level-0 px, y before x, of each tile's upper left corner; None where the file does not say."""
    attributes: dict[str, Any]
    """What the file says of the tiles: `patch_size`, `patch_level`, `patch_size_level0`, ..."""


def read_features(path: str | Path) -> ImportedFeatures:
    """Read all of a feature file.

    Parameters
    ----------
    path
        `.h5`: dataset `features`, `(N, D)` or `(1, N, D)`, and, where there is one, `coords` `(N, 2)` as (x, y) in level-0 px
        with its attributes. `.npy`: `(N, D)`.

    Raises
    ------
    SourceError
        Missing, unreadable, without `features`, or of other shapes. Values are not looked at.
    """
    path = Path(path)
    attributes: dict[str, Any] = {}
    try:
        if path.suffix.lower() == ".npy":
            features, coords = np.load(path, allow_pickle=False), None
        else:
            features, coords, attributes = _hdf5(path)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{path}: no readable feature file ({error}); expected .h5 with a dataset features, or .npy"
        raise SourceError(msg) from error
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or features.dtype.kind != "f":
        msg = f"{path}: features are {features.dtype} of shape {features.shape}; expected floats, (tiles, numbers a tile)"
        raise SourceError(msg)
    if coords is None:
        return ImportedFeatures(features, None, attributes)
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    if coords.shape != (len(features), 2):
        msg = f"{path}: {len(features)} features, coords of shape {coords.shape}; expected one (x, y) a tile"
        raise SourceError(msg)
    return ImportedFeatures(features, coords[:, ::-1].astype(np.int64), attributes)


def _hdf5(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None, dict[str, Any]]:
    with h5py.File(path, "r") as file:
        if "features" not in file:
            msg = f"it has {', '.join(file) or 'nothing'}"
            raise KeyError(msg)
        coords = file.get("coords")
        attributes = dict(file["features"].attrs) | ({} if coords is None else dict(coords.attrs))
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in attributes.items()}
        return file["features"][()], None if coords is None else coords[()], plain
