"""What the environment decides: where work runs, where rates are kept, and that nothing phones home."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from schemas.run import PoolSettings

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A fresh SQLite takes its migrations: 14 s were measured, the default allows 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}
"""Set before Prefect or Ray is imported; a value the user set stays."""

REPORTED_PACKAGES = ("gigacam", "torch", "monai", "zarr", "numpy", "openslide-python", "ray", "prefect")


def quiet_environment() -> None:
    """Turn analytics and usage statistics off for this process and its children."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def resolve_pool(asked: PoolSettings, images: int) -> tuple[PoolSettings, str]:
    """Settle `auto`: Ray for several images or where an address is set, else serial; and say why."""
    if asked.kind != "auto":
        return asked, f"{asked.kind}, as asked"
    if images > 1:
        return asked.model_copy(update={"kind": "ray"}), f"ray, since there are {images} images"
    for name in ("RAY_ADDRESS", "PREFECT_API_URL"):
        if asked.address or os.environ.get(name):
            return asked.model_copy(update={"kind": "ray"}), f"ray, since {name} or --ray-address is set"
    return asked.model_copy(update={"kind": "serial"}), "serial, since there is one image"


def _rates_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "gigacam" / "rates.json"


def last_rate(card_digest: str, device: str) -> float | None:
    """Tiles a second a worker that this card last reached on this kind of device; None: never measured."""
    try:
        rates = json.loads(_rates_file().read_text())
    except (OSError, json.JSONDecodeError):
        return None
    rate = rates.get(f"{card_digest}:{device}")
    return float(rate) if rate else None


def keep_rate(card_digest: str, device: str, tiles_per_second: float) -> None:
    """Remember a measured rate for the next `plan`; a read-only home only costs the estimate."""
    path = _rates_file()
    try:
        rates = json.loads(path.read_text()) if path.exists() else {}
        rates[f"{card_digest}:{device}"] = round(tiles_per_second, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rates, indent=2, sort_keys=True))
    except (OSError, json.JSONDecodeError) as error:
        import logging

        logging.getLogger("gigacam").info("rate not kept in %s: %s", path, error)
