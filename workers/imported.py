"""Features that another program made, in the place of embedding: laid on the slide, checked against the encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ModelError, SourceError
from schemas.grid import Lattice
from schemas.image import ImageMeta, stem_of
from schemas.run import TilesInfo
from workers.explainer import ExplainInit, TileComputer
from workers.readers.features import (
    ENCODER,
    STORE,
    SUFFIXES,
    TILE,
    ImportedFeatures,
    feature_places,
    level0_size,
    read_features,
)
from workers.store.bags import Bag
from workers.store.tiles import TilesStore

UNVERIFIED = "encoder unverified: features alone, without their slide"
TRIED = 8
"""Tiles that are embedded again, to see that the features are this encoder's."""
SAME_ENCODER = 0.999
"""Least cosine between their features: of two decoders or resamplings of one tile, not of two encoders."""
SIZE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Placed:
    """The features of a file on a slide."""

    features: NDArray[np.float32]
    """`(N, D)`, sorted by row, then column."""
    boxes: NDArray[np.int64]
    """`(N, 2, 2)` level-0, in the same order."""
    sha256: str
    """Of the file, or of what a store holds."""
    encoder: str
    """Digest of the encoder's weights, where the file says whose they are."""
    notes: tuple[str, ...]


def features_path(asked: str, uri: str) -> Path:
    """Features of an image: `asked` itself, a file or an embedded image's output, or the one in it that is named like the image.

    Raises
    ------
    SourceError
        There is none, or several.
    """
    path = Path(asked).expanduser().absolute()
    if not path.is_dir() or path.name == STORE:
        return path
    if (path / STORE).is_dir():
        return path / STORE
    stem = stem_of(Path(uri.partition("?")[0]).name)
    found = feature_places(path, stem)
    if len(found) != 1:
        wanted = " or ".join([*(stem + s for s in SUFFIXES), f"{stem}-*/{STORE}"])
        msg = f"{uri}: {len(found)} places of its features in {path}; expected one, {wanted}"
        raise SourceError(msg)
    return found[0]


def _stored(path: Path) -> tuple[ImportedFeatures, tuple[str, ...]]:
    """The features in a `tiles.zarr`, with what a file of ours would say of them; notes on those it lacks.

    Raises
    ------
    StoreError
        No such store, or not all of it is embedded.
    """
    store = TilesStore.open(path)
    info = store.info
    if not info.features:
        msg = f"{path}: has no features: it is of an image whose tiles were explained, not embedded"
        raise SourceError(msg)
    bag = Bag(path, info)
    rows = bag.rows()
    said = {TILE: info.lattice.tile_l0, ENCODER: info.spec.card.get("state_sha256", "")}
    notes: tuple[str, ...] = ()
    if missing := info.planned - len(rows):
        notes = (
            f"{missing} of {info.planned} tiles of {path.name} have no features and are not in the bag; "
            "gigacam embed --retry-failed tries them again",
        )
    return ImportedFeatures(bag.features(rows), store.boxes(rows)[:, 0], said), notes


def _read(path: Path) -> tuple[ImportedFeatures, str, tuple[str, ...]]:
    """What is at `path`, its digest, and notes on what it lacks."""
    if path.is_dir():
        found, notes = _stored(path)
        content = hashlib.sha256(found.features.tobytes())
        if found.corner_l0 is not None:
            content.update(found.corner_l0.tobytes())
        return found, content.hexdigest(), notes
    found = read_features(path)
    with path.open("rb") as file:
        return found, hashlib.file_digest(file, "sha256").hexdigest(), ()


def place_features(path: Path, meta: ImageMeta, lattice: Lattice, features: int, encoder: str = "") -> Placed:
    """Read a feature file and lay its tiles on the slide.

    Parameters
    ----------
    path
        See `workers.readers.features.read_features`; or a `tiles.zarr`.
    meta
        Of the slide.
    lattice
        Says how large a tile of the encoder is on this slide.
    features
        Numbers a tile that the head reads.
    encoder
        Digest of the encoder's weights; a file that says another is refused.

    Raises
    ------
    SourceError
        No tile; another encoder; other numbers a tile; values that are not finite; no positions, or some off the slide; tiles of another size.
    """
    found, sha256, notes = _read(path)
    n, width = found.features.shape
    if not n:
        msg = f"{path}: the bag is empty; expected the features of at least one tile"
        raise SourceError(msg)
    whose = str(found.attributes.get(ENCODER, ""))
    if whose and encoder and whose != encoder:
        msg = (
            f"{path}: the features of another encoder: its weights had the digest {whose[:12]}, those of the model card have "
            f"{encoder[:12]}; give the card of the encoder that made them, or embed the slide anew"
        )
        raise SourceError(msg)
    if width != features:
        msg = f"{path}: {width} numbers a tile, the bag head reads {features}: these are the features of another encoder"
        raise SourceError(msg)
    if bad := n - int(np.isfinite(found.features).all(axis=1).sum()):
        msg = f"{path}: {bad} of {n} tiles have features that are not finite; make them anew, or leave those tiles out"
        raise SourceError(msg)
    if found.corner_l0 is None:
        msg = (
            f"{path}: does not say where its tiles are (no dataset coords); positions are never invented: give the file "
            "that has them, or leave --features out to embed the slide here"
        )
        raise SourceError(msg)
    notes += _check_size(path, found.attributes, meta, lattice)
    stop = found.corner_l0 + np.array(lattice.tile_l0)
    off = ((found.corner_l0 < 0) | (found.corner_l0 >= np.array(meta.shape_l0))).any(axis=1)
    if off.any():
        y, x = found.corner_l0[off][0].tolist()
        msg = (
            f"{path}: {int(off.sum())} of {n} tiles lie off the slide, the first at (x, y) = ({x}, {y}); it has "
            f"{meta.shape_l0[1]} x {meta.shape_l0[0]} level-0 px: these are the features of another slide"
        )
        raise SourceError(msg)
    order = np.lexsort(found.corner_l0.T[::-1])
    boxes = np.stack([found.corner_l0, stop], axis=1)[order]
    return Placed(found.features[order].astype(np.float32), boxes, sha256, whose, notes)


def _check_size(path: Path, said: dict[str, Any], meta: ImageMeta, lattice: Lattice) -> tuple[str, ...]:
    """What the file says of its tiles' size must be what the card and the slide say."""
    size = level0_size(said)
    if size is None and "patch_size" in said and "patch_level" in said:
        level = int(said["patch_level"])
        if level >= len(meta.levels):
            msg = f"{path}: its tiles are of level {level}, the slide has {len(meta.levels)} levels"
            raise SourceError(msg)
        side = float(said["patch_size"]) * float(meta.levels[level].downsample[0])
        size = side, side
    if size is None:
        return (
            f"{path.name} does not say how large its tiles are; taken as {lattice.tile_l0[0]} level-0 px",
        )
    if any(abs(s - t) > max(1.0, SIZE_TOLERANCE * t) for s, t in zip(size, lattice.tile_l0, strict=True)):
        msg = (
            f"{path}: its tiles are {size[1]:g} level-0 px wide, those of the card are {lattice.tile_l0[1]} x "
            f"{lattice.tile_l0[0]} on this slide; give the card the tile and mpp that the features were made with"
        )
        raise SourceError(msg)
    return ()


def verify_encoder(info: TilesInfo, init: ExplainInit, placed: Placed) -> str:
    """Embed some tiles again, drawn at random, and hold them against the file.

    Returns
    -------
    str
        How far the features are known to be this encoder's.

    Raises
    ------
    ModelError
        They are another's.
    SourceError
        None of the tiles could be read.
    """
    n = len(placed.boxes)
    rows = np.sort(np.random.default_rng(0).choice(n, min(TRIED, n), replace=False)).astype(np.int64)
    tiles = TileComputer(info, init)
    try:
        found = tiles.compute(placed.boxes[rows], rows, lambda x, _: tiles.embedded(x))
    finally:
        tiles.close()
    good = np.setdiff1d(np.arange(len(rows)), list(found.errors))
    if not len(good):
        msg = f"{info.image.uri}: none of {len(rows)} tiles could be read to verify the encoder, the first since: {next(iter(found.errors.values()))}"
        raise SourceError(msg)
    near = cosines(found.arrays.scores[good], placed.features[rows[good]])
    if not near.min() >= SAME_ENCODER:
        msg = (
            f"{info.image.uri}: the features are another encoder's, or of other pixels: {len(good)} tiles embedded again have "
            f"cosines from {near.min():.4f} to {near.max():.4f} with those in the file; expected at least {SAME_ENCODER}. "
            "Give the card of the encoder that made them"
        )
        raise ModelError(msg)
    return f"imported; {len(good)} tiles embedded again have a cosine of at least {near.min():.6f}"


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(n,)` between the rows of two `(n, D)`; 1 where both are the same, be it 0; NaN where one is."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    near: NDArray[np.float64] = np.divide((x * y).sum(axis=1), size, out=np.zeros(len(x)), where=size != 0)
    near[(x == y).all(axis=1)] = 1.0
    return near


def import_features(bag: Bag, units: Mapping[int, NDArray[np.int64]], path: str, init: ExplainInit) -> str:
    """Write the features of some units as if they had been computed, if they are this encoder's.

    Parameters
    ----------
    bag
        Open for writing.
    units
        Unit -> `(n,)` its rows.
    path
        The file that was planned with.
    init
        Of the model that embeds.

    Returns
    -------
    str
        How far the features are known to be this encoder's.

    Raises
    ------
    ModelError, SourceError
        See `place_features` and `verify_encoder`; or the file changed since it was planned.
    """
    info = bag.info
    placed = place_features(
        Path(path), info.image, info.lattice, info.features, info.spec.card.get("state_sha256", "")
    )
    if placed.sha256 != info.spec.grid.features_sha256:
        msg = f"{path}: changed since the run was planned; restore it, or explain again with --fresh"
        raise SourceError(msg)
    if info.image.pixels:
        known = verify_encoder(info, init, placed)
    else:
        known = UNVERIFIED + ("; the file says they are this encoder's" if placed.encoder else "")
    for rows in units.values():
        bag.write_unit(rows, placed.features[rows], {})
    return known
