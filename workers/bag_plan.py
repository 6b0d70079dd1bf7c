"""What planning says of a model with a bag head: which methods, which channels, what it costs."""

from __future__ import annotations

from contextlib import suppress

from schemas.errors import ModelError, SpecError
from schemas.heatmap import ChannelInfo
from schemas.model import ModelFacts, OutputSpec
from schemas.run import ExplainRequest, TilesInfo
from workers.cam.bag_methods import bag_method
from workers.cam.methods import method
from workers.models.bags import load_head
from workers.models.card import LoadedCard
from workers.models.heads.head import BagHead

BAG_DEFAULTS = ("contribution", "gradient_input")
"""Signed, in the unit of the slide's logit; the second needs no more than a gradient."""
INSIDE_DEFAULT = ("hirescam",)
"""In units of the slide's logit, which add up."""


def asked_methods(loaded: LoadedCard, request: ExplainRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Methods inside the tile and methods of the bag, checked.

    Raises
    ------
    SpecError
        An unknown method, one that the head or a bag cannot have, or bag flags for a model without a bag head.
    """
    if loaded.card.bag is None:
        for flag, given in (
            ("--bag-method", bool(request.bag_methods)),
            ("--inside", "inside" in request.model_fields_set),
            ("--features", bool(request.features)),
        ):
            if given:
                msg = (
                    f"{flag}: {loaded.path} has no [bag] head; remove the flag, or give a model of whole bags"
                )
                raise SpecError(msg)
        return known_methods(request.methods), ()
    if request.features and (request.region or request.mask):
        msg = "--features: the bag is the file's tiles, all of them; remove --region and --mask"
        raise SpecError(msg)
    if request.features and loaded.card.input.kind != "slide":
        msg = f"--features: positions in such a file are those of a slide; {loaded.path} takes a {loaded.card.input.kind}"
        raise SpecError(msg)
    names = request.methods if "methods" in request.model_fields_set else INSIDE_DEFAULT
    inside = known_methods(names if request.inside.some else ())
    for name in inside:
        if method(name).slide is not None:
            msg = f"--method {name}: sums over the image first, which is not done inside the tiles of a bag; ask for another"
            raise SpecError(msg)
    head = load_head(loaded)
    try:
        rows = [bag_method(name) for name in request.bag_methods]
    except SpecError as error:
        msg = f"--bag-method {error.message}"
        raise SpecError(msg) from error
    for row in rows:
        try:
            row.check(head)
        except ModelError as error:
            msg = f"--bag-method {row.info.name}: {error.message}"
            raise SpecError(msg) from error
    bag = tuple(dict.fromkeys(row.info.name for row in rows))
    return inside, bag or (_default(head),)


def _default(head: BagHead) -> str:
    """The first method that this head can have."""
    for name in BAG_DEFAULTS[:-1]:
        with suppress(ModelError):
            bag_method(name).check(head)
            return name
    return BAG_DEFAULTS[-1]


def known_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """CAM methods under the names that their options give them, each once; SpecError for an unknown one."""
    try:
        return tuple(dict.fromkeys(method(name).info.name for name in names))
    except SpecError as error:
        msg = f"--method {error}"
        raise SpecError(msg) from error


def bag_channels(tiles: TilesInfo, facts: ModelFacts, output: OutputSpec) -> tuple[ChannelInfo, ...]:
    """One channel a bag method and target: the tile's value, painted over it."""
    return tuple(
        ChannelInfo(
            method=name,
            target=target,
            target_index=index,
            unit=output.unit(info.unit),
            signed=info.signed,
            bag=True,
            bag_method=name,
            encoder_unverified=not tiles.image.pixels,
            grid=tiles.bag_grid().shape,
            title=info.title,
            edition=info.edition,
        )
        for name, info in ((name, bag_method(name).info) for name in tiles.spec.cam.bag_methods)
        for target, index in zip(facts.targets, facts.target_index, strict=True)
    )


def encoder_known(tiles: TilesInfo) -> str:
    """How computed features are known to be those the head was trained on."""
    if (tiles.spec.card["bag"] or {}).get("encoder_digest"):
        return "computed by the encoder that the head was trained on"
    return "computed; the card does not say which encoder the head was trained on"


def bag_bytes(tiles: TilesInfo) -> int:
    """Uncompressed size of the features, relevances and gradients in `tiles.zarr`."""
    if not tiles.features:
        return 0
    cam = tiles.spec.cam
    targets = len(cam.targets)
    gradients = targets if cam.methods else 0
    return tiles.tiles * 4 * ((1 + gradients) * tiles.features + targets * len(cam.bag_methods))
