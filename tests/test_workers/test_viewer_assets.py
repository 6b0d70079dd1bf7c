"""The viewer's pages as files: libraries are those that are pinned, colours are those of the figures."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "workers" / "viewer" / "static"


def test_the_libraries_are_those_that_are_pinned() -> None:
    command = [sys.executable, "deploy/vendor_viewer.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
    for folder in (STATIC / "vendor").iterdir():
        assert "Redistribution" in (folder / "LICENSE.txt").read_text()


def test_the_colour_tables_are_those_of_the_figures() -> None:
    tables = runpy.run_path(str(ROOT / "deploy" / "colour_tables.py"))
    assert tables["TARGET"].read_text(encoding="utf-8") == tables["source"]()


def test_pages_name_only_what_is_there_and_nothing_elsewhere() -> None:
    pages = [*STATIC.glob("*.html"), *STATIC.glob("*.js"), *STATIC.glob("*.css")]
    assert len(pages) > 10
    named: set[str] = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"https?://", text), page
        assert not re.search(r"<[^>]+\s(style|on\w+)=", text), (
            f"{page}: the content security policy refuses it"
        )
        for name in re.findall(r'from "\./([\w.]+)"|(?:src|href)="(?:\.\./)?static/([^"]+)"', text):
            assert (STATIC / "".join(name)).is_file(), f"{page}: {name}"
            named.add("".join(name))
    assert {page.name for page in pages if page.suffix != ".html"} <= named, "no page loads the others"
