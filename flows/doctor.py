"""Checks of the environment, each with what was found and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

GIB = 1 << 30
DISK_FLOOR_BYTES = 5 * GIB
SHM_FLOOR_BYTES = 1 * GIB


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def checks() -> Iterator[Check]:
    """Every check, in order, as it is made; one that raises has failed."""
    for name, remedy, look in _CHECKS:
        try:
            ok, found = look()
        except Exception as error:  # a check must not end the others
            ok, found = False, f"{type(error).__name__}: {error}"
        yield Check(name, ok, found, remedy)


def _python() -> tuple[bool, str]:
    return (3, 11) <= sys.version_info[:2] < (3, 14), sys.version.split()[0]


def _packages() -> tuple[bool, str]:
    wrong = []
    for line in requires("gigacam") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need.name} absent")
            continue
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} {found}, expected {need.specifier}")
    return not wrong, "; ".join(wrong) or "as required"


def _constraints() -> tuple[bool, str]:
    path = Path(__file__).resolve().parent.parent / "deploy" / "constraints.txt"
    if not path.exists():
        return True, "no constraints file beside this installation; not compared"
    differ = []
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        try:
            found = version(pin.name)
        except PackageNotFoundError:
            continue
        if not pin.specifier.contains(found.partition("+")[0], prereleases=True):
            differ.append(f"{pin.name} {found} for {pin.specifier}")
    return not differ, "; ".join(differ) or f"as {path.name}"


def _torch() -> tuple[bool, str]:
    from workers.explainer import device_summary

    return True, device_summary()


def _openslide() -> tuple[bool, str]:
    from workers.readers.slide import library_version

    return True, library_version()


def _ray() -> tuple[bool, str]:
    from schemas.run import PoolSettings
    from workers.pool import open_pool

    pool = open_pool(PoolSettings(kind="ray", workers=1, threads=1))
    try:
        return True, pool.description
    finally:
        pool.close()


def _prefect() -> tuple[bool, str]:
    from flows.explain import heartbeat

    return heartbeat() == "ran", f"a flow ran, {os.environ.get('PREFECT_API_URL') or 'embedded server'}"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free
    return free >= DISK_FLOOR_BYTES, f"{free / GIB:.1f} GiB free in {Path.cwd()}"


def _shm() -> tuple[bool, str]:
    if not Path("/dev/shm").exists():
        return True, "no /dev/shm on this system"
    free = shutil.disk_usage("/dev/shm").free
    return free >= SHM_FLOOR_BYTES, f"{free / GIB:.1f} GiB free"


def _write() -> tuple[bool, str]:
    with tempfile.NamedTemporaryFile(dir=Path.cwd()):
        return True, str(Path.cwd())


_CHECKS: tuple[tuple[str, str, Callable[[], tuple[bool, str]]], ...] = (
    ("Python", "install Python 3.11, 3.12 or 3.13", _python),
    ("packages", "pip install -c deploy/constraints.txt .", _packages),
    ("constraints", "pip install -c deploy/constraints.txt . into a fresh environment", _constraints),
    ("torch", "pip install -c deploy/constraints.txt torch", _torch),
    ("OpenSlide", "pip install openslide-bin openslide-python", _openslide),
    ("Ray", "see the error; --pool serial works without Ray", _ray),
    ("Prefect", "see the error (fastapi must be below 0.151); --direct works without Prefect", _prefect),
    ("disk", "free some space, or work in another folder", _disk),
    ("/dev/shm", "give the container a larger shm_size: Ray's object store lives there", _shm),
    ("write access", "work in a folder you may write to", _write),
)
