"""A network split at one layer: activations out, gradients of the scores back to them, the model left as found.

The trunk is run with nothing that requires a gradient, so that it records no graph; the target layer's output becomes a
fresh leaf, and one `torch.autograd.grad` differentiates the tail alone. Two forms share one interface: `HookedNet` for
any eager module (a forward hook, so that skip connections round the layer stay what they are: constants), `PairNet` for
networks that come as two callables (TorchScript pairs, cut `torch.export` programs).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.readout import Readout, Scores
from workers.cam.tokens import AS_FOUND, Arrangement, TokenLayout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FOLDED = "folded_norm"
"""Attribute of a convolution that does a batch norm's work too (`workers.models.fast`): the norm's name."""


class Split(NamedTuple):
    """One pass through a split network."""

    activations: Tensor
    """`(B, K, *grid)`, a leaf that requires a gradient."""
    scores: Tensor
    """`(B, C)`, attached to the activations; of another shape where the readout has still to make scores of it."""


class SplitNet(Protocol):
    """A network split at a target layer."""

    @property
    def module(self) -> nn.Module:
        """The network, read-only."""
        ...

    @property
    def readout(self) -> Readout:
        """What its output means. `take` is done; `Batch` and `View.y` do the reading."""
        ...

    @property
    def tokens(self) -> TokenLayout:
        """What is said of how the layer's output lies."""
        ...

    def arrangement(self, x: Tensor) -> Arrangement:
        """How the layer's output lies for input like `x` `(B, C_in, *S)`."""
        ...

    def trunk(self, x: Tensor) -> Tensor:
        """Input `(B, C_in, *S)` -> activations `(B, K, *grid)`, no graph."""
        ...

    def tail(self, activations: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores `(n, C)` (as in `Split`) for other activations than those of `x`; `x` gives what by-passes the layer.

        Parameters
        ----------
        activations
            `(n, K, *grid)`.
        x
            `(B, C_in, *S)`.
        rows
            `(n,)` which tile of `x` each row of activations belongs to: the trunk then runs on the B tiles alone.
            None: n = B, a row a tile. Ask by `workers.cam.fan.tail_of_many`, which proves that this may be done.
        """
        ...

    def forward(self, x: Tensor, *, differentiable: bool = True) -> Split:
        """One pass: leaf activations and the scores that depend on them; without a graph if not `differentiable`."""
        ...

    def end_to_end(self, x: Tensor) -> Tensor:
        """Scores `(B, C)` attached to `x`, a leaf that requires a gradient: the graph spans the whole network."""
        ...

    def grad(self, y: Tensor, activations: Tensor, retain: bool = False) -> Tensor:
        """Gradient of `y.sum()` with respect to `activations`, through the tail only.

        Rows must not interact (true of every network in eval mode whose rows are tiles), so that row `b` is the
        gradient of `y[b]`.

        Parameters
        ----------
        y
            `(B,)` targets, attached to `activations`.
        activations
            The leaf of the same `Split`.
        retain
            Keep the graph for another target.
        """
        ...


class HookedNet:
    """An eager module split at the output of the submodule `layer`.

    Parameters
    ----------
    module
        The network. For each call it is put in eval mode with frozen parameters, and given back as it was.
    layer
        Dotted name as in `named_modules()`. A submodule that runs several times in a pass needs `name#i`, the
        0-based number of the call.
    readout
        What the network's output means.
    tokens
        How the layer's output lies where it is no `(B, K, *grid)`; methods see that form all the same.

    Raises
    ------
    ModelError
        No such layer.
    """

    def __init__(
        self, module: nn.Module, layer: str, readout: Readout | None = None, tokens: TokenLayout = AS_FOUND
    ) -> None:
        name, mark, call = layer.partition("#")
        if mark and not call.isdecimal():
            msg = f"layer {layer!r}: after '#' a call number is expected, such as '{name}#0'"
            raise ModelError(msg)
        self.module = module
        self.layer = layer
        self.readout: Readout = readout or Scores()
        self.tokens = tokens
        self._call = int(call) if mark else None
        self.target = submodule(module, name)

    def trunk(self, x: Tensor) -> Tensor:
        reached: list[Tensor] = []

        def stop(output: Tensor) -> NoReturn:
            reached.append(output.detach().clone())
            raise _Reached

        try:
            self._run(x, stop)
        except _Reached:
            return reached[0]
        raise AssertionError(self.layer)  # `_run` either reaches the layer or says that it cannot

    def tail(self, activations: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._run(x, lambda _: activations.clone(), rows)

    def forward(self, x: Tensor, *, differentiable: bool = True) -> Split:
        leaves: list[Tensor] = []

        def tap(output: Tensor) -> Tensor:
            # The layer may have returned its own input, and the next operation may be in place (DenseNet's ReLU):
            # the leaf shares its memory with neither side.
            leaf = output.detach().clone().requires_grad_(differentiable)
            leaves.append(leaf)
            return leaf.clone() if differentiable else output

        scores = self._run(x, tap)
        return Split(checked_activations(leaves[0], x, self.layer), scores)

    def end_to_end(self, x: Tensor) -> Tensor:
        with frozen(self.module):
            return self.readout.take(self.module(x.clone()), len(x))

    def grad(self, y: Tensor, activations: Tensor, retain: bool = False) -> Tensor:
        return _gradient(y, activations, retain, self.layer)

    def given(self, x: Tensor) -> Tensor | None:
        """What the layer is given `(B, K_in, *S_in)` for `x`, where it is a convolution: a pass of the trunk."""
        with self.inputs() as found:
            self.trunk(x)
        return found[0] if found else None

    @contextmanager
    def inputs(self) -> Iterator[list[Tensor]]:
        """Filled by a pass inside with what the layer is given, where that is a convolution; else left empty."""
        given: list[Tensor] = []
        calls = itertools.count()

        def keep(_module: nn.Module, inputs: Any) -> None:
            if next(calls) == (self._call or 0):
                given.append(inputs[0].detach().clone())  # what follows may change it in place

        handle = (
            self.target.register_forward_pre_hook(keep) if isinstance(self.target, CONVOLUTIONS) else None
        )
        try:
            yield given
        finally:
            if handle:
                handle.remove()

    @contextmanager
    def tapped(self, swap: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, a pass of the module has the layer's output replaced by `swap(output)`."""
        calls = 0
        wanted = self._call or 0

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            nonlocal calls
            this, calls = calls, calls + 1
            if self._call is None and this == 1:
                msg = (
                    f"layer {self.layer!r} runs more than once in a pass, so its name does not say which output is "
                    f"meant; write '{self.layer}#0' for the first, '{self.layer}#1' for the second"
                )
                raise ModelError(msg)
            if this != wanted:
                return output
            # A network that runs its backbone under its own `no_grad` is still differentiable after the layer.
            torch.set_grad_enabled(True)
            return swap_first(output, swap, self.layer)

        handle = self.target.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if calls <= wanted:
            msg = (
                f"layer {self.layer!r} ran {calls} times in a pass, so it is not on the way from input to scores "
                "(or is scripted, where hooks do not fire); name a layer that the forward pass uses"
            )
            raise ModelError(msg)

    def arranged(
        self, swap: Callable[[Tensor], Tensor], tile: Sequence[int], rows: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """`swap` of feature maps `(B, K, *grid)`, made to fit the layer's output as it lies for tiles of `tile` px.

        With `rows` `(n,)` the network goes on from here with those rows of its tiles.
        """

        def of_output(output: Tensor) -> Tensor:
            output = output if rows is None else output[rows]
            lies = self.tokens.fit(output.shape, tile, self.layer)
            return lies.decode(swap(lies.encode(output)), output)

        return of_output

    def arrangement(self, x: Tensor) -> Arrangement:
        """How the layer's output lies for input like `x` `(B, C_in, *S)`."""
        found: list[Arrangement] = []

        def stop(output: Tensor) -> NoReturn:
            found.append(self.tokens.fit(output.shape, x.shape[2:], self.layer))
            raise _Reached

        with suppress(_Reached), frozen(self.module), self.tapped(stop):
            self.module(plain(x))
        return found[0]

    def _run(self, x: Tensor, swap: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """Scores of `x` with the layer's output replaced by `swap(output)`."""
        with frozen(self.module), self.tapped(self.arranged(swap, x.shape[2:], rows)):
            output = self.module(plain(x))
        return self.readout.take(output, len(x) if rows is None else len(rows))


class PairNet:
    """A network given as two modules.

    Parameters
    ----------
    trunk
        `trunk(x) -> activations`, or a tuple `(activations, *carried)` with whatever else the tail needs.
    tail
        `tail(activations, *carried) -> scores`.
    layer
        Name of the place of the cut, for messages.
    readout
        What the tail's output means.
    tokens
        How the activations lie where they are no `(B, K, *grid)`, as for `HookedNet`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        tail: nn.Module,
        layer: str,
        readout: Readout | None = None,
        tokens: TokenLayout = AS_FOUND,
    ) -> None:
        self.module = nn.ModuleDict({"trunk": trunk, "tail": tail})
        self.layer = layer
        self.readout: Readout = readout or Scores()
        self.tokens = tokens

    def trunk(self, x: Tensor) -> Tensor:
        output, _ = self._head(x)
        return self._fit(output, x).encode(output)

    def tail(self, activations: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
        output, carried = self._head(x)
        if carried and rows is not None:
            output, carried = self._head(x[rows])
        elif rows is not None:
            output = output[rows]
        given = self._fit(output, x).decode(activations.clone(), output)
        with frozen(self.module):
            return self.readout.take(self.module["tail"](given, *carried), len(activations))

    def forward(self, x: Tensor, *, differentiable: bool = True) -> Split:
        output, carried = self._head(x)
        lies = self._fit(output, x)
        leaf = lies.encode(output).clone().requires_grad_(differentiable)
        checked_activations(leaf, x, self.layer)
        with frozen(self.module):
            scores = self.module["tail"](lies.decode(leaf.clone(), output), *carried)
        return Split(leaf, self.readout.take(scores, len(x)))

    def arrangement(self, x: Tensor) -> Arrangement:
        """How the activations lie for input like `x` `(B, C_in, *S)`."""
        return self._fit(self._head(x)[0], x)

    def _fit(self, output: Tensor, x: Tensor) -> Arrangement:
        return self.tokens.fit(output.shape, x.shape[2:], self.layer)

    def end_to_end(self, x: Tensor) -> Tensor:
        with frozen(self.module):
            output = self.module["trunk"](x.clone())
            activations, *carried = output if isinstance(output, tuple | list) else (output,)
            return self.readout.take(self.module["tail"](activations, *carried), len(x))

    def grad(self, y: Tensor, activations: Tensor, retain: bool = False) -> Tensor:
        return _gradient(y, activations, retain, self.layer)

    def _head(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        with frozen(self.module), torch.no_grad():
            output = self.module["trunk"](plain(x))
            first, *carried = output if isinstance(output, tuple | list) else (output,)
            return first.detach().clone(), tuple(carried)


class _Reached(Exception):
    """The trunk is done; the tail need not run."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside, every flag as found outside.

    Grad mode is on, yet nothing requires a gradient: a graph begins at the leaf and nowhere else, weight gradients are
    neither computed nor prepared for. Flags are set one by one, since `Module.train()` may be overridden and would put
    frozen submodules back in train mode. Not for concurrent calls on one module.
    """
    training = [m for m in module.modules() if m.training]
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        for m in training:
            m.training = False
        for p in trainable:
            p.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def plain(x: Tensor) -> Tensor:
    """`x` without a graph, and not an inference tensor (which could not be saved for a gradient)."""
    return x.clone() if x.is_inference() else x.detach()


def submodule(module: nn.Module, name: str) -> nn.Module:
    names = [n for n, _ in module.named_modules(remove_duplicate=False) if n]
    if name in names:
        found = module.get_submodule(name)
        if norm := getattr(found, FOLDED, ""):
            msg = f"layer {name!r} has no output of its own here, as {norm!r} is folded into it: use --precision fp32, or layer {norm!r}"
            raise ModelError(msg)
        return found
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    near = near or [n for n, _ in module.named_children()]
    msg = f"{type(module).__name__} has no layer {name!r}; near names: {', '.join(near) or 'none, it has no submodules'}"
    raise ModelError(msg)


def swap_first(output: Any, swap: Callable[[Tensor], Tensor], layer: str) -> Any:
    """`output` with its (first) tensor replaced; tuples and lists keep their type and the rest."""
    if isinstance(output, Tensor):
        return swap(output)
    if isinstance(output, tuple | list):
        for i, item in enumerate(output):
            if isinstance(item, Tensor):
                items = [*output[:i], swap(item), *output[i + 1 :]]
                # a named tuple takes its fields one by one
                return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    msg = f"layer {layer!r} gives {type(output).__name__}; expected a tensor, or a tuple or list with one"
    raise ModelError(msg)


def checked_activations(leaf: Tensor, x: Tensor, layer: str) -> Tensor:
    if leaf.ndim < 3 or len(leaf) != len(x):
        msg = (
            f"layer {layer!r} gives shape {tuple(leaf.shape)} for {len(x)} tiles; expected ({len(x)}, channels, *grid): "
            "name a layer before pooling and flattening"
        )
        raise ModelError(msg)
    return leaf


def _gradient(y: Tensor, activations: Tensor, retain: bool, layer: str) -> Tensor:
    g = None
    if y.requires_grad:
        with torch.inference_mode(False), torch.enable_grad():
            (g,) = torch.autograd.grad(y.sum(), activations, retain_graph=retain, allow_unused=True)
    if g is None:
        msg = (
            f"the scores do not depend on layer {layer!r} (its output is unused, detached, or computed in inference "
            "mode); name a layer on the way from input to scores"
        )
        raise ModelError(msg)
    return g
