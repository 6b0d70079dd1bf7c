"""A browser for the viewer's pages: Chromium, headless, driven over its own protocol; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.browser.runs import AFFINES, slide_run, volume_run
from tests.test_workers.viewer_runs import Served, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

WINDOW = {"width": 940, "height": 600}
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--enable-unsafe-swiftshader"]
"""As root, in a container, without a graphics card."""


def chromium() -> str | None:
    """Path of a Chromium: `GIGACAM_CHROMIUM`, or what the system has."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("GIGACAM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Closed when the last test here is done: while it runs, no other test of the process could run an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; the extra 'test' has it")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium: install one (apt-get install chromium) or name it in GIGACAM_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, str]]]:
    """The viewer over a slide and volumes with planted heat; their ids by name."""
    out, inputs = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("inputs")
    ids = {"slide": slide_run(out, inputs / "slide.tiff")}
    for name, affine in AFFINES.items():
        ids[name] = volume_run(out, inputs / f"{name}.nii.gz", affine, failed=name == "oblique")
    with served(out) as server:
        yield server, ids


class Visit:
    """A page of the viewer, all it asks for and all it complains of."""

    def __init__(self, page: Page, server: Served) -> None:
        self.page = page
        self.root = f"http://127.0.0.1:{server.port}"
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        # WebGL without a graphics card is slow, and says so
        if message.type in ("error", "warning") and "GL Driver Message" not in message.text:
            self.complaints.append(message.text)

    def open(self, path: str, hash: str = "") -> Page:
        self.page.goto(f"{self.root}/{path}{hash}")
        return self.page

    def settle(self) -> None:
        """Wait until all tiles that are wanted have come and are drawn."""
        self.page.wait_for_function("() => window.gigacam")
        settled = self.page.evaluate(
            """async () => {
                const frame = () => new Promise(requestAnimationFrame);
                for (const end = performance.now() + 30_000; performance.now() < end;) {
                    await frame().then(frame);
                    if (gigacam.settled()) return true;
                }
                return false;
            }"""
        )
        assert settled, "tiles are still to come after 30 s"

    def pixels(self, **clip: float) -> NDArray[np.int16]:
        """`(h, w, 3)` of the window, or of a part of it, as it is on the screen."""
        shot = self.page.screenshot(clip=clip or None)  # type: ignore[arg-type]
        return np.asarray(Image.open(BytesIO(shot)).convert("RGB")).astype(np.int16)

    def box(self, selector: str) -> dict[str, float]:
        box = self.page.locator(selector).first.bounding_box()
        assert box is not None
        return {side: box[side] for side in ("x", "y", "width", "height")}


@pytest.fixture(scope="package")
def context(browser: Browser) -> BrowserContext:
    """One for all tests: what one page has fetched, the next need not."""
    return browser.new_context(viewport=WINDOW, accept_downloads=True)  # type: ignore[arg-type]


@pytest.fixture
def visit(context: BrowserContext, planted: tuple[Served, dict[str, str]]) -> Iterator[Visit]:
    """A fresh page; at its end nothing may have left the host, and the browser may have had nothing to complain of."""
    visit = Visit(context.new_page(), planted[0])
    yield visit
    visit.page.close()
    elsewhere = [url for url in visit.requests if not url.startswith((visit.root, "data:", "blob:"))]
    assert not elsewhere
    assert not visit.complaints


@pytest.fixture(scope="package")
def ids(planted: tuple[Served, dict[str, str]]) -> dict[str, str]:
    return planted[1]
