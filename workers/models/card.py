"""Model cards: read, checked, written, and reduced to what identifies them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import ModelError
from schemas.model import ModelCard

_PATHS = {"network": ("weights", "trunk", "tail", "config"), "output": ("references",), "bag": ("weights",)}

_LATER = ("leave_out", "config_sha256", "embedding", "embedding_layer")
"""Keys of `[network]` that came after the first results were identified."""


@dataclass(frozen=True)
class LoadedCard:
    """A card and where it lies; the paths in it are relative to `folder`."""

    card: ModelCard
    path: Path
    folder: Path


def load_card(path: str | Path) -> LoadedCard:
    """Read and check a `model.toml`.

    Raises
    ------
    ModelError
        The file is missing, is no TOML, or a key is missing, unknown or wrong: each is named with what was found.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: the model card cannot be read ({error.strerror or error}); give the path of a model.toml"
        raise ModelError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: the model card is not valid TOML: {error}"
        raise ModelError(msg) from error
    try:
        card = ModelCard.model_validate(raw)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for e in error.errors():
            # a value that fits no arm of a union is reported once an arm; the first names the form expected
            lines.setdefault(_place(raw, e["loc"]), _explained(e))
        msg = "\n".join([f"{path}: the model card is not valid:", *(f"  {k}: {v}" for k, v in lines.items())])
        raise ModelError(msg) from error
    return LoadedCard(card, path, path.parent)


def resolved(card: ModelCard) -> dict[str, Any]:
    """What identifies a card's model, ready for hashing: all of it, with digests in the place of file paths."""
    found = card.model_dump(mode="json", by_alias=True)
    for section, names in _PATHS.items():
        for name in names:
            (found.get(section) or {}).pop(name, None)
    found["cam"].pop("channels")  # names change no number
    for name in _LATER:  # unset they are what cards without them were, and are identified as these were
        if not found["network"][name]:
            del found["network"][name]
    return found


def write_card(path: str | Path, card: ModelCard) -> None:
    """Write `card` as TOML that `load_card` reads back to an equal card."""
    sections = card.model_dump(mode="json", by_alias=True, exclude_none=True)
    top = {k: v for k, v in sections.items() if not isinstance(v, dict)}
    lines = [f"{k} = {_toml(v)}" for k, v in top.items()]
    for name, section in sections.items():
        if isinstance(section, dict):
            filled = {
                k: v for k, v in section.items() if v not in ("", [], {})
            }  # what is empty is so by default
            lines += ["", f"[{name}]", *(f"{_key(k)} = {_toml(v)}" for k, v in filled.items())]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _place(raw: Any, loc: Sequence[int | str]) -> str:
    """Dotted key of an error: as far as the file has it, and the missing one."""
    parts = []
    for part in loc:
        parts.append(str(part))
        known = part in raw if isinstance(raw, dict) else isinstance(raw, list) and isinstance(part, int)
        if not known:
            # not a key of the file: missing from a table, or pydantic's name for an arm of a union
            return ".".join(parts if isinstance(raw, dict) else parts[:-1])
        raw = raw[part]
    return ".".join(parts)


def _explained(error: Mapping[str, Any]) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    match error["type"]:
        case "missing":
            return "missing; expected a value"
        case "extra_forbidden":
            return f"unknown key (found {_short(error['input'])}); remove it or correct its name"
        case "value_error":  # a rule over a whole section says what it found
            return text
    return f"found {_short(error['input'])}; {text}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    msg = (
        f"{value!r} cannot be written in a model card: TOML has strings, numbers, booleans, lists and tables"
    )
    raise ModelError(msg)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
