"""The table of CAM methods, and the one pass that serves any number of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from schemas.errors import SpecError
from schemas.explanation import MethodInfo, Need, Unit
from workers.cam.capture import SplitNet
from workers.cam.eigen import eigencam
from workers.cam.gradient import gradcam, gradcampp, hirescam, layercam, xgradcam
from workers.cam.head import head_gradient
from workers.cam.targets import ResolvedTarget, columns, select

Doubt = Tensor | None
RawMap = Callable[[Tensor, Tensor], tuple[Tensor, Doubt]]
"""(activations (B, K, Z), gradient (B, K, Z) or (B, K, 1)) -> map (B, Z), doubtful (B,) or None."""


class MapFlag(IntFlag):
    """What a tile's raw map must not be read as."""

    EMPTY = 1
    """No cell above 0: no positive evidence."""
    CONSTANT = 2
    """The same value in all of several cells."""
    NOT_FINITE = 4
    """Activations, scores or gradients are NaN or infinite; the whole map is NaN."""
    SINGLE_CELL = 8
    """The layer has one cell: the map says nothing of where."""
    DOUBTFUL = 16
    """Defined, but close to arbitrary; the method's docstring says when."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what it is, and its pure function."""

    info: MethodInfo
    raw: RawMap

    def maps(self, net: SplitNet, x: Tensor, targets: Sequence[ResolvedTarget]) -> Tensor:
        """Raw maps `(B, T, *grid)` of this method alone; see `explain`."""
        return explain(net, x, targets, [self.info.name]).maps[self.info.name]


@dataclass(frozen=True)
class Explained:
    """What one batch gives."""

    scores: Tensor
    """`(B, C)` float32, before any softmax."""
    target_index: Tensor
    """`(B, T)` int32: the class each map explains."""
    maps: dict[str, Tensor]
    """By method: `(B, T, *grid)` float32, raw and signed, in the method's unit."""
    flags: dict[str, Tensor]
    """By method: `(B, T)` uint8, bits of `MapFlag`."""


def explain(net: SplitNet, x: Tensor, targets: Sequence[ResolvedTarget], methods: Sequence[str]) -> Explained:
    """Explain a batch by several methods at once.

    One pass through the trunk, one gradient of the tail a target, shared by all methods. Equal input of equal batch
    shape gives equal bits.

    Parameters
    ----------
    net
        The network, split at the layer to explain.
    x
        `(B, C_in, *S)`, as the network expects it.
    targets
        T targets, from `workers.cam.targets.resolve`.
    methods
        Names of `METHODS`.

    Returns
    -------
    Explained
        Scores, target indices, maps and flags on the device of `x`, without a graph.

    Raises
    ------
    SpecError
        An unknown method, or no target.
    ModelError
        The layer cannot be explained (not on the path, no spatial axes, `cam` without its linear head).
    """
    rows = [method(name) for name in methods]
    if not targets:
        msg = "nothing to explain: no target is given"
        raise SpecError(msg)
    split = net.forward(x)
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        y, index = select(split.scores, targets)
        each_y = y.unbind(1)
    column, sign = columns(index, targets)
    scores = split.scores.detach()
    grid = split.activations.shape[2:]
    a = _full(split.activations.detach()).flatten(2)
    out: dict[str, list[tuple[Tensor, Doubt]]] = {row.info.name: [] for row in rows}
    sound = a.isfinite().flatten(1).all(1) & scores.isfinite().all(1)
    sounds = []

    differentiate = any("gradients" in row.info.needs for row in rows)
    for t, y_t in enumerate(each_y):
        sounds.append(sound)
        if differentiate:
            g = net.grad(y_t, split.activations, retain=t + 1 < len(targets)).flatten(2)
            sounds[t] = sound & g.isfinite().flatten(1).all(1)
        for row in rows:
            done = out[row.info.name]
            if not row.info.class_specific:
                done.append(done[0] if done else row.raw(a, a))
            elif "weights" in row.info.needs:
                linear = head_gradient(net, g, column[:, t], sign[:, t], scores.shape[1])
                done.append(row.raw(a, _full(linear)))
            else:
                done.append(row.raw(a, _full(g)))

    maps, flags = {}, {}
    for name, per_target in out.items():
        raw = torch.stack([m for m, _ in per_target], dim=1).float()
        doubtful = torch.stack([torch.zeros_like(sound) if d is None else d for _, d in per_target], dim=1)
        specific = METHODS[name].info.class_specific
        valid = torch.stack(sounds if specific else [sound] * len(targets), dim=1) & raw.isfinite().all(-1)
        maps[name] = torch.where(valid[..., None], raw, torch.nan).reshape(*raw.shape[:2], *grid)
        flags[name] = _flags(raw, valid, doubtful)
    return Explained(scores.float(), index, maps, flags)


def method(name: str) -> Method:
    """The row `name` of the table; SpecError, with near names, if there is none."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=3) or list(METHODS)
    msg = f"there is no method {name!r}; did you mean {', '.join(near)}? `gigacam methods` lists all"
    raise SpecError(msg)


def _full(tensor: Tensor) -> Tensor:
    """At least float32: sums over channels and cells are not made in half precision."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


def _flags(raw: Tensor, valid: Tensor, doubtful: Tensor) -> Tensor:
    """Flags `(B, T)` of raw maps `(B, T, Z)`."""
    low, high = raw.aminmax(dim=-1)
    single = torch.full_like(valid, raw.shape[-1] == 1)
    flags = torch.zeros_like(valid, dtype=torch.uint8)
    for flag, where in (
        (MapFlag.EMPTY, valid & (high <= 0)),
        (MapFlag.CONSTANT, valid & (low == high) & ~single),
        (MapFlag.NOT_FINITE, ~valid),
        (MapFlag.SINGLE_CELL, single),
        (MapFlag.DOUBTFUL, valid & doubtful),
    ):
        flags |= where.to(torch.uint8) * int(flag)
    return flags


def _certain(f: Callable[[Tensor, Tensor], Tensor]) -> RawMap:
    """Lift a pure function that has no doubtful cases."""
    return lambda a, g: (f(a, g), None)


_GRADIENTS: tuple[Need, ...] = ("activations", "gradients")


def _row(
    name: str, title: str, raw: RawMap, unit: Unit, citation: str, *, signed: bool = True, edition: str = "",
    needs: tuple[Need, ...] = _GRADIENTS, class_specific: bool = True,
) -> Method:  # fmt: skip
    info = MethodInfo(
        name=name, title=title, needs=needs, unit=unit, signed=signed, class_specific=class_specific,
        citation=citation, edition=edition,
    )  # fmt: skip
    return Method(info, raw)


METHODS: dict[str, Method] = {
    row.info.name: row
    for row in (
        _row(
            "gradcam", "Grad-CAM", _certain(gradcam), "logit/cell",
            "Selvaraju et al., Grad-CAM, ICCV 2017", edition="mean gradient (paper), before the final ReLU",
        ),
        _row(
            "hirescam", "HiResCAM", _certain(hirescam), "logit",
            "Draelos & Carin, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891", edition="before the final ReLU",
        ),
        _row(
            "cam", "CAM", _certain(hirescam), "logit",
            "Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016",
            edition="divided by the number of cells, so that a map sums to its score minus the bias",
            needs=("activations", "gradients", "weights"),
        ),
        _row(
            "layercam", "Layer-CAM", _certain(layercam), "1",
            "Jiang et al., LayerCAM, IEEE TIP 2021", signed=False, edition="one layer, before the final ReLU",
        ),
        _row(
            "gradcampp", "Grad-CAM++", gradcampp, "1",
            "Chattopadhyay et al., Grad-CAM++, WACV 2018", signed=False,
            edition="without exp(y), no epsilon, before the final ReLU",
        ),
        _row(
            "xgradcam", "XGrad-CAM", _certain(xgradcam), "1",
            "Fu et al., Axiom-based Grad-CAM, BMVC 2020", edition="before the final ReLU",
        ),
        _row(
            "eigencam", "Eigen-CAM", lambda a, _: eigencam(a), "1",
            "Muhammad & Yeasin, Eigen-CAM, IJCNN 2020", signed=False, edition="uncentred (paper), sum made positive",
            needs=("activations",), class_specific=False,
        ),
    )
}  # fmt: skip
"""Every method by name. `signed` False: never negative on non-negative activations (a ReLU layer)."""
