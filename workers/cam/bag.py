"""A bag of tile features and the head that reads it, as bag methods see them; what is expensive is computed once.

Two kinds of head. Where the logits are a softmax-weighted sum of one number a tile and class (`BagParts` with `energies`), all that a
method asks comes from `(N, C)` numbers and passes over the features in chunks: 100,000 float16 features are never
float32 at once. Any other head sees its whole bag, one bag at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.bag_sums import Sums
from workers.cam.capture import frozen

CHUNK = 4096
"""Tiles whose features are in the head's precision at once, where the head lets the bag be read in chunks."""
AT_ONCE = 2**24
"""Numbers of features in bags that run through the head together."""
PROOF = 48
"""Tiles on which the form that a head claims is held against its forward pass."""


@dataclass(frozen=True)
class BagParts:
    """Logits as a sum over tiles: `logits[c] = sum_i attention[g(c), i] * (values[i] @ weight[c]) + bias[c]`.

    `g(c)` is c where there is an attention a class, else 0. Differentiable in the features: nothing is detached.
    """

    attention: Tensor
    """`(G, N)`, G = 1 or C."""
    values: Tensor
    """`(N, M)`."""
    weight: Tensor
    """`(C, M)`."""
    bias: Tensor
    """`(C,)`."""
    energies: Tensor | None = None
    """`(G, N)`: what `attention` is the softmax of (mean pooling: zeros). Given only where neither energies nor values of a
    tile depend on the other tiles, so that `parts` of some tiles are those rows; None: the sum holds for this bag alone."""


class BagView:
    """A bag and the targets it is explained for.

    Parameters
    ----------
    head
        `head(h (N, D)) -> logits (C,)`, in eval mode a function of the features alone. Where it has them:
        `attention(h) -> (G, N)`, `parts(h) -> BagParts`, `instances(h) -> (N, C)`.
    h
        `(N, D)` features in any precision, those and in the order that the bag was predicted from.
    targets
        `(T, C)`: target t is the scalar `logits @ targets[t]`.

    Raises
    ------
    ModelError
        An empty bag; features that the head cannot read; parts that are not those of the head's forward pass.
    """

    def __init__(self, head: nn.Module, h: Tensor, targets: Tensor) -> None:
        if h.ndim != 2 or not len(h):
            msg = f"the bag has features of shape {tuple(h.shape)}; expected (tiles, numbers a tile), at least one tile"
            raise ModelError(msg)
        like = next(head.parameters(), torch.empty(0))
        self.head: Any = head  # what it has beyond forward is its own choice
        self.h = h.detach()
        self.dtype = like.dtype
        self.device = like.device
        self.targets = targets.to(self.device, self.dtype)
        self.wide = self.targets.double()

    def __len__(self) -> int:
        return len(self.h)

    @cached_property
    def sums(self) -> Sums | None:
        """Energies and evidence of every tile, where any part of the bag is a sum over its tiles; else None."""
        return self._read(1.0, None, slopes=False)[0] if self.closed else None

    @cached_property
    def closed(self) -> bool:
        """Whether any part of the bag is a sum over its tiles."""
        return hasattr(self.head, "parts") and self._proved().energies is not None

    @cached_property
    def _here(self) -> tuple[Sums, Tensor, Tensor]:
        """Sums and their slopes at the features themselves; one reading of the bag is both."""
        found = self._read(1.0, None, slopes=True)
        self.sums = found[0]
        return found

    @cached_property
    def logits(self) -> Tensor:
        """`(C,)` float64: what the head says of the bag."""
        return self.sums.logits if self.sums is not None else self.forward(self.h)

    @cached_property
    def parts(self) -> BagParts | None:
        """Those of the whole bag, where the head has parts."""
        if not hasattr(self.head, "parts"):
            return None
        self._proved()
        with frozen(self.head), torch.no_grad():
            found: BagParts = self.head.parts(self._cast(self.h))
        return found

    @property
    def has_parts(self) -> bool:
        """Whether the logits are a sum over tiles."""
        return hasattr(self.head, "parts")

    def quietly(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Something else that the head says of its bag, without a graph."""
        with frozen(self.head), torch.no_grad():
            return f(self._cast(self.h))

    def forward(self, h: Tensor) -> Tensor:
        """Logits `(C,)` float64 of another bag `(n, D)`."""
        with frozen(self.head), torch.no_grad():
            found: Tensor = self.head(self._cast(h))
        return found.double()

    def forwards(self, bags: Iterator[Tensor]) -> Tensor:
        """Logits `(B, C)` float64 of bags `(n, D)` of one size, several at once where the head allows it."""
        done, some = [], []
        for bag in bags:
            some.append(bag)
            if len(some) * bag.numel() >= AT_ONCE:
                done.append(self._together(some))
                some = []
        if some:
            done.append(self._together(some))
        return torch.cat(done)

    def slope(self, at: float = 1.0, baseline: Tensor | None = None) -> Tensor:
        """How the targets rise with each tile's own way along the line from a baseline to its features.

        Parameters
        ----------
        at
            Where on the line all tiles are: 0 at the baseline, 1 at the features.
        baseline
            Broadcasts to `(N, D)`; None: zeros.

        Returns
        -------
        Tensor
            `(N, T)` float64: gradient of target t with respect to the features of tile i, times `h_i - baseline`.
        """
        # torch takes over a second to make ready for forward mode: of a small bag, more than it saves
        if self.closed and len(self) > CHUNK:
            here = at == 1 and baseline is None
            sums, d_energies, d_evidence = self._here if here else self._read(at, baseline, slopes=True)
            a = sums.attention
            rise = a * (d_energies * (sums.evidence - sums.mean) + d_evidence)
            return rise @ self.wide.T
        h = self._cast(self.h)
        start = torch.zeros_like(h[:1]) if baseline is None else self._cast(baseline)
        way = h - start
        x = start + at * way
        return torch.stack([(way * g).double().sum(1) for g in self._gradients(x, self.targets)], dim=1)

    def gradient(self, target: int, *, constant: bool = False) -> Tensor:
        """`(N, D)` gradient of one target with respect to the features, in the head's precision.

        Parameters
        ----------
        constant
            Hold the attention constant: what every `nn.Softmax` of the head gives. A tile of less evidence than the bag's mean, were
            it attended to more, would lower the score however much it speaks for the class; that part is left out.
        """
        if self.sums is None:
            return self._gradients(self.h, self.targets[target : target + 1], constant=constant)[0]
        sums, w = self.sums, self.wide[target]
        to_evidence = (sums.attention * w).to(self.dtype)
        turn = 0.0 if constant else sums.evidence - sums.mean
        to_energies = (sums.attention * turn * w).to(self.dtype)
        found = torch.empty(self.h.shape, dtype=self.dtype, device=self.device)
        with frozen(self.head):
            for rows, x in self._chunks(self.h):
                leaf = x.clone().requires_grad_()
                energies, evidence = self._numbers(leaf)
                y = (energies * to_energies[rows]).sum() + (evidence * to_evidence[rows]).sum()
                found[rows] = _backward(y, leaf)
        return found

    def _gradients(self, h: Tensor, targets: Tensor, *, constant: bool = False) -> list[Tensor]:
        with frozen(self.head), _attention_held(self.head) if constant else nullcontext():
            leaf = self._cast(h).clone().requires_grad_()
            logits = self.head(leaf)
            return [
                _backward(logits @ target, leaf, retain=t + 1 < len(targets))
                for t, target in enumerate(targets)
            ]

    def _read(self, at: float, baseline: Tensor | None, *, slopes: bool) -> tuple[Sums, Tensor, Tensor]:
        """Numbers of every tile at a point of the line, and (if `slopes`) their derivatives along it."""
        found: list[tuple[Tensor, ...]] = []
        start = None if baseline is None else self._cast(baseline)
        with frozen(self.head), torch.no_grad():
            for rows, way in self._chunks(self.h):
                x = way
                if start is not None:
                    origin = start[rows] if start.shape[:-1] == self.h.shape[:1] else start
                    way = way - origin
                    x = origin + at * way
                elif at != 1:
                    x = at * way
                if slopes:
                    with warnings.catch_warnings():
                        # torch scripts decompositions of its own when forward mode is first used, and warns of that
                        warnings.simplefilter("ignore", DeprecationWarning)
                        values, rises_of = torch.func.jvp(self._numbers, (x,), (way,))[:2]
                    found.append(tuple(v.double() for v in (*values, *rises_of)))
                else:
                    found.append(tuple(v.double() for v in self._numbers(x)))
            bias = self.head.parts(x[:1]).bias.double()
        energies, evidence, *rest = (torch.cat(some) for some in zip(*found, strict=True))
        rises = tuple(rest) or (energies.new_zeros(0), energies.new_zeros(0))
        return Sums(energies, evidence, bias), rises[0], rises[1]

    def _numbers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and evidence `(n, C)` each, of some tiles' features."""
        parts: BagParts = self.head.parts(x)
        assert parts.energies is not None
        evidence = parts.values @ parts.weight.T
        return parts.energies.T.expand_as(evidence), evidence

    def _chunks(self, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(h), CHUNK):
            rows = slice(first, first + CHUNK)
            yield rows, self._cast(h[rows])

    def _cast(self, h: Tensor) -> Tensor:
        return h.to(self.device, self.dtype)

    def _proved(self) -> BagParts:
        """Parts of the first tiles, held against the forward pass and against those of fewer tiles."""
        h = self._cast(self.h[:PROOF])
        with frozen(self.head), torch.no_grad():
            said: Tensor = self.head(h)
            parts: BagParts = self.head.parts(h)
            few: BagParts = self.head.parts(h[: max(1, len(h) // 2)])
            if not _sums_to(said, parts, few) and bool(said.isfinite().all()):
                msg = (
                    f"{type(self.head).__name__}: parts() is not what forward() computes; its sum over tiles must be the "
                    "logits, and energies be given only where a tile's numbers do not depend on the others"
                )
                raise ModelError(msg)
        return parts

    def _together(self, bags: list[Tensor]) -> Tensor:
        with frozen(self.head), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says where it is slow
            if len(bags) > 1 and self._batches:
                together: Tensor = torch.func.vmap(self.head)(self._cast(torch.stack(bags)))
                return together.double()
            return torch.stack([self.head(self._cast(bag)) for bag in bags]).double()

    @cached_property
    def _batches(self) -> bool:
        """Whether the head gives the same for bags run together as for each alone; tried on the first tiles."""
        few = self._cast(self.h[:PROOF])
        pair = torch.stack([few, few.flip(0)])
        try:
            both = torch.func.vmap(self.head)(pair)
        except RuntimeError:  # what the head does to a bag hangs on its values
            return False
        alone = torch.stack([self.head(bag) for bag in pair])
        return torch.allclose(both, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def bag_gradient(head: nn.Module, h: Tensor, target: Tensor) -> Tensor:
    """How one number of the bag rises with the features of each tile: what makes a tile's CAM one of the slide's logit.

    With `v_i` from here, a CAM of the encoder with target `<v_i, enc(x_i)>` (`workers.cam.targets.TileTarget`) is the
    same as one through encoder and head, by the chain rule.

    Parameters
    ----------
    head, h
        As in `BagView`.
    target
        `(C,)`: the number is `logits @ target`.

    Returns
    -------
    Tensor
        `(N, D)` in the head's precision.
    """
    return BagView(head, h, target[None]).gradient(0)


@contextmanager
def _attention_held(head: nn.Module) -> Iterator[None]:
    softmaxes = [module for module in head.modules() if isinstance(module, nn.Softmax)]
    hooks = [module.register_forward_hook(lambda _, __, found: found.detach()) for module in softmaxes]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sums_to(logits: Tensor, parts: BagParts, few: BagParts) -> bool:
    """Whether parts make up the logits, and those that claim it are each tile's own: as in a bag of fewer tiles."""
    tolerance = 1e3 * torch.finfo(logits.dtype).eps
    evidence = parts.values @ parts.weight.T
    terms = parts.attention.T * evidence
    size = terms.abs().sum(0) + parts.bias.abs()
    if bool(((terms.sum(0) + parts.bias - logits).abs() > tolerance * size).any()):
        return False
    if parts.energies is None or few.energies is None:
        return parts.energies is few.energies
    pairs = (
        (parts.energies.softmax(1), parts.attention),
        (parts.energies[:, : few.energies.shape[1]], few.energies),
        (evidence[: len(few.values)], few.values @ few.weight.T),
    )
    return all(bool(((a - b).abs() <= tolerance * b.abs().amax()).all()) for a, b in pairs)


def _backward(y: Tensor, leaf: Tensor, *, retain: bool = False) -> Tensor:
    if not y.requires_grad:
        msg = "the bag's logits do not depend on the features: the head detaches them, or runs in inference mode"
        raise ModelError(msg)
    (gradient,) = torch.autograd.grad(y, leaf, retain_graph=retain)
    return gradient
