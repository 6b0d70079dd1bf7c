"""What the environment decides: where work runs, where rates are kept, and that nothing phones home."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def quiet_environment() -> None:
    """Turn analytics and usage statistics off for this process and its children."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


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


def with_threads(settings: PoolSettings) -> PoolSettings:
    """Serial takes all cores; a CPU actor one thread, so that actors do not fight for cores."""
    if settings.threads is not None:
        return settings
    threads = (os.cpu_count() or 1) if settings.kind == "serial" else 1
    return settings.model_copy(update={"threads": threads})
