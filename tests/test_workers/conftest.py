"""What the tests of the workers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_workers.finished_runs import finished_slide


@pytest.fixture(scope="session")
def slide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one slide with planted px, to be exported from; see `finished_runs`."""
    return finished_slide(tmp_path_factory.mktemp("out") / "slide-1a2b3c4d")
