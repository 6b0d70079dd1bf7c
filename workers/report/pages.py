"""From values to pages: templates in which everything is escaped, and one stylesheet set into each page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from workers.export import words
from workers.report.facts import place, words_of

_PAGES = Environment(
    loader=PackageLoader("workers.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {"number": words.number, "count": words_of, "place": place, "zip": zip}


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page so that a reader sees the old one or the new one, never half of it."""
    text = _PAGES.get_template(template).render(intended_use=words.INTENDED_USE, **values)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
