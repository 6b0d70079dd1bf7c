"""Features of tiles in files: `.h5` as CLAM and TRIDENT write them, and plain `.npy`; and such a file in the place of its slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceError
from schemas.geometry import Box
from schemas.image import ImageMeta, LevelMeta, ReadOptions, stem_of
from workers.readers.identity import file_identity

SUFFIXES = (".h5", ".hdf5", ".npy")
STORE = "tiles.zarr"
"""In the output folder of an embedded image: its features are in it."""
ENCODER = "encoder_sha256"
"""Attribute of a file of ours: digest of the encoder's weights."""
TILE = "tile_level0"
"""Attribute of a file of ours: `(height, width)` of a tile in level-0 px."""


@dataclass(frozen=True)
class ImportedFeatures:
    """A bag from a file."""

    features: NDArray[np.floating[Any]]
    """`(N, D)`, in the file's order and precision."""
    corner_l0: NDArray[np.int64] | None
    """`(N, 2)` level-0 px, y before x, of each tile's upper left corner; None where the file does not say."""
    attributes: dict[str, Any]
    """What the file says of the tiles: `patch_size`, `patch_level`, `patch_size_level0`, ..."""


def feature_places(folder: Path, stem: str) -> list[Path]:
    """Files and stores in `folder` that hold the features of the image of that stem; more than one is for the caller to refuse."""
    files = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
    # Eight hex digits and no more: `slide-*` would be `slide-2` too.
    return files + sorted(folder.glob(f"{stem}-{'[0-9a-f]' * 8}/{STORE}"))


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


def level0_size(attributes: dict[str, Any]) -> tuple[float, float] | None:
    """Height and width of a tile in level-0 px, where a file says it without the help of its slide."""
    if (size := attributes.get(TILE)) is not None:
        height, width = (float(n) for n in size)
        return height, width
    if (side := attributes.get("patch_size_level0")) is not None:
        return float(side), float(side)
    if "patch_size" in attributes and int(attributes.get("patch_level", -1)) == 0:
        return float(attributes["patch_size"]), float(attributes["patch_size"])
    return None


class FeaturesReader:
    """Features alone, in the place of their slide: its frame and scale as far as the file says them, and no pixels.

    Raises
    ------
    SourceError
        No positions, or nothing from which the slide's extent follows: neither is invented.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        found = read_features(path)
        if found.corner_l0 is None:
            msg = (
                f"{path}: does not say where its tiles are (no dataset coords); positions are never invented: give the file that "
                "has them, or the slide as IMAGE"
            )
            raise SourceError(msg)
        said = found.attributes
        shape = (int(said.get("level0_height", 0)), int(said.get("level0_width", 0)))
        notes = ["features alone, without their slide: encoder unverified, and only bag methods can be had"]
        if not all(shape):
            size = level0_size(said)
            if size is None or not len(found.corner_l0):
                msg = (
                    f"{path}: says neither how large its tiles are (patch_size_level0 of coords) nor how large the slide is; what "
                    "area it stands for is never invented: give the slide as IMAGE and this file by --features"
                )
                raise SourceError(msg)
            y, x = (found.corner_l0.max(axis=0) + np.rint(size).astype(np.int64)).tolist()
            shape = (y, x)
            notes.append("the slide's extent is not known: the heatmap ends where the last tile does")
        spacing, source = (options.mpp_um, options.mpp_um), "--mpp"
        if options.mpp_um is None and "mpp" in said:
            spacing, source = (float(said["mpp"]),) * 2, "attribute mpp of coords"
        self.meta = ImageMeta(
            uri=str(path),
            stem=stem_of(path.name),
            identity=file_identity(path),
            kind="slide",
            format="features:h5",
            channels=3,
            dtype="uint8",
            levels=(LevelMeta(shape=shape, downsample=(1.0, 1.0)),),
            spacing=None if spacing[0] is None else (float(spacing[0]), float(spacing[0])),
            spacing_source=source if spacing[0] is not None else "",
            background=235.0,
            notes=tuple(notes),
            pixels=False,
        )

    def read(self, box_l0: Box, shape_px: tuple[int, ...], level: int) -> NoReturn:
        """There is nothing to read.

        Raises
        ------
        SourceError
            Always.
        """
        msg = f"{self.meta.uri}: features alone have no pixels; give the slide as IMAGE and this file by --features"
        raise SourceError(msg)

    def close(self) -> None:
        """Nothing is held open."""
