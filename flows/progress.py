"""What is told while a run goes on: one small event, and who listens."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID


@dataclass(frozen=True)
class Event:
    """How far one image is in one stage."""

    image: str
    stage: str
    """probe, plan, collect, solve, explain, stitch, downsample, publish, export, or the final status."""
    done: int = 0
    total: int = 0
    failed: int = 0
    tiles_per_second: float = 0.0
    message: str = ""


LISTENER: ContextVar[Callable[[Event], None] | None] = ContextVar("listener", default=None)
"""Who else is told when a flow runs in this process: a flow's parameters are recorded, so it is none of them."""


class Listener(Protocol):
    """Told of every event, from any thread."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Stop drawing."""
        ...


class Lines:
    """Plain lines, one a stage and one every few seconds; for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0, as_json: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._json = as_json
        self._said: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        with self._lock:
            stage, when = self._said.get(event.image, ("", 0.0))
            finished = event.total > 0 and event.done >= event.total
            if event.stage == stage and now - when < self._every_s and not event.message and not finished:
                return
            self._said[event.image] = (event.stage, now)
            print(json.dumps(asdict(event)) if self._json else _line(event), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is drawn that would need an end."""


class Bars:
    """Progress bars on a terminal: tiles, tiles/s, time left, failed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[extra]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        extra = f"{event.tiles_per_second:.1f} tiles/s" if event.tiles_per_second else ""
        if event.failed:
            extra += f"  {event.failed} failed"
        with self._lock:
            task = self._tasks.get(event.image)
            if task is None:
                task = self._progress.add_task(event.image, total=event.total or None, extra="")
                self._tasks[event.image] = task
            self._progress.update(
                task,
                description=f"{event.image}  {event.stage}",
                # A stage that counts nothing (None) leaves the bar where the last one ended.
                completed=event.done if event.total else None,
                total=event.total or None,
                extra=extra,
            )
            if event.message:
                self._progress.console.print(f"{event.image}: {event.message}", markup=False)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        self._progress.stop()


def listener(as_json: bool = False) -> Listener:
    """Bars on a terminal, plain lines when piped, JSON lines for machines."""
    if as_json:
        return Lines(as_json=True)
    return Bars() if sys.stderr.isatty() else Lines()


def throttled(tell: Callable[[Event], None], every_s: float) -> Callable[[Event], None]:
    """`tell` at most every `every_s` an image, except when a stage begins or ends."""
    last: dict[tuple[str, str], float] = {}
    lock = threading.Lock()

    def forward(event: Event) -> None:
        now = time.monotonic()
        key = (event.image, event.stage)
        with lock:
            finished = event.total > 0 and event.done >= event.total
            if key in last and now - last[key] < every_s and not finished:
                return
            last[key] = now
        tell(event)

    return forward


def _line(event: Event) -> str:
    parts = [f"{event.image}: {event.stage}"]
    if event.total:
        parts.append(f"{event.done}/{event.total}")
    if event.tiles_per_second:
        left = (event.total - event.done) / event.tiles_per_second
        parts.append(f"{event.tiles_per_second:.1f} tiles/s, {left:.0f} s left")
    if event.failed:
        parts.append(f"{event.failed} failed")
    if event.message:
        parts.append(event.message)
    return "  ".join(parts)
