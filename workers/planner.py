"""Before any tile: the model opened once, an image probed, its tiles laid, the cost summed up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schemas.bag import InsideSpec
from schemas.errors import SourceError, SpecError
from schemas.explanation import CamSpec
from schemas.grid import GridSpec, TissueSpec
from schemas.heatmap import ChannelInfo, HeatmapSpec
from schemas.image import ImageRequest, ReadOptions
from schemas.model import ModelCard, ModelFacts, OutputSpec
from schemas.run import (
    ExplainRequest,
    HeatmapInfo,
    MapGrid,
    TilesInfo,
    TilesSpec,
)
from workers.bag_plan import asked_methods, bag_channels
from workers.cam.methods import method
from workers.explainer import pick_device
from workers.imported import Placed, features_path, place_features
from workers.models.card import load_card
from workers.models.facts import model_facts, retarget
from workers.provenance import versions
from workers.readers import open_image
from workers.readers.masks import load_mask, read_mask
from workers.readers.overview import read_overview
from workers.readers.reader import Reader
from workers.readers.regions import read_polygons
from workers.stitching.grid import heatmap_grid
from workers.tiling.plan import Plan, make_plan
from workers.tiling.positions import make_lattice
from workers.tiling.tissue import foreground_mask, tissue_mask

VOLUME_FULL_GRID_VOXELS = 64_000_000
"""A volume up to this size gets a heatmap on its own voxel grid."""


@dataclass(frozen=True)
class Model:
    """A model card, and what its network turned out to be."""

    path: str
    card: ModelCard
    facts: ModelFacts


@dataclass(frozen=True)
class Job:
    """One planned image."""

    request: ImageRequest
    folder: Path
    plan: Plan
    tiles: TilesInfo
    heatmap: HeatmapInfo
    tissue_method: str
    tissue_fraction: float
    features: str
    """File that the features of a bag are imported from; empty: they are computed."""
    notes: tuple[str, ...]


def open_model(request: ExplainRequest) -> Model:
    """Load the card and its network once, here, so that a wrong request fails before any image."""
    loaded = load_card(request.model)
    methods, bag_methods = asked_methods(loaded, request)
    if request.words and loaded.card.bag is not None:
        msg = f"--words {request.words}: ranks the channels behind a tile's own score; {loaded.card.name!r} scores bags of tiles"
        raise SpecError(msg)
    ndim = len(loaded.card.input.tile)
    _check_places(request, ndim)
    layer = request.layer or loaded.card.cam.layer
    tile = request.tile * ndim if request.tile and len(request.tile) == 1 else request.tile
    facts = model_facts(
        loaded,
        layer,
        request.targets,
        methods,
        tile,
        request.cell_centres,
        request.precision,
        pick_device("auto"),
    )
    facts = facts.model_copy(update={"bag_methods": bag_methods})
    return Model(str(Path(request.model).resolve()), loaded.card, facts)


def open_encoder(request: ExplainRequest) -> Model:
    """Open the model of a request of which only the embedding is asked: of whole bags as ever, or an encoder alone.

    Raises
    ------
    SpecError, ModelError
        See `open_model`; or a network that gives no embedding, or flags that mean nothing without a bag head.
    """
    loaded = load_card(request.model)
    if loaded.card.bag is not None:
        return open_model(request)
    output = loaded.card.output
    if output.kind != "embedding" or output.references:
        msg = (
            f"{request.model}: embedding takes a model with a [bag] head, or an encoder: [output] kind = 'embedding' without "
            f"references; found kind = {output.kind!r}. What a layer gives is embedded by [network] embedding = 'mean' or 'class'"
        )
        raise SpecError(msg)
    given = request.model_fields_set & {"methods", "bag_methods", "inside", "features", "targets"}
    if given:
        flags = ", ".join(sorted(given))
        msg = f"{flags}: {request.model} has no [bag] head to explain; remove the flags"
        raise SpecError(msg)
    model = open_model(request.model_copy(update={"methods": (), "targets": ("0",)}))
    facts = model.facts.model_copy(update={"embedding": len(model.facts.classes)})
    return Model(model.path, model.card, facts)


def _check_places(request: ExplainRequest, ndim: int) -> None:
    """Read what --region and --mask name: a wrong file is a wrong request, not a failed image."""
    if request.region:
        read_polygons(request.region)
    if request.mask:
        try:
            load_mask(request.mask, ndim)
        except SourceError as error:
            msg = f"--mask {error}"
            raise SpecError(msg) from error


def plan_image(image: ImageRequest, request: ExplainRequest, model: Model) -> Job:
    """Probe one image and lay its tiles; reads an overview, computes no tile.

    Raises
    ------
    SourceError, SpecError
        The image cannot be read or does not fit the model or the request.
    """
    # Workers may run in another folder: what they are given is absolute.
    reader = open_image(absolute(image.uri), image.options)
    try:
        return _plan(reader, image, request, model)
    finally:
        reader.close()


def absolute(uri: str) -> str:
    """A path as an absolute one; other URIs as they are."""
    return uri if ":" in uri.partition("/")[0] else str(Path(uri).expanduser().absolute())


def _plan(reader: Reader, image: ImageRequest, request: ExplainRequest, model: Model) -> Job:
    meta, card, facts = reader.meta, model.card, model.facts
    if image.target:
        try:
            facts = retarget(facts, card.output, (image.target,))
        except SpecError as error:
            msg = f"{image.uri}: {error}"
            raise SpecError(msg) from error
    if meta.kind != card.input.kind:
        msg = f"{image.uri}: is a {meta.kind}; model {card.name!r} takes a {card.input.kind}"
        raise SpecError(msg)
    if not meta.pixels and card.bag is None:
        msg = f"{image.uri}: features alone, and model {card.name!r} has no [bag] head to explain them by; give the slide"
        raise SpecError(msg)
    if not meta.pixels and (request.region or request.mask):
        msg = f"{image.uri}: the bag is the file's tiles, all of them; remove --region and --mask"
        raise SpecError(msg)
    if meta.pixels and meta.channels != card.input.channels:
        msg = f"{image.uri}: has {meta.channels} channels; model {card.name!r} takes {card.input.channels}"
        raise SpecError(msg)
    if meta.spacing is None:
        msg = f"{image.uri}: the file does not say its pixel size; give --mpp or --spacing"
        raise SourceError(msg)
    tissue = TissueSpec(method=request.tissue)
    grid = GridSpec(
        tile_px=facts.tile,
        spacing=card.input.spacing,
        overlap=request.overlap,
        edge=request.edge,
        tissue=tissue,
        region_l0=read_polygons(request.region) if request.region else (),
    )
    if grid.region_l0 and meta.kind != "slide":
        msg = f"{image.uri}: --region takes polygons on a slide; use --mask for a volume"
        raise SpecError(msg)
    lattice = make_lattice(
        image.uri, meta.levels, meta.spacing, grid, allow_upsampling=request.allow_upsampling
    )
    notes = [*meta.notes, *facts.notes]
    mask: Any = None
    downsample: tuple[float, ...] = (1.0,) * meta.ndim
    method, fraction = "every tile", 1.0
    placed: Placed | None = None
    path = Path()
    if request.features or not meta.pixels:
        path = features_path(request.features, image.uri) if meta.pixels else Path(meta.uri)
        width = card.bag.features if card.bag else 0
        placed = place_features(path, meta, lattice, width, facts.card["state_sha256"])
        grid = grid.model_copy(update={"features_sha256": placed.sha256})
        method = f"features {path.name}"
        notes += placed.notes
    elif request.mask:
        mask, sha256 = read_mask(request.mask, meta)
        downsample = tuple(n / m for n, m in zip(meta.shape_l0, mask.shape, strict=True))
        grid = grid.model_copy(update={"mask_sha256": sha256})
        method, fraction = f"mask {Path(request.mask).name}", float(mask.mean())
    elif tissue.method == "auto":
        spacing = (tissue.mask_um,) * 2 if meta.kind == "slide" else None
        pixels, downsample, bad = read_overview(reader, spacing=spacing)
        size = tuple(s * d for s, d in zip(meta.spacing, downsample, strict=True))
        found = (tissue_mask if meta.kind == "slide" else foreground_mask)(pixels, size, tissue)
        mask, method, fraction = found.mask.copy(), found.method, found.fraction
        notes += found.notes
        for box in bad:
            # Whether an unreadable place is tissue is unknown: it is tried, and fails by name.
            mask[
                tuple(
                    slice(int(a // d), int(np.ceil(b / d)))
                    for a, b, d in zip(box.start, box.stop, downsample, strict=True)
                )
            ] = True
        if bad:
            notes.append(f"{len(bad)} places of the overview could not be read and are tried as tissue")
    plan = make_plan(
        lattice,
        request.unit or meta.kind,
        mask,
        downsample,
        tissue,
        grid.region_l0,
        None if placed is None else placed.boxes,
    )
    if (card.bag is not None or facts.embedding) and not plan.planned:
        msg = f"{image.uri}: the bag is empty: no tile holds enough tissue ({method}); --tissue none takes every tile"
        raise SourceError(msg)
    if lattice.upsampling > 1.25:
        notes.append(f"read {lattice.upsampling:.2f} times finer than the source, as allowed")
    if not meta.pixels:  # nothing can be seen inside a tile
        facts = facts.model_copy(update={"grids": {}})
        request = request.model_copy(update={"inside": InsideSpec.parse("none")})
    cam = CamSpec(
        methods=tuple(facts.grids),
        targets=facts.targets,
        layer=facts.layer,
        cell_centres=request.cell_centres,
        bag_methods=facts.bag_methods,
        inside=request.inside,
        precision=facts.precision,
    )
    spec = TilesSpec(
        identity=meta.identity,
        read=image.options,
        spacing=meta.spacing,
        card=facts.card,
        cam=cam,
        grid=grid,
        unit=plan.unit,
        batch=min(request.batch, plan.unit),
    )
    grids = {n: MapGrid.of(c, lattice.tile_l0, lattice.tile_px) for n, c in facts.grids.items()}
    tiles = TilesInfo(
        tiles_id=spec.tiles_id,
        spec=spec,
        image=meta,
        lattice=lattice,
        grids=grids,
        reductions=facts.reductions,
        classes=facts.classes,
        embedding=facts.embedding,
        planned=plan.planned,
        tiles=plan.tiles,
        units=plan.units,
        versions=versions(),
    )
    folder = Path(request.out).absolute() / meta.image_id(request.image_id)
    heatmap = _heatmap_info(tiles, request.heatmap, facts, card.output)
    return Job(
        image, folder, plan, tiles, heatmap, method, fraction, str(path) if placed else "", tuple(notes)
    )


def _heatmap_info(tiles: TilesInfo, asked: HeatmapSpec, facts: ModelFacts, output: OutputSpec) -> HeatmapInfo:
    meta, cam = tiles.image, tiles.spec.cam
    grids = tiles.grids or {"": tiles.bag_grid()}
    finest = min((grid.cell_l0 for grid in grids.values()), key=min)
    downsample = asked.downsample or auto_downsample(meta.kind, meta.shape_l0, finest)
    channels = bag_channels(tiles, facts, output) + tuple(
        ChannelInfo(
            method=name,
            target=target,
            target_index=index,
            unit=output.unit(info.unit),
            signed=info.signed,
            bag=bool(tiles.features),
            grid=tiles.grids[name].shape,
            title=info.title,
            edition=info.edition,
        )
        for name, info in ((name, method(name).info) for name in cam.methods)
        for target, index in zip(facts.targets, facts.target_index, strict=True)
    )
    spec = asked.model_copy(update={"downsample": downsample})
    return HeatmapInfo(
        run_id=tiles.spec.run_id(spec),
        tiles_id=tiles.tiles_id,
        spec=spec,
        grid=heatmap_grid(meta.shape_l0, downsample),
        channels=channels,
        spacing=tiles.spec.spacing,
        spacing_unit="um" if meta.kind == "slide" else "mm",
        partial=bool(cam.bag_methods and cam.methods) and not cam.inside.every,
    )


def auto_downsample(kind: str, shape_l0: tuple[int, ...], cell_l0: tuple[float, ...]) -> int:
    """Level-0 px a heatmap px: the largest power of two not above half a CAM cell.

    A volume that fits keeps its own voxel grid, since radiology viewers lay the map on it.
    """
    if kind == "volume" and int(np.prod(shape_l0)) <= VOLUME_FULL_GRID_VOXELS:
        return 1
    half = min(cell_l0) / 2
    return 1 << max(0, int(np.floor(np.log2(half)))) if half >= 1 else 1


def with_row_options(image: ImageRequest, read: ReadOptions) -> ImageRequest:
    """The request's read options, overridden by what the image's own CSV row says."""
    row = image.options.model_dump(exclude_none=True)
    return image.model_copy(update={"options": read.model_copy(update=row)})
