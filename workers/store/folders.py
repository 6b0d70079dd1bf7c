"""Store folders as whole things: made complete or not at all, recognised by their ledger, moved aside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from schemas.errors import StoreError


def read_ledger(path: Path, key: str) -> dict[str, Any] | None:
    """`attributes.gigacam` of the store at `path`; None where there is nothing, or an empty folder.

    Parameters
    ----------
    path
        Folder of a Zarr group.
    key
        Field that only this kind of store has.

    Raises
    ------
    StoreError
        Something else lies there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        ledger = json.loads((path / "zarr.json").read_text())["attributes"]["gigacam"]
        if key not in ledger:
            raise KeyError(key)
    except (OSError, ValueError, LookupError, TypeError) as error:
        msg = (
            f"{path}: exists and carries no gigacam ledger with {key!r} ({type(error).__name__}: {error}); "
            "it is left alone: choose another output folder, or remove it yourself"
        )
        raise StoreError(msg) from error
    return dict(ledger)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A draft beside `path` that becomes `path` when the block ends: a half-made store is never seen as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.new-*"):
        shutil.rmtree(leftover)
    draft = path.parent / f".{path.name}.new-{uuid4().hex[:8]}"
    draft.mkdir()
    try:
        yield draft
        try:
            os.rename(draft, path)
        except OSError as error:
            msg = f"{path}: appeared while it was being made ({error}); another run writes there: run one at a time"
            raise StoreError(msg) from error
    finally:
        # A write in flight may outrun this; what is left is swept by the next run, and what stopped us must be seen.
        shutil.rmtree(draft, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """Rename a store to the first free `<name>.old-N`; the caller has read its ledger."""
    n = 1
    while (aside := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    os.rename(path, aside)
    return aside


def remove(path: Path) -> None:
    """Delete a store whose ledger the caller has read; a kill in between leaves no half store at `path`."""
    doomed = path.parent / f".{path.name}.new-{uuid4().hex[:8]}"
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sweep_partials(path: Path) -> None:
    """Delete what a killed writer left: Zarr writes `<chunk>.<hex>.partial`, then renames."""
    for leftover in path.rglob("*.partial"):
        leftover.unlink(missing_ok=True)


def written_after(path: Path, store: Path) -> bool:
    """Whether a file made from a store is there and still about it: one that is older tells of an earlier state.

    Where the store is gone, there is nothing else it could be about.
    """
    try:
        written = path.stat().st_mtime_ns
    except OSError:
        return False
    try:
        return (store / "zarr.json").stat().st_mtime_ns <= written
    except OSError:
        return True
