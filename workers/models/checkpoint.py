"""Weights into a network: the file is the one the card means, nothing in it is executed, every key finds its place."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from schemas.errors import ModelError

_SHOWN = 10


def check_digest(path: Path, sha256: str) -> None:
    """ModelError unless the file at `path` has this sha256."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        msg = f"{path}: the weights cannot be read ({error.strerror or error}); paths in a card are relative to it"
        raise ModelError(msg) from error
    if found != sha256:
        msg = (
            f"{path}: the file is not the one that the model card means: sha256 found {found}, expected {sha256}; "
            "get the right file, or correct the card if the weights were meant to change"
        )
        raise ModelError(msg)


def load_weights(
    module: nn.Module,
    path: Path,
    sha256: str,
    *,
    adapt: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    said_by: str = "[network] name and args",
) -> None:
    """Load a state dict strictly into `module`, after checking the file's digest.

    Parameters
    ----------
    module
        The network; its parameters and buffers are overwritten.
    path
        `.safetensors`, or a `torch.save` file of a state dict (alone, or under the key `state_dict`). A prefix
        `module.` that all keys carry is removed.
    sha256
        Expected digest, hex.
    adapt
        From the file's names to the network's, where a published layout differs; what it does not know it leaves.
    said_by
        What of the card says what the network is.

    Raises
    ------
    ModelError
        Other digest, unsafe or unreadable file, missing, unexpected or misshapen entries.
    """
    check_digest(path, sha256)
    state: Mapping[str, Tensor] = _read(path)
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    state = adapt(state)
    wanted = module.state_dict()
    complaints = [
        _listed("missing", [k for k in wanted if k not in state]),
        _listed("unexpected", [k for k in state if k not in wanted]),
        _listed(
            "of another shape",
            [
                f"{k} (file {list(v.shape)}, network {list(wanted[k].shape)})"
                for k, v in state.items()
                if k in wanted and v.shape != wanted[k].shape
            ],
        ),
    ]
    if any(complaints):
        msg = (
            f"{path}: the weights do not fit {type(module).__name__}: {'; '.join(c for c in complaints if c)}. Check "
            f"{said_by} against how the weights were trained"
        )
        raise ModelError(msg)
    module.load_state_dict(dict(state), strict=True)


def load_vectors(path: Path, sha256: str, names: Sequence[str]) -> Tensor:
    """Named vectors of a file, in the order of `names`, as `(C, D)` float32.

    Raises
    ------
    ModelError
        Other digest, unreadable, a name that is not there, no vectors, other lengths, values that are not finite, a
        vector of length 0.
    """
    check_digest(path, sha256)
    found = _read(path)
    missing = [n for n in names if n not in found]
    if missing:
        msg = f"{path}: has no vector {', '.join(missing)}; it has {', '.join(sorted(found)[:_SHOWN]) or 'none'}"
        raise ModelError(msg)
    vectors = [found[n].float() for n in names]
    shapes = sorted({tuple(v.shape) for v in vectors})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        msg = f"{path}: the reference vectors have shapes {shapes}; expected one axis, of one length"
        raise ModelError(msg)
    for name, vector in zip(names, vectors, strict=True):
        if not 0 < float(vector.norm()) < float("inf"):
            msg = f"{path}: vector {name!r} has length {float(vector.norm()):g}; nothing can be compared with it"
            raise ModelError(msg)
    return torch.stack(vectors)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            msg = f"{path}: not a readable safetensors file: {error}"
            raise ModelError(msg) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        msg = (
            f"{path}: cannot be loaded as plain weights ({reason}). Pickles that hold anything but tensors can run code "
            "and are refused; save the state_dict alone, best as safetensors"
        )
        raise ModelError(msg) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        msg = f"{path}: holds {type(found).__name__}; expected a state dict (names to tensors)"
        raise ModelError(msg)
    return found


def _listed(what: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{more}"
