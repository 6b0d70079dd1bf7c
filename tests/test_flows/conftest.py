"""What the tests of the whole path share."""

from __future__ import annotations

import pytest

import workers.export.overview


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `overview.png` out: drawing it takes longer than all else on a small image."""
    monkeypatch.setattr(workers.export.overview, "write_overview", lambda *_: None)
