"""Features of an embedded image as `.h5`, the way CLAM and TRIDENT write them and read them."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np

from schemas.errors import SpecError, StoreError
from workers.readers.features import ENCODER, TILE
from workers.store.bags import Bag
from workers.store.tiles import TilesStore

IMAGE = "image_identity"
_UNITS_AT_ONCE = 16


def write_features(folder: Path, tiles: TilesStore) -> Path:
    """Write `<stem>.h5`: `features (N, D)` float32 and `coords (N, 2)`, each tile's upper left corner as (x, y) in level-0 px.

    Attributes of `coords` say how large a tile is (`patch_size`, `patch_level` as CLAM does, `patch_size_level0` as TRIDENT does,
    where tiles are square), the slide's size and pixel; those of `features` the encoder's digest. A tile that has no features
    is not in it.

    Parameters
    ----------
    folder
        Made if missing.
    tiles
        Of an image whose tiles are all embedded, or failed.

    Raises
    ------
    SpecError
        Positions in such a file are those of a slide, and this is a volume.
    StoreError
        Some are not; or the file is there and is not of this image.
    """
    info = tiles.info
    if info.image.kind != "slide":
        msg = f"{info.image.uri}: --h5 files hold positions on a slide, this is a volume; its features are in {tiles.path}"
        raise SpecError(msg)
    bag = Bag(tiles.path, info)
    rows = bag.rows()
    path = folder / f"{info.image.stem}.h5"
    _check_ours(path, info.image.identity)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with h5py.File(part, "w") as file:
        features = file.create_dataset("features", (len(rows), info.features), "float32")
        step = _UNITS_AT_ONCE * info.spec.unit
        for first in range(0, len(rows), step):
            features[first : first + step] = bag.features(rows[first : first + step])
        features.attrs[ENCODER] = info.spec.card["state_sha256"]
        features.attrs["encoder"] = info.spec.card["name"]
        coords = file.create_dataset("coords", data=tiles.boxes(rows)[:, 0, ::-1])
        height, width = info.lattice.tile_l0
        if height == width:
            coords.attrs.update({"patch_size": height, "patch_level": 0, "patch_size_level0": height})
        coords.attrs[TILE] = np.array([height, width])
        coords.attrs.update({"level0_height": info.image.shape_l0[0], "level0_width": info.image.shape_l0[1]})
        coords.attrs.update({"mpp": float(np.mean(info.spec.spacing)), "name": info.image.stem})
        coords.attrs[IMAGE] = info.image.identity
    os.replace(part, path)
    return path


def _check_ours(path: Path, identity: str) -> None:
    if not path.exists():
        return
    try:
        with h5py.File(path, "r") as file:
            found = str(file["coords"].attrs[IMAGE])
    except (OSError, KeyError) as error:
        msg = f"{path}: exists and is no file of ours ({error}); choose another folder, or remove it yourself"
        raise StoreError(msg) from error
    if found != identity:
        msg = f"{path}: exists and holds the features of another image of that name; choose another folder"
        raise StoreError(msg)
