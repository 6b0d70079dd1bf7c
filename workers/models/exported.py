"""Networks that come as programs: `torch.export` files, cut in two at a node, and TorchScript pairs."""

from __future__ import annotations

import difflib
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

from schemas.errors import ModelError
from workers.cam.capture import PairNet
from workers.cam.readout import Readout

_SHOWN = 12


def load_exported(
    path: Path, layer: str, input_shape: Sequence[int], readout: Readout | None = None
) -> PairNet:
    """Load a `torch.export` program and cut it at the output of `layer`.

    Parameters
    ----------
    path
        `.pt2` file, digest already checked.
    layer
        Name of a node of the program's graph, or of a submodule of the network it was exported from.
    input_shape
        `(C_in, *S)` of the model's input; the program must take any number of them.
    readout
        What the output means; None: scores.

    Raises
    ------
    ModelError
        Unreadable file, fixed batch, exported in training mode, several inputs, no such layer.
    """
    if not zipfile.is_zipfile(path):
        msg = f"{path}: is no torch.export program (.pt2), which is a zip archive; write it with torch.export.save"
        raise ModelError(msg)
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        msg = f"{path}: cannot be read as a torch.export program (.pt2): {_first_line(error)}"
        raise ModelError(msg) from error
    graph_module = program.module()
    if not isinstance(graph_module, fx.GraphModule):
        msg = f"{path}: the program holds {type(graph_module).__name__}; expected a graph"
        raise ModelError(msg)
    _check_batch(path, graph_module, input_shape)
    _check_eval(path, graph_module.graph)
    return cut(graph_module, layer, readout)


def load_scripted_pair(trunk: Path, tail: Path, layer: str, readout: Readout | None = None) -> PairNet:
    """Load a network saved as two TorchScript files; digests already checked."""
    return PairNet(_scripted(trunk), _scripted(tail), layer, readout)


def cut(module: fx.GraphModule, layer: str, readout: Readout | None = None) -> PairNet:
    """Part a graph at the node (or submodule) `layer`.

    What depends on the node is the tail; all else is the trunk, and what the tail needs of it besides the node's
    value (skip connections round the layer) is carried over as constants.
    """
    nodes = list(module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        msg = f"the program takes {len(inputs)} inputs ({', '.join(n.name for n in inputs)}); expected the tiles alone"
        raise ModelError(msg)
    target = _find(nodes, layer)
    (output,) = (n for n in nodes if n.op == "output")
    below = {target}
    for node in nodes:
        if below.intersection(node.all_input_nodes):
            below.add(node)
    result = output.args[0]
    while isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, fx.Node) or result not in below:
        msg = f"the scores do not depend on layer {layer!r}; name a layer on the way from input to scores"
        raise ModelError(msg)
    tail = [n for n in nodes if n in below and n is not target and n.op != "output"]
    needed = dict.fromkeys(m for n in tail for m in n.all_input_nodes if m not in below)
    constants = [m for m in needed if m.op == "get_attr"]
    carried = [m for m in needed if m.op != "get_attr"]
    above = [n for n in nodes if n not in below or n is target]
    return PairNet(
        fx.GraphModule(module, _graph(_ancestors(above, [target, *carried]), inputs, [target, *carried])),
        fx.GraphModule(module, _graph([*constants, *tail], [target, *carried], [result])),
        layer,
        readout,
    )


def _graph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """A graph of its own with these nodes."""
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda m: copies[m])
    values = tuple(copies[n] for n in outputs)
    graph.output(values if len(values) > 1 else values[0])
    return graph


def _ancestors(nodes: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `nodes`, in order, that `wanted` depend on."""
    keep = set(wanted)
    for node in reversed(nodes):
        if node in keep:
            keep.update(node.all_input_nodes)
    return [n for n in nodes if n in keep]


def _find(nodes: Sequence[fx.Node], layer: str) -> fx.Node:
    values = [n for n in nodes if n.op == "call_function"]
    for node in values:
        if node.name == layer:
            return node
    inside = [n for n in values if layer in _modules(n)]
    if inside:
        return inside[-1]
    names = [n.name for n in values]
    modules = list(dict.fromkeys(m for n in values for m in _modules(n) if m))
    near = difflib.get_close_matches(layer, [*names, *modules], n=5, cutoff=0.4)
    msg = (
        f"the program has no node or submodule {layer!r}; near names: {', '.join(near) or 'none'}. Last nodes: "
        f"{', '.join(names[-_SHOWN:])}. Submodules: {', '.join(modules[-_SHOWN:]) or 'none recorded'}"
    )
    raise ModelError(msg)


def _modules(node: fx.Node) -> list[str]:
    """Dotted names of the submodules in which the node was recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()]


def _check_batch(path: Path, module: fx.GraphModule, input_shape: Sequence[int]) -> None:
    for batch in (2, 3):
        shape = (batch, *input_shape)
        try:
            with torch.no_grad():
                module(torch.zeros(shape))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            msg = (
                f"{path}: the program refuses input of shape {shape} ({_first_line(error)}). Export it for the card's tile "
                "with a dynamic batch axis: torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
            )
            raise ModelError(msg) from error


def _check_eval(path: Path, graph: fx.Graph) -> None:
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for i, argument in enumerate(schema.arguments):
            if argument.name in ("training", "train"):
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                if value is True:
                    msg = f"{path}: node {node.name!r} was exported in training mode; call model.eval() before export"
                    raise ModelError(msg)


def _scripted(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript; files of it live on
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        msg = f"{path}: cannot be read as TorchScript: {_first_line(error)}"
        raise ModelError(msg) from error
    assert isinstance(module, nn.Module)
    return module.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
