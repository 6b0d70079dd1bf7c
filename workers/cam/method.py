"""What a CAM method is: a small value of facts, one function of a `View`, and options of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar, get_origin

from pydantic import ValidationError, ValidationInfo, field_validator
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import CellGeometry, MethodInfo, Need, Unit
from schemas.frozen import Frozen
from workers.cam.capture import SplitNet
from workers.cam.view import View

Doubt = Tensor | None
"""`(B,)` True where a map is defined, but close to arbitrary; None: nowhere."""

Raw = Callable[[View, Any], tuple[Tensor, Doubt]]
"""(what is known of a batch and one target, the method's options) -> raw map `(B, Z)`, or `(B, *grid)` where the
method has a grid of its own."""

Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Doubt]]
"""(activations `(B, K, Z)`, gradient `(B or 1, T, K)` equal in all cells) -> channel weights `(B or 1, T, K)`."""

Place = Callable[[SplitNet, tuple[int, ...], CellGeometry, Any], CellGeometry]
"""(network, `(C_in, *S)`, cells of the explained layer, options) -> cells of the method's own grid."""


@dataclass(frozen=True)
class Solved:
    """What a method's sum over an image is solved for; one target."""

    state: Tensor
    """float64 `(*state)`, all that explaining a tile needs; NaN where no tile entered the sum."""
    cells: float
    """How many cells entered the sum."""
    explained: float
    """Share of the summed energy in the direction found, 0 to 1."""
    doubtful: bool
    """The direction is close to arbitrary."""


@dataclass(frozen=True)
class Slide:
    """The parts of a method whose map of one tile depends on all tiles of the image: sum, solve once, project."""

    shapes: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]
    """K channels -> shapes of the sum and of the state, of one target."""
    collect: Callable[[View, Sequence[int], Any], Tensor]
    """(a batch and one target, the rows to sum over, options) -> float64 `(*sum)`, additive over tiles."""
    solve: Callable[[Tensor, Any], Solved]
    """(float64 sum over the image, options) -> what was found."""
    project: Callable[[View, Tensor, Any], Tensor]
    """(a batch and one target, float64 state, options) -> raw map `(B, Z)`."""


class Options(Frozen):
    """Settings of a method; a subclass a method that has any.

    Written `name+key=value+key=value`, lists with hyphens (`layers=layer1-layer2`): safe in a shell, a path and a
    channel label.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        return (
            tuple(value.split("-")) if isinstance(value, str) and get_origin(annotation) is tuple else value
        )

    def facts(self) -> dict[str, Any]:
        """Fields of `MethodInfo` that these settings change, such as `signed`; a subclass says so where any does."""
        return {}

    def text(self, *, every: bool = False) -> dict[str, str]:
        """Options as text, those at their default left out unless `every`."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields}
        return {n: _text(v) for n, v in values.items() if every or v != fields[n].default}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-".join(map(_text, value)) if isinstance(value, tuple) else f"{value}"


@dataclass(frozen=True)
class Method:
    """One row of the method table."""

    info: MethodInfo
    raw: Raw
    weigh: Weigh | None = None
    """Where the method is a weighted sum of channels if the gradient does not vary over cells."""
    options: Options = field(default_factory=Options)
    place: Place | None = None
    """Where the cells of a method with a grid of its own lie; None: those of the explained layer."""
    slide: Slide | None = None
    """Where a map needs the whole image; `raw` then only says so."""

    def with_options(self, given: dict[str, str]) -> Method:
        """Set some options; the name then says so, the same way whatever the order they came in."""
        info, options = configured(self.info, self.options, given)
        return replace(self, info=info, options=options)

    def cells(self, net: SplitNet, input_shape: Sequence[int], layer: CellGeometry) -> CellGeometry:
        """Where this method's cells lie in a tile of `(C_in, *S)`, given those of the explained layer."""
        return self.place(net, tuple(input_shape), layer, self.options) if self.place else layer


def configured(info: MethodInfo, options: Options, given: Mapping[str, str]) -> tuple[MethodInfo, Options]:
    """Facts and options of a method with some of them set; SpecError for one it has not, or with another value."""
    if not given:
        return info, options
    known = type(options).model_fields
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or list(known)
            msg = f"{info.name}: has no option {key!r}; it has {', '.join(near) or 'none'}"
            raise SpecError(msg)
    try:
        options = type(options).model_validate({**options.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        msg = f"{info.name}: option {where} = {first['input']!r}: {first['msg']}"
        raise SpecError(msg) from error
    name = "+".join([info.name, *(f"{k}={v}" for k, v in options.text().items())])
    return info.model_copy(update={"name": name, **options.facts()}), options


class Configurable(Protocol):
    """A row of a table of methods."""

    def with_options(self, given: dict[str, str]) -> Self:
        """Set some options; the name then says so."""
        ...


Row = TypeVar("Row", bound=Configurable)


def find(table: Mapping[str, Row], name: str, listed: str) -> Row:
    """The row of `name` or `name+option=value+...`; SpecError, with near names and where they are `listed`, if none."""
    bare, *given = name.split("+")
    if bare not in table:
        near = difflib.get_close_matches(bare, table, n=3)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        msg = f"{name}: unknown; {meant}{listed}"
        raise SpecError(msg)
    pairs = [option.partition("=") for option in given]
    if not all(key and mark and value for key, mark, value in pairs):
        msg = f"{name}: options are written name+key=value+key=value"
        raise SpecError(msg)
    return table[bare].with_options({key: value for key, _, value in pairs})


GRADIENTS: tuple[Need, ...] = ("activations", "gradients")


def row(
    name: str, title: str, raw: Raw, unit: Unit, citation: str, *, signed: bool = True, edition: str = "",
    needs: tuple[Need, ...] = GRADIENTS, class_specific: bool = True, weigh: Weigh | None = None,
    options: Options | None = None, place: Place | None = None, slide: Slide | None = None,
) -> Method:  # fmt: skip
    """A row of the table."""
    options = options or Options()
    info = MethodInfo(
        name=name, title=title, needs=needs, unit=unit, signed=signed, class_specific=class_specific,
        citation=citation, edition=edition, options=options.text(every=True),
    )  # fmt: skip
    return Method(info, raw, weigh, options, place, slide)


def pure(f: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Doubt]]) -> Raw:
    """Lift a function of activations `(B, K, Z)` and their gradient `(B, K, Z)`."""

    def raw(view: View, _: Any) -> tuple[Tensor, Doubt]:
        found = f(view.a, view.g)
        return found if isinstance(found, tuple) else (found, None)

    return raw
