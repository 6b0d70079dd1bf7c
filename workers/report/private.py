"""Reports without what may name a patient: folders go, file names stay; with hashed image ids, file names go too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from schemas.image import stem_of
from schemas.run import ImageReport

_HASHED = re.compile(r"[0-9a-f]{8}")
_FOLDERS = re.compile(r"(?<![\w./:\\-])(?:file://)?(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s:;,'\"()]+[/\\])+")
"""The folders of an absolute path inside a sentence."""


_NO_NAMES = (
    ("status",), ("prediction",), ("channels",), ("evidence",), ("bag", "classes"), ("bag", "predicted"),
    ("provenance", "versions"), ("provenance", "cells"), ("provenance", "heatmap"), ("provenance", "spec", "card"),
    ("provenance", "spec", "cam"), ("provenance", "image", "kind"), ("provenance", "image", "format"),
    ("provenance", "image", "dtype"),
)  # fmt: skip
"""What a report has of the model and of the program: no file is named there, and a file called `slide` or `2` must not change it."""


Clean = Callable[[str], str]


def cleaner(report: ImageReport, name: str) -> Clean:
    """What cuts every path in a text to its last part; where the image is not called by its file name, that goes too."""
    image = report.image.rstrip("/")
    meta = report.provenance.get("image", {})
    source = str(meta.get("uri", ""))
    whole = [p for p in (image, source) if p and not p.startswith("procedural:")]
    folders = {str(Path(p).parent) for p in (*whole, report.output) if p} - {".", "/"}
    names = {Path(path).name for path in whole} - {""}
    hidden = {*names, *(Path(n).stem for n in names), *map(stem_of, names), str(meta.get("stem", ""))}
    hidden.discard("")
    steps = [(rf"(?<![\w.-]){re.escape(f)}/", "") for f in sorted(folders, key=len, reverse=True)]
    if name != shown_name(image):
        steps += [(rf"(?<!\w){re.escape(n)}(?!\w)", name) for n in sorted(hidden, key=len, reverse=True)]

    def clean(text: str) -> str:
        for found, put in steps:
            text = re.sub(found, lambda _, put=put: put, text)  # type: ignore[misc]
        return _FOLDERS.sub("", text)

    return clean


def cleaned(value: Any, clean: Clean) -> Any:
    """A JSON value with every text in it cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {key: cleaned(v, clean) for key, v in value.items()}
    return [cleaned(v, clean) for v in value] if isinstance(value, list) else value


def without_folders(report: ImageReport, name: str) -> ImageReport:
    """The report with every path cut to its last part, and the image itself called `name`."""
    recorded = report.model_dump(mode="json")
    document = cleaned(recorded, cleaner(report, name))
    for *way, last in _NO_NAMES:
        whole, shown = recorded, document
        for key in way:
            whole, shown = whole.get(key) or {}, shown.get(key) or {}
        if last in whole:
            shown[last] = whole[last]
    return ImageReport.model_validate(document | {"image": name})


def shown_name(image: str) -> str:
    """File name of an image; a procedural one is its own name."""
    return image if image.startswith("procedural:") else Path(image.rstrip("/")).name


def names_of(images: Sequence[ImageReport]) -> list[str]:
    """What to call each image of a run.

    Where ids are hashes alone, the run was asked to keep file names out of its outputs: an image is then called by its
    id, or, where it failed before it had one, by its place.
    """
    hidden = any(_HASHED.fullmatch(image.image_id) for image in images)
    if not hidden:
        return [shown_name(image.image) for image in images]
    return [image.image_id or f"image {n} of run.json" for n, image in enumerate(images, 1)]
