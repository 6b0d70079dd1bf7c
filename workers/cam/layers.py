"""Maps of several layers combined into one, on the grid of the finest (NormGrad, CVPR 2020, section 3.3).

The paper scales each layer's map to 0..1 in every image, which makes the values of two tiles incomparable. A weighted geometric
mean does not need that: a factor of one layer is a factor of the whole. So nothing is scaled unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import model_validator
from torch import Tensor, nn

from schemas.errors import ModelError
from schemas.explanation import CellGeometry
from workers.cam.capture import HookedNet, SplitNet, frozen, plain
from workers.cam.combine import How, combine, minmax, ramp, resample
from workers.cam.geometry import grid_cells, measure_cells
from workers.cam.method import Doubt, row
from workers.cam.noise import NoisyNet, eager
from workers.cam.normgrad import REBUFFI, At, NormGradOptions, Site, extract
from workers.cam.tokens import looks_channels_last
from workers.cam.view import View, full


class LayersOptions(NormGradOptions):
    """Which layers, and how their maps become one."""

    layers: tuple[str, ...] = ()
    """Names as in `named_modules()`; none: the last of every resolution below the input's, up to the explained layer."""
    combine: How = "product"
    """`product`: weighted geometric mean; `sum`: weighted mean, in which an unscaled layer counts by its magnitude."""
    weights: Literal["uniform", "ramp"] = "uniform"
    """`ramp`: 1/J, 2/J ... 1 from the layer that runs first to the last, before they are made to sum to 1."""
    scale: Literal["none", "minmax"] = "none"
    """`minmax`: each layer's map to 0..1 within its tile, as published; values of two tiles then do not compare."""

    @model_validator(mode="after")
    def _no_roots_of_negatives(self) -> LayersOptions:
        if self.by == "sum" and self.combine == "product" and self.scale == "none":
            msg = "by=sum is signed, and a geometric mean is not: take combine=sum or scale=minmax"
            raise ValueError(msg)
        return self

    def facts(self) -> dict[str, Any]:
        note = EDITION if self.scale == "none" else f"{EDITION}; scale=minmax: NOT comparable between tiles"
        return {"signed": self.by == "sum" and self.scale == "none", "unit": "1", "edition": note}


EDITION = "NormGrad of several layers, geometric mean by default, unscaled (the paper scales each map within its image)"


class Pass(NamedTuple):
    """One pass, in the order in which the layers ran."""

    parts: tuple[HookedNet, ...]
    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor | None, ...]
    """Of convolutions, where they are kept."""
    scores: Tensor
    """As in `Split`, attached to the outputs."""


def sites(view: View, layers: Sequence[str], at: At = "real") -> list[Site]:
    """Several layers in one pass, shared by all targets, and one gradient, in the order in which they run.

    What convolutions were given is kept for `at` `real` alone.

    Raises
    ------
    ModelError
        No such layer, one that the scores do not depend on or that has no spatial axes, or a cut network.
    """
    real = at == "real"
    done = view.once(("layers", real, *layers), lambda: _run(_eager(view.net), view.x, layers, real))
    with torch.enable_grad():
        y = view.y(done.scores)
    return [
        Site(part.layer, part.target, full(output.detach()), full(g), given)
        for part, output, given, g in zip(
            done.parts, done.outputs, done.inputs, _gradients(view.net, y, done), strict=True
        )
    ]


def _run(net: HookedNet, x: Tensor, layers: Sequence[str], keep_inputs: bool) -> Pass:
    """The layer that runs first starts the graph: what lies before it is run without one."""
    parts = [HookedNet(net.module, layer) for layer in layers]
    outputs: dict[int, Tensor] = {}

    def swap(i: int) -> Callable[[Tensor], Tensor]:
        def tap(output: Tensor) -> Tensor:
            # cloned on both sides: what follows may change it in place
            outputs[i] = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
            return outputs[i].clone()

        return tap

    with ExitStack() as stack:
        stack.enter_context(frozen(net.module))
        given = [stack.enter_context(part.inputs()) if keep_inputs else [] for part in parts]
        for i, part in enumerate(parts):
            stack.enter_context(part.tapped(swap(i)))
        scores = net.readout.take(net.module(plain(x)), len(x))
    for i, output in outputs.items():
        if not _is_feature_map(net, layers[i], output, x.shape[2:]):
            msg = (
                f"layer {layers[i]!r} gives shape {tuple(output.shape)}; only layers with (B, K, *grid) of {x.ndim - 2} "
                "axes can be combined, not tokens or channels that come last: name others with layers=<layer>-<layer>"
            )
            raise ModelError(msg)
    return Pass(
        tuple(parts[i] for i in outputs),
        tuple(outputs.values()),
        tuple(given[i][0] if given[i] else None for i in outputs),
        scores,
    )


def _is_feature_map(net: HookedNet, layer: str, output: Tensor, tile: Sequence[int]) -> bool:
    """Whether an output is `(B, K, *grid)`; what comes as `(B, *grid, K)` has as many axes, and would be read crosswise."""
    said = net.tokens.layout if layer == net.layer else ""
    fits = said == "channels_first" or not (said or looks_channels_last(output.shape, tile))
    return output.ndim == len(tile) + 2 and fits


def _gradients(net: SplitNet, y: Tensor, done: Pass) -> list[Tensor]:
    if isinstance(net, NoisyNet):
        return [net.grad(y, output, retain=True) for output in done.outputs]
    found: Sequence[Tensor | None] = (None,) * len(done.outputs)
    if y.requires_grad:
        with torch.enable_grad():
            found = torch.autograd.grad(y.sum(), done.outputs, retain_graph=True, allow_unused=True)
    for part, g in zip(done.parts, found, strict=True):
        if g is None:
            msg = f"the scores do not depend on layer {part.layer!r}; name layers on the way from input to scores"
            raise ModelError(msg)
    return [g for g in found if g is not None]


def _eager(net: SplitNet) -> HookedNet:
    found = eager(net)
    if found is None:
        msg = "several layers can be combined only in an eager network, not in one cut in two; use method 'normgrad'"
        raise ModelError(msg)
    return found


_CELLS: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()
"""Geometry found, by network: it belongs to the architecture."""


def cells_of(net: HookedNet, layer: str, input_shape: Sequence[int]) -> CellGeometry:
    """Cells of any layer of a network, measured once."""
    known = _CELLS.setdefault(net.module, {})
    key = (layer, *input_shape)
    if key not in known:
        known[key] = measure_cells(HookedNet(net.module, layer), input_shape)
    return known[key]  # type: ignore[no-any-return]


def stages(net: HookedNet, input_shape: Sequence[int]) -> tuple[str, ...]:
    """The last layer of every resolution below the input's, up to the explained layer and with it."""
    known = _CELLS.setdefault(net.module, {})
    key = (net.layer, None, *input_shape)
    if key not in known:
        known[key] = _stages(net, input_shape)
    return known[key]  # type: ignore[no-any-return]


def _stages(net: HookedNet, input_shape: Sequence[int]) -> tuple[str, ...]:
    tile = tuple(input_shape[1:])
    names = {module: name for name, module in net.module.named_modules() if name}
    ran: list[tuple[str, tuple[int, ...]]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and _is_feature_map(net, names[module], output, tile):
            ran.append((names[module], tuple(output.shape[2:])))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with torch.no_grad():
            device = next((p.device for p in net.module.parameters()), torch.device("cpu"))
            net.trunk(torch.zeros(2, *input_shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    calls = [name for name, _ in ran]
    last = {
        grid: name
        for name, grid in ran
        # a list of layers is written with hyphens; a module called again has no one output
        if grid != tile and math.prod(grid) > 1 and "-" not in name and calls.count(name) == 1
    }
    return tuple(dict.fromkeys([*last.values(), net.layer]))


def _layers(net: HookedNet, input_shape: Sequence[int], options: LayersOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(options.layers)) or stages(net, input_shape)


def _finest(cells: Sequence[CellGeometry]) -> CellGeometry:
    return max(cells, key=lambda c: math.prod(c.shape))


def place(
    net: SplitNet, input_shape: tuple[int, ...], layer: CellGeometry, options: LayersOptions
) -> CellGeometry:
    """Cells of the combined map: those of the finest layer."""
    found = _eager(net)
    finest = _finest([cells_of(found, name, input_shape) for name in _layers(found, input_shape, options)])
    # where the explained layer is laid on an even grid, by choice or because it cannot be measured, so is this map
    return grid_cells(finest.shape, input_shape[1:]) if layer.source == "grid" else finest


def combined(view: View, options: LayersOptions) -> tuple[Tensor, Doubt]:
    """NormGrad of several layers `(B, *grid of the finest)`, and where a layer's part of it is doubtful."""
    net, shape = _eager(view.net), view.x.shape[1:]
    maps, doubtful = [], torch.zeros(len(view.x), dtype=torch.bool, device=view.x.device)
    names = _layers(net, shape, options)
    onto = _finest([cells_of(net, name, shape) for name in names])
    for at in sites(view, names, options.at):
        own = cells_of(net, at.layer, shape)
        raw, doubt = extract(at, options)
        if options.scale == "minmax":
            raw, flat = minmax(raw)
            doubt = flat if doubt is None else doubt | flat
        if raw.shape[1:] != own.shape:
            msg = f"layer {at.layer!r} has a grid of {tuple(raw.shape[1:])} cells, but was measured to have {own.shape}"
            raise ModelError(msg)
        maps.append(resample(raw, own, onto))
        doubtful = doubtful if doubt is None else doubtful | doubt
    return combine(maps, ramp(len(maps)) if options.weights == "ramp" else None, options.combine), doubtful


METHODS = (
    row(
        "normgrad_layers", "NormGrad, layers combined", combined, "1", REBUFFI, signed=False, edition=EDITION,
        needs=("activations", "gradients", "input"), options=LayersOptions(), place=place,
    ),
)  # fmt: skip
