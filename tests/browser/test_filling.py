"""A run that is still being computed fills in on the open page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from tests.browser.conftest import Visit
from tests.browser.runs import write_run
from tests.test_workers.viewer_runs import served
from workers.stitching import grid as grids
from workers.store.heatmap import HeatmapStore

SLIDE = "procedural:slide?width=1000&height=600&seed=1&tissue=0.5"
VALUES = np.linspace(0, 1, 150 * 250, dtype=np.float32).reshape(1, 150, 250)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with patch.dict(grids.CHUNK, {2: 64}), patch.dict(grids.SHARD, {2: 128}):
        yield tmp_path


def test_an_open_page_fills_in(visit: Visit, out: Path) -> None:
    image_id = write_run(out, SLIDE, 4, VALUES, finished=False)
    store = HeatmapStore.open(out / image_id / "heatmap.ome.zarr", "r+")
    store.clear_blocks(np.array([[[520, 900], [600, 1000]]]))  # the last block of level 0, and those above
    with served(out) as server:
        visit.root = f"http://127.0.0.1:{server.port}"
        page = visit.open(f"image/{image_id}")
        page.wait_for_function("() => window.gigacam")
        visit.settle()
        assert page.locator("#status").inner_text() == "computing"
        assert "% of the heatmap written" in page.locator("#progress").inner_text()
        assert "not computed yet" in (page.locator(".legend").get_attribute("aria-label") or "")
        at = "(y, x) => gigacam.views[0].layer.at(y, x)"
        page.evaluate("gigacam.views[0].setView([500, 600, 1])")
        visit.settle()
        found = page.evaluate(f"({at})(590, 990)")
        assert found["code"] == 0
        done = page.evaluate(f"({at})(590, 300)")
        assert done["value"] == VALUES[0, 147, 75]

        before = len(visit.requests)
        write_run(out, SLIDE, 4, VALUES)
        page.wait_for_function("() => document.querySelector('#status').textContent === 'complete'")
        visit.settle()
        found = page.evaluate(f"({at})(590, 990)")
        assert (found["code"], found["value"], found["level"]) == (1, VALUES[0, 147, 247], 0)
        fetched = [url.rpartition("/mean/")[2] for url in visit.requests[before:] if "/heat/" in url]
        assert "0/2_3.bin" in fetched
        assert "0/2_1.bin" not in fetched  # was whole
        assert "99.5 % of values" in (page.locator(".legend").get_attribute("aria-label") or "")
