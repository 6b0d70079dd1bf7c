"""The errors users meet, as a tree.

::

    GigacamError
    ├── SpecError         the request is wrong; nothing was computed (exit 2)
    ├── SourceError       an image is unsupported, has no spacing, or cannot be read there
    ├── ModelError        a card, digest, layer or network is not what it says
    ├── StoreError        an output exists for another request, or a write is unaligned
    └── WorkerLostError   a worker died under a task (retried)

Each takes one finished message (file, what was found, what was expected, what to do) and pickles.
"""

from __future__ import annotations

from typing import ClassVar


class GigacamError(Exception):
    """Root of the tree; `retryable` says whether the same call may succeed later."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SpecError(GigacamError):
    """The request is wrong; nothing was computed."""


class SourceError(GigacamError):
    """An image is unsupported, implausible, or unreadable at the place asked for."""


class ModelError(GigacamError):
    """A model card, its weights, or a layer is not what it says."""


class StoreError(GigacamError):
    """An output store belongs to another request, or a write is not aligned to its chunks."""


class WorkerLostError(GigacamError):
    """A worker process died under a task."""

    retryable: ClassVar[bool] = True
