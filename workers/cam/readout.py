"""From what a network puts out to the scores that targets are made of: classes, masks, embeddings, sequences.

A readout has two steps. `take` finds the tensor in the output and checks its shape, for every pass; it computes
nothing. `reading`, once a batch, fixes what depends on what the network said of each tile: the region it segmented, the symbols it emitted. That
choice is then a constant, also where a method runs the network again on changed input or activations: a target does
not move while it is explained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from schemas.errors import ModelError


@dataclass(frozen=True)
class Reading:
    """How the outputs of one batch's tiles become scores."""

    read: Callable[[Tensor, Tensor | None], Tensor]
    symbols: Tensor | None = None
    """`(B, C)` int64 where a score stands for something that differs from tile to tile: the symbol emitted."""

    def __call__(self, output: Tensor, rows: Tensor | None = None) -> Tensor:
        """Outputs `(n, ...)` -> scores `(n, C)`, differentiable; `rows` `(n,)` says which tile each belongs to."""
        return self.read(output, rows)


class Readout(Protocol):
    """What a network's output means."""

    def take(self, output: Any, batch: int) -> Tensor:
        """The tensor `(B, ...)` in the output of `batch` tiles; ModelError if it has another shape."""
        ...

    def reading(self, output: Tensor) -> Reading:
        """How to read the outputs of these tiles, from theirs `(B, ...)` without a graph."""
        ...


AS_IT_IS = Reading(lambda output, _: output)


@dataclass(frozen=True)
class Scores:
    """`(B, C)`: a column a score. Classes, regression, an embedding by coordinate."""

    def take(self, output: Any, batch: int) -> Tensor:
        return score_matrix(output, batch)

    def reading(self, output: Tensor) -> Reading:
        return AS_IT_IS


@dataclass(frozen=True, eq=False)
class Similarity:
    """An embedding `(B, D)`, compared with reference vectors.

    Parameters
    ----------
    references
        `(C, D)`.
    kind
        `cosine`, NaN for an embedding of length 0; or `dot`.
    """

    references: Tensor
    kind: Literal["cosine", "dot"] = "cosine"

    def take(self, output: Any, batch: int) -> Tensor:
        found = score_matrix(output, batch)
        if found.shape[1] != self.references.shape[1]:
            msg = (
                f"the network gives embeddings of {found.shape[1]} numbers, the reference vectors have "
                f"{self.references.shape[1]}; make them with this network"
            )
            raise ModelError(msg)
        return found

    def reading(self, output: Tensor) -> Reading:
        references = self.references.to(output)
        sizes = references.norm(dim=1)

        def read(out: Tensor, _: Tensor | None) -> Tensor:
            dot = out @ references.T
            # no epsilon: without a length there is no angle
            return dot if self.kind == "dot" else dot / (out.norm(dim=1, keepdim=True) * sizes)

        return Reading(read)


@dataclass(frozen=True, eq=False)
class Region:
    """A segmentation `(B, C, *S)`: score c is the sum of the logits of c over a region.

    Seg-Grad-CAM (Vinogradova, Dibrov, Myers, AAAI 2020). A sum, not a mean: HiResCAM over a linear tail then adds up to it, and a larger region weighs more. Where a tile's
    region of a class is empty the score is 0 and so is its map.

    Parameters
    ----------
    region
        `predicted`: the voxels whose largest logit is that of c. `positive`: those whose logit of c is above 0, for
        channels that are no alternatives. `tile`: all. Or a bool tensor `(*S)`, the same for every tile.
    """

    region: Literal["predicted", "positive", "tile"] | Tensor = "predicted"

    def take(self, output: Any, batch: int) -> Tensor:
        found = _first(output)
        if not isinstance(found, Tensor) or found.ndim < 3 or len(found) != batch:
            msg = f"the network gives {_shape(found)} for {batch} tiles; expected a mask ({batch}, classes, *voxels)"
            raise ModelError(msg)
        if isinstance(self.region, str):
            if self.region == "predicted" and found.shape[1] == 1:
                msg = (
                    "the network gives a mask of one channel, of which no voxel is another class: "
                    'write [output] region = "positive" (logit above 0) or "tile"'
                )
                raise ModelError(msg)
        elif self.region.shape != found.shape[2:]:
            msg = f"the region has shape {tuple(self.region.shape)}, the network's mask {tuple(found.shape[2:])}"
            raise ModelError(msg)
        return found

    def reading(self, output: Tensor) -> Reading:
        if not isinstance(self.region, str):
            inside = self.region.to(output.device, torch.bool).expand_as(output)
        elif self.region == "tile":
            return Reading(lambda out, _: out.flatten(2).sum(2))
        elif self.region == "positive":
            inside = output > 0
        else:
            classes = torch.arange(output.shape[1], device=output.device).view(-1, *[1] * (output.ndim - 2))
            inside = output.argmax(1, keepdim=True) == classes

        def read(out: Tensor, rows: Tensor | None) -> Tensor:
            chosen = inside if rows is None else inside[rows]
            return torch.where(chosen, out, 0).flatten(2).sum(2)

        return Reading(read)


@dataclass(frozen=True)
class Symbols:
    """A sequence `(B, T, V)`: score t is that of the symbol emitted at position t, the one of the largest logit.

    Parameters
    ----------
    score
        `logit`, or `log_prob`: of the symbol given what was emitted before it.
    padding
        A symbol that means nothing: positions that emit it have score 0.
    """

    score: Literal["logit", "log_prob"] = "logit"
    padding: int | None = None

    def take(self, output: Any, batch: int) -> Tensor:
        found = _first(output)
        if not isinstance(found, Tensor) or found.ndim != 3 or len(found) != batch:
            msg = f"the network gives {_shape(found)} for {batch} tiles; expected logits ({batch}, positions, symbols)"
            raise ModelError(msg)
        return found

    def reading(self, output: Tensor) -> Reading:
        emitted = output.argmax(2)
        said = emitted != (-1 if self.padding is None else self.padding)

        def read(out: Tensor, rows: Tensor | None) -> Tensor:
            symbol, counts = (emitted, said) if rows is None else (emitted[rows], said[rows])
            values = out.log_softmax(2) if self.score == "log_prob" else out
            return torch.where(counts, values.gather(2, symbol[..., None])[..., 0], 0)

        return Reading(read, emitted)


def score_matrix(output: Any, batch: int) -> Tensor:
    """The network's output as `(B, C)` scores; of a tuple or list the first item."""
    found = _first(output)
    if isinstance(found, Tensor) and found.shape == (batch,):
        found = found[:, None]
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != batch:
        msg = f"the network gives {_shape(found)} for {batch} tiles; expected scores of shape ({batch}, classes)"
        raise ModelError(msg)
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _shape(found: Any) -> str:
    return str(tuple(found.shape)) if isinstance(found, Tensor) else type(found).__name__
