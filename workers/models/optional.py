"""Networks of timm and of Hugging Face's transformers, where these are installed; nothing is ever downloaded."""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from schemas.errors import ModelError

_REMEDY = {
    "timm": "pip install 'gigacam[timm]'; timm imports torchvision, which has to be the build for this torch",
    "transformers": "pip install 'gigacam[transformers]'",
}
_NOT_READ = ("auto_map", "architectures", "torch_dtype", "dtype", "_name_or_path", "transformers_version")
"""Of a configuration: code from elsewhere, heads, the precision weights were stored in."""
_DOWNLOADS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def timm_network(name: str, args: Mapping[str, Any]) -> nn.Module:
    """`timm.create_model(name, **args)`, random weights; `num_classes = 0` in args gives embeddings.

    Raises
    ------
    ModelError
        timm is not installed or cannot be imported, an unknown name, arguments that ask for a download or are not taken.
    """
    asked = [key for key in _DOWNLOADS if args.get(key)]
    if asked or ":" in name or "/" in name:
        msg = (
            f"[network] name = {name!r}, args {', '.join(asked) or 'none'}: asks timm for weights from elsewhere, which are not "
            "checked; nothing is downloaded: write the plain name, and the weights' file in [network] weights with its sha256"
        )
        raise ModelError(msg)
    timm = _imported("timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        msg = f"[network] name = {name!r} is none of timm {timm.__version__}; near names: {', '.join(near) or 'none'}"
        raise ModelError(msg)
    try:
        network = timm.create_model(name, pretrained=False, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        msg = f"[network] timm's {name!r} cannot be built with args = {dict(args)}: {error}"
        raise ModelError(msg) from error
    assert isinstance(network, nn.Module)
    return network


def transformers_network(
    name: str, args: Mapping[str, Any], config: Path | None, *, whole: bool
) -> nn.Module:
    """A model of transformers by type, random weights; its output is a tensor.

    Parameters
    ----------
    name
        Model type (`vit`, `dinov2`, `convnext`...); may be empty where `config` says it.
    args
        Of the configuration; they win over those in the file.
    config
        `config.json` of a model, digest already checked.
    whole
        The network's own output is read, a pooled vector; else its tokens are, and the layer that pools is left out.

    Raises
    ------
    ModelError
        transformers is not installed, an unknown type, a file that is no configuration, arguments that are not taken, or a
        model without a pooled output where that is asked for.
    """
    found = _read(config) if config else {}
    kind = found.pop("model_type", name)
    if not kind or name not in ("", kind):
        msg = (
            f"[network] name = {name!r}: a model type such as 'vit' is expected{f', {config.name} says {kind!r}' if config else ''}; "
            "nothing is downloaded: for a published model give the file of its configuration in [network] config, with its "
            "sha256 in config_sha256, and its weights"
        )
        raise ModelError(msg)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = _imported("transformers")
    try:
        plain = transformers.AutoConfig.for_model(kind)
        if strange := [key for key in args if not hasattr(plain, key)]:
            msg = f"[network] {kind!r} of transformers takes no argument {', '.join(strange)}"
            raise ModelError(msg)
        known = transformers.AutoConfig.for_model(kind, **{**found, **args})
        network = transformers.AutoModel.from_config(known, attn_implementation="eager")
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code makes of its configuration
        msg = (
            f"[network] name = {kind!r} with args {dict(args)} is no model that transformers {transformers.__version__} can build "
            f"({str(error).splitlines()[0][:200]}); nothing is downloaded: name a model type such as 'vit', or give [network] config"
        )
        raise ModelError(msg) from error
    assert isinstance(network, nn.Module)
    if whole:
        network.register_forward_hook(_pooled)
    elif isinstance(getattr(network, "pooler", None), nn.Module):
        setattr(network, "pooler", None)  # what it gives is not read  # noqa: B010
    return network


def transformers_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the same model under a head: the name that it has there is taken off; the head's own entries stay."""
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    return {key.removeprefix(prefix) if prefix != "." else key: value for key, value in state.items()}


def _pooled(network: nn.Module, _inputs: Any, output: Any) -> Tensor:
    found = getattr(output, "pooler_output", None)
    if not isinstance(found, Tensor):
        msg = f"{type(network).__name__} has no pooled output; write [network] embedding = 'class' or 'mean'"
        raise ModelError(msg)
    return found.flatten(1)


def _read(config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = (
            f"{config}: cannot be read as JSON ({error}); expected the config.json of a model of transformers"
        )
        raise ModelError(msg) from error
    if not isinstance(found, dict) or "model_type" not in found:
        msg = f"{config}: says no model_type; expected the config.json of a model of transformers"
        raise ModelError(msg)
    return {key: value for key, value in found.items() if key not in _NOT_READ}


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision beside another build of torch raises the latter
        msg = f"[network] adapter = {package!r}: {package} cannot be imported here ({str(error).splitlines()[0]}): {_REMEDY[package]}"
        raise ModelError(msg) from error
