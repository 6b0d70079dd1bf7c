"""What the tests of the whole path share."""

from __future__ import annotations

import pytest

import flows.steps


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `overview.png` out: drawing it takes longer than all else on a small image."""
    monkeypatch.setattr(flows.steps, "write_overview", lambda *_: None)
