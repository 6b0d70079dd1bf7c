"""Networks by name: MONAI's, or an installed package's factory."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from torch import nn

from schemas.errors import ModelError


def monai_network(name: str, args: dict[str, Any]) -> nn.Module:
    """`monai.networks.nets.<name>(**args)`; ModelError for an unknown name or arguments it does not take."""
    from monai.networks import nets  # seconds to import, and needed only here

    build = getattr(nets, name, None)
    if not callable(build) or name.startswith("_"):
        known = [n for n in dir(nets) if callable(getattr(nets, n)) and not n.startswith("_")]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:10]
        msg = f"[network] name = {name!r} is none of monai.networks.nets; near names: {', '.join(near)}"
        raise ModelError(msg)
    if args.get("pretrained"):
        msg = (
            f"[network] args of {name!r} ask for pretrained weights, which are downloaded unchecked; save them to a file "
            "and name it in [network] weights with its sha256"
        )
        raise ModelError(msg)
    return _built(f"monai.networks.nets.{name}", build, args)


def factory_network(path: str, args: dict[str, Any]) -> nn.Module:
    """`package.module:function` of an installed package, called with `args`."""
    module_name, mark, function_name = path.partition(":")
    if not mark or not module_name or not function_name:
        msg = f"[network] name = {path!r}: a factory is written package.module:function"
        raise ModelError(msg)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        msg = (
            f"[network] name = {path!r}: {module_name} cannot be imported here ({error}); install its package"
        )
        raise ModelError(msg) from error
    build = getattr(module, function_name, None)
    if not callable(build):
        known = [n for n, _ in inspect.getmembers(module, callable)]
        near = difflib.get_close_matches(function_name, known, n=5, cutoff=0.4)
        msg = f"[network] name = {path!r}: {module_name} has no function {function_name!r}; near names: {', '.join(near) or 'none'}"
        raise ModelError(msg)
    return _built(path, build, args)


def _built(what: str, build: Any, args: dict[str, Any]) -> nn.Module:
    try:
        network = build(**args)
    except (TypeError, ValueError) as error:
        msg = f"{what} cannot be built with args = {args}: {error}"
        raise ModelError(msg) from error
    if not isinstance(network, nn.Module):
        msg = f"{what} gives {type(network).__name__}; expected a torch.nn.Module"
        raise ModelError(msg)
    return network
