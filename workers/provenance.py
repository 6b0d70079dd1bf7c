"""What a result was made with, and how fast: package versions, and the rates that `plan` estimates from."""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from schemas.frozen import digest
from schemas.run import TilesSpec

log = logging.getLogger("gigacam")

REPORTED_PACKAGES = ("gigacam", "torch", "monai", "zarr", "numpy", "openslide-python", "ray", "prefect")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def rate_key(spec: TilesSpec) -> str:
    """Digest of what decides how long a tile takes."""
    cam = spec.cam.model_dump(
        mode="json", include={"methods", "targets", "layer", "bag_methods", "precision"}
    )
    return digest({"card": spec.card, "cam": cam, "tile": spec.grid.tile_px, "batch": spec.batch})


def _rates_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "gigacam" / "rates.json"


def last_rate(key: str, device: str) -> float | None:
    """Tiles a second a worker that was last reached for this `rate_key` on this kind of device; None: never measured."""
    try:
        rates = json.loads(_rates_file().read_text())
    except (OSError, json.JSONDecodeError):
        return None
    rate = rates.get(f"{key}:{device}")
    return float(rate) if rate else None


def keep_rate(key: str, device: str, tiles_per_second: float) -> None:
    """Remember a measured rate for the next `plan`; a read-only home only costs the estimate."""
    path = _rates_file()
    try:
        rates = json.loads(path.read_text()) if path.exists() else {}
        rates[f"{key}:{device}"] = round(tiles_per_second, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rates, indent=2, sort_keys=True))
    except (OSError, json.JSONDecodeError) as error:
        log.info("rate not kept in %s: %s", path, error)
