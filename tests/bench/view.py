"""What the viewer's server costs: first paint, tile latency, memory. `python -m tests.bench.view`.

A procedural slide of 100,000 x 80,000 px with a full heatmap, whose blocks are written from a closed form; the viewer in a
process of its own (`gigacam view`), the clients in this one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from schemas.heatmap import Coverage, HeatmapSpec
from schemas.run import HeatmapInfo
from tests.browser.conftest import FLAGS, chromium
from tests.test_workers.made_heatmaps import SIGNED
from tests.test_workers.store_samples import map_grid, tiles_info
from workers.readers import open_image
from workers.stitching.grid import Block, all_blocks, block_box, heatmap_grid
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore

SLIDE = "procedural:slide?width=100000&height=80000&seed=1&tissue=0.5"
DOWNSAMPLE = 8
VIEW = (1000, 1600)
"""Of the browser's window, px."""


def waves(level: int, box: NDArray[np.int64]) -> NDArray[np.float32]:
    """A closed form over the level-0 px of a block: smooth, signed, with detail down to a heatmap px."""
    step = DOWNSAMPLE * 2**level
    y, x = ((np.arange(a, b) + 0.5) * step for a, b in zip(box[0], box[1], strict=True))
    smooth = np.sin(y / 3000)[:, None] * np.cos(x / 5000)
    fine = 0.1 * np.sin(y / 40)[:, None] * np.sin(x / 55)
    return np.asarray(smooth + fine, np.float32)


def make(out: Path) -> Path:
    """The run: every block evaluated."""
    meta = open_image(SLIDE).meta
    grid = heatmap_grid(meta.shape_l0, DOWNSAMPLE)
    assert meta.spacing is not None
    info = HeatmapInfo(
        run_id="1" * 64, tiles_id="2" * 64, spec=HeatmapSpec(), grid=grid, channels=(SIGNED,),
        spacing=meta.spacing, spacing_unit="um",
    )  # fmt: skip
    folder = out / meta.image_id()
    store = HeatmapStore.create(folder / "heatmap.ome.zarr", info)
    for level in range(len(grid.levels)):
        for block in all_blocks(grid, level):
            values = _block(store, level, block)
            store.write_block(
                level, block, np.full(values.shape, Coverage.EVALUATED, np.uint8), [values],
                [values] if level else (),
            )  # fmt: skip
    store.publish([(-1.1, 1.1)], [(-1.1, 1.1)])
    boxes = np.array([[[0, 0], [224, 224]]])
    tiles = tiles_info(boxes, meta.shape_l0, map_grid((224, 224), (7, 7)), methods=("hirescam",))
    spec = tiles.spec.model_copy(update={"identity": meta.identity})
    TilesStore.create(folder / "tiles.zarr", tiles.model_copy(update={"image": meta, "spec": spec}), boxes)
    return folder


def _block(store: HeatmapStore, level: int, block: Block) -> NDArray[np.float32]:
    return waves(level, block_box(store.grid, level, block))


@contextmanager
def viewer(out: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`gigacam view` in a process: its port, and itself."""
    command = [sys.executable, "-m", "flows.cli", "view", str(out), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found is not None
        try:
            yield int(found[1]), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


class Client:
    """One browser connection, kept alive."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def get(self, path: str) -> tuple[float, bytes]:
        """Seconds, and what came."""
        began = time.perf_counter()
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, (path, response.status, body[:200])
        return time.perf_counter() - began, body


def viewport(image_id: str, level: int, y: int, x: int, levels: int) -> list[str]:
    """Slide and heat tiles of a window whose top left is px (y, x) of a Deep Zoom level."""
    paths = [
        f"/slide/{image_id}/{level}/{c}_{r}.jpg"
        for r in range(y // 254, (y + VIEW[0]) // 254 + 1)
        for c in range(x // 254, (x + VIEW[1]) // 254 + 1)
    ]
    step = 2 ** (levels - 1 - level)
    heat = max(0, (step // DOWNSAMPLE).bit_length() - 1)
    scale = step / (DOWNSAMPLE * 2**heat)
    paths += [
        f"/heat/{image_id}/0/0/mean/{heat}/{r}_{c}.bin"
        for r in range(int(y * scale) // 512, int((y + VIEW[0]) * scale) // 512 + 1)
        for c in range(int(x * scale) // 512, int((x + VIEW[1]) * scale) // 512 + 1)
    ]
    return paths


def cpu(process: psutil.Process) -> float:
    """Seconds of CPU that the server has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def first_paint(port: int, image_id: str) -> tuple[int, float]:
    """How many tiles, and seconds from nothing to all that a browser needs to draw the whole slide under heat, six connections at a time."""
    began = time.perf_counter()
    one = Client(port)
    one.get("/api/images")
    document = json.loads(one.get(f"/api/images/{image_id}")[1])
    levels = document["source"]["deepzoom"]["levels"]
    height, width = document["source"]["shape_l0"]
    level = next(n for n in range(levels) if width / 2 ** (levels - 1 - n) >= VIEW[1])
    step = 2 ** (levels - 1 - level)
    paths = [
        f"/slide/{image_id}/{level}/{c}_{r}.jpg"
        for r in range(-(-height // step // 254))
        for c in range(-(-width // step // 254))
    ]
    heat = len(document["runs"][0]["grid"]["levels"]) - 1
    while heat and DOWNSAMPLE * 2**heat > step:
        heat -= 1
    shape = document["runs"][0]["grid"]["levels"][heat]
    paths += [
        f"/heat/{image_id}/0/0/mean/{heat}/{r}_{c}.bin"
        for r in range(-(-shape[0] // 512))
        for c in range(-(-shape[1] // 512))
    ]
    waiting = iter(paths)
    lock = threading.Lock()

    def fetch() -> None:
        client = Client(port)
        while True:
            with lock:
                path = next(waiting, None)
            if path is None:
                return
            client.get(path)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(paths), time.perf_counter() - began


def steady(
    port: int, paths: list[str], clients: int, rate: float, seconds: float, *, once: bool = False
) -> list[float]:
    """Latencies of clients that ask `rate` times a second each, counted from when a request was due; `once`: no path twice."""
    taken: list[float] = []

    def ask(which: int) -> None:
        client, mine = Client(port), []
        began = time.perf_counter() + which / clients / rate
        own = paths[which::clients]
        count = int(rate * seconds)
        for i in range(min(count, len(own)) if once else count):
            due = began + i / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            client.get(own[i % len(own)])
            mine.append(time.perf_counter() - due)
        taken.extend(mine)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def wander(port: int, image_id: str, levels: int, requests: int, seed: int) -> None:
    """Four clients ask for tiles at random places: three of the slide to one of heat."""

    def ask(which: int) -> None:
        client, rng = Client(port), np.random.default_rng((seed, which))
        for i in range(requests // 4):
            level, heat = int(rng.integers(9, levels)), int(rng.integers(0, 5))
            step, size = (DOWNSAMPLE * 2**heat, 512) if i % 4 == 0 else (2 ** (levels - 1 - level), 254)
            y, x = (int(rng.integers(0, -(-n // step // size) or 1)) for n in (80_000, 100_000))
            heat_path = f"/heat/{image_id}/0/0/mean/{heat}/{y}_{x}.bin"
            client.get(heat_path if i % 4 == 0 else f"/slide/{image_id}/{level}/{x}_{y}.jpg")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


PAINTED = """
window.paint = {};
const look = () => {
    const page = window.gigacam;
    if (page) {
        const slide = page.views[0].viewer.world.getItemAt(0)?._lastDrawn.length > 0;
        if (slide && page.tiles.tiles.size > 0) window.paint.first ??= performance.now();
        if (window.paint.first && page.settled()) window.paint.all = performance.now();
    }
    if (!window.paint.all) requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
"""Notes in the page when the slide is first seen under heat, and when no tile is missing any more."""


def paint(out: Path, image_id: str, rounds: int) -> None:
    """Milliseconds in a headless Chromium from the address to the slide under its heat; the server is new each time."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        for _ in range(rounds):
            with viewer(out) as (port, _process):
                context = browser.new_context(viewport={"width": VIEW[1], "height": VIEW[0]})
                page = context.new_page()
                page.add_init_script(PAINTED)
                page.goto(f"http://127.0.0.1:{port}/image/{image_id}")
                page.wait_for_function("() => window.paint.all", timeout=120_000)
                found = page.evaluate("window.paint")
                print(
                    f"in Chromium: slide under heat after {found['first']:.0f} ms, all tiles after {found['all']:.0f} ms",
                    flush=True,
                )
                context.close()
        browser.close()


def told(name: str, seconds: list[float]) -> None:
    cuts = statistics.quantiles(seconds, n=100)
    print(
        f"{name}: p50 {1e3 * cuts[49]:.1f} ms, p95 {1e3 * cuts[94]:.1f} ms, most {1e3 * max(seconds):.0f} ms "
        f"({len(seconds)} requests)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--paint", type=int, default=5, help="rounds of the first paint in a browser")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        folder = make(Path(scratch))
        print(f"made the heatmap in {time.perf_counter() - began:.1f} s", flush=True)
        image_id, levels = folder.name, 18
        paint(Path(scratch), image_id, asked.paint)
        with viewer(Path(scratch)) as (port, process):
            for what in ("server just started", "again"):
                spent = cpu(process)
                tiles, seconds = first_paint(port, image_id)
                print(
                    f"first paint, {what}: {tiles} tiles in {seconds:.2f} s, {cpu(process) - spent:.2f} s of them server CPU",
                    flush=True,
                )
            places = [(level, 900 * i, 1300 * i) for level in (13, 14, 15, 16, 17) for i in (0, 1, 2)]
            paths = list(dict.fromkeys(p for place in places for p in viewport(image_id, *place, levels)))
            cold = steady(port, paths, 8, 4, asked.seconds, once=True)
            told("8 clients at 4 requests/s, places not seen before", cold)
            client = Client(port)
            for path in paths:
                client.get(path)
            told("8 clients at 4 requests/s, warm", steady(port, paths, 8, 4, asked.seconds))
            wander(port, image_id, levels, asked.requests, 0)  # until what is remembered is full
            spent, memory = cpu(process), [process.memory_info().rss]
            for part in range(1, 6):
                wander(port, image_id, levels, asked.requests // 5, part)
                memory.append(process.memory_info().rss)
            shown = ", ".join(f"{rss / 2**20:.0f}" for rss in memory)
            spent = (cpu(process) - spent) / asked.requests
            print(
                f"resident MiB, caches full, before and during {asked.requests} requests of random tiles: {shown}"
            )
            print(
                f"server CPU a random tile: {1e3 * spent:.1f} ms; load of the machine {psutil.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()
