"""Bounded work: so many threads, so much waiting for them, so many bytes remembered."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from starlette.exceptions import HTTPException

T = TypeVar("T")

RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Answer:
    """Bytes for a browser."""

    body: bytes
    media_type: str
    etag: str = ""
    """Of what will not change under this name; empty: of the moment, not to be kept by anybody."""


ENTRY_BYTES = 1024
"""What an answer takes besides its body, roughly: white tiles are small and many."""


class Remembered:
    """The answers used last, up to so many bytes. Of one thread: that of the event loop."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._answers: OrderedDict[Hashable, Answer] = OrderedDict()

    def get(self, key: Hashable) -> Answer | None:
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def keep(self, key: Hashable, answer: Answer) -> None:
        size = len(answer.body) + ENTRY_BYTES
        if key in self._answers or size > self.most_bytes:
            return
        self._answers[key] = answer
        self.held_bytes += size
        while self.held_bytes > self.most_bytes:
            self.held_bytes -= len(self._answers.popitem(last=False)[1].body) + ENTRY_BYTES


class Work:
    """Threads that read and decode; what is asked of them beyond a bound is refused, not queued.

    Parameters
    ----------
    threads
        Decodes at once.
    waiting
        Requests that may wait for a thread.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._most = threads + waiting
        self._inside = 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="viewer")
        self._running: dict[Hashable, asyncio.Future[Answer]] = {}

    async def run(self, make: Callable[[], T]) -> T:
        """What `make` gives, computed in a thread.

        Raises
        ------
        HTTPException
            503: too many wait already.
        """
        if self._inside >= self._most:
            raise HTTPException(503, "too many requests wait for an image; try again in a moment", RETRY)
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, make)
        finally:
            self._inside -= 1

    async def once(self, key: Hashable, make: Callable[[], Answer], remembered: Remembered) -> Answer:
        """The answer of a key: remembered, or being made for somebody else, or made now."""
        answer = remembered.get(key)
        if answer is not None:
            return answer
        running = self._running.get(key)
        if running is None:
            running = asyncio.ensure_future(self.run(make))
            self._running[key] = running

            def done(future: asyncio.Future[Answer]) -> None:
                self._running.pop(key, None)
                if not future.cancelled() and future.exception() is None and future.result().etag:
                    remembered.keep(key, future.result())

            running.add_done_callback(done)
        # One client that goes away does not take the answer from the others.
        return await asyncio.shield(running)

    def close(self) -> None:
        """Stop: what has not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
