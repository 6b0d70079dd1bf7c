"""The viewer on a real server: what it tells of runs, whom it answers, and what it survives."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from schemas.image import ReadOptions
from schemas.run import ImageReport
from tests.test_workers.viewer_runs import CHANNELS, SLIDE, VOLUME, Served, made_run, served, write_batch
from workers.readers import open_image
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.viewer import volumes
from workers.viewer.catalog import image_folders
from workers.viewer.sources import Found, Origin, Sources
from workers.viewer.work import ENTRY_BYTES, Answer, Remembered

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two output folders: a slide is in both, a volume in the first; a file could not be opened."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    slide = made_run(first)
    made_run(first, VOLUME, 1)
    made_run(second, channels=CHANNELS[:1])
    methods = {"hirescam": {"auroc": {"lesion against all": 0.91, "other": 0.5}}}
    (slide / "methods.json").write_text(json.dumps(methods))
    lost = ImageReport(
        image="/secret/Jane Doe/b.svs", status="failed", error="/secret/Jane Doe/b.svs: no such file"
    )
    report = ImageReport.model_validate_json((slide / "report.json").read_bytes())
    told = {"output": str(slide), "notes": (*report.notes, "see /secret/ward/x.log")}
    (slide / "report.json").write_text(report.model_copy(update=told).model_dump_json())
    write_batch(first, lost)
    (first / "private.txt").write_text("secret")
    (slide / "heatmap.ome.zarr" / "link.json").symlink_to(first / "private.txt")
    (slide / "heatmap.ome.zarr" / "out").symlink_to("/etc")
    return first, second


@pytest.fixture(scope="module")
def server(outs: tuple[Path, Path]) -> Iterator[Served]:
    with served(*outs, hosts=("127.0.0.1", "localhost", "::1")) as running:
        yield running


@pytest.fixture(scope="module")
def slide() -> str:
    return open_image(SLIDE).meta.image_id()


@pytest.fixture(scope="module")
def volume() -> str:
    return open_image(VOLUME).meta.image_id()


def test_the_gallery_merges_folders_and_tells_how_runs_ended(server: Served, slide: str, volume: str) -> None:
    found = server.get("/api/images")
    assert found.status == 200
    images = {image["id"]: image for image in found.json["images"]}
    assert [folder["run"] for folder in found.json["folders"]] == [0, 1]
    assert len(images) == 3
    assert [run["run"] for run in images[slide]["runs"]] == [0, 1]
    first = images[slide]["runs"][0]
    assert first["status"] == "gaps"
    assert first["complete"]
    assert first["progress"]["failed"] == 1
    assert first["progress"]["blocks_done"] == first["progress"]["blocks_total"] > 4
    assert first["auroc"] == {"hirescam:tumour": 0.91, "hirescam:rest": 0.91}
    assert first["auroc_of"] == "lesion against all"
    assert images[volume]["kind"] == "volume"
    assert images[volume]["source_available"]
    lost = next(image for name, image in images.items() if name.startswith("failed-"))
    assert (lost["name"], lost["kind"]) == ("b.svs", None)
    assert lost["runs"][0]["error"] == "b.svs: no such file"
    again = server.get("/api/images", If_None_Match=found.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert again.headers["cache-control"] == found.headers["cache-control"]


def test_a_page_is_told_all_it_draws(server: Served, slide: str, volume: str) -> None:
    document = server.get(f"/api/images/{slide}").json
    assert document["source"]["available"]
    assert document["source"]["shape_l0"] == [613, 803]
    assert document["source"]["deepzoom"] == {"tile": 254, "overlap": 1, "levels": 11, "format": "jpg"}
    run = document["runs"][0]
    assert run["grid"]["downsample"] == [4, 4]
    assert run["grid"]["levels"][0] == [154, 201]
    assert run["channels"][1]["target"] == "rest"
    assert run["channels"][0]["native_cell_l0"] == [16.0, 16.0]
    assert run["channels"][0]["display"][0] == -run["channels"][0]["display"][1]
    assert run["raw"] == f"raw/0/{slide}/heatmap.ome.zarr"
    assert server.get("/" + run["raw"] + "/zarr.json").status == 200
    assert server.get(f"/api/images/{volume}").json["source"]["deepzoom"] is None
    top = server.get(f"/api/images/{slide}/0/top?k=3&sign=negative").json
    assert [row["rank"] for row in top] == [1, 2, 3]
    assert 0 > top[2]["value"] >= top[1]["value"] >= top[0]["value"]


def test_nothing_says_where_sources_lie(server: Served, slide: str, outs: tuple[Path, Path]) -> None:
    for path in ("/api/images", f"/api/images/{slide}", "/raw/0/run.json", f"/raw/0/{slide}/report.json"):
        answer = server.get(path)
        assert answer.status == 200
        body = answer.body
        assert b"secret" not in body
        assert str(outs[0].parent).encode() not in body


def test_pixels_arrive(server: Served, slide: str, volume: str) -> None:
    for path, kind in (
        (f"/slide/{slide}/10/3_2.jpg", "image/jpeg"),
        (f"/heat/{slide}/0/1/peak/1/0_0.bin", "application/octet-stream"),
        (f"/api/images/{slide}/thumbnail.jpg?size=64", "image/jpeg"),
        (f"/api/images/{slide}/1/overlay.jpg?channel=0&size=64", "image/jpeg"),
        (f"/volume/{volume}/source.nii.gz", "application/gzip"),
        (f"/volume/{volume}/0/1.nii.gz", "application/gzip"),
        (f"/volume/{volume}/0/1.coverage.nii.gz", "application/gzip"),
        (f"/raw/0/{slide}/heatmap.ome.zarr/0/zarr.json", "application/json"),
    ):
        found = server.get(path)
        assert (found.status, found.headers["content-type"]) == (200, kind), path
        assert found.body
        again = server.get(path, If_None_Match=found.headers["etag"])
        assert (again.status, again.body) == (304, b""), path
        head = server.get(path, "HEAD")
        assert (head.status, head.body) == (200, b""), path
    assert server.get(f"/volume/{volume}/0/1.nii.gz").body[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404),
        ("/image/none", 404),
        ("/api/images/none", 404),
        ("/api/images/%2e%2e%2f%2e%2e/0/top", 404),
        ("/api/images/{slide}/7/top", 404),
        ("/api/images/{slide}/0/top?k=0", 400),
        ("/api/images/{slide}/0/top?k=999999999999", 400),
        ("/api/images/{slide}/0/top?channel=-1", 400),
        ("/api/images/{slide}/0/top?sign=up", 400),
        ("/api/images/{slide}/0/overlay.jpg?channel=9", 404),
        ("/api/images/{slide}/thumbnail.jpg?size=100000", 400),
        ("/api/images/{slide}/associated/label.jpg", 404),
        ("/slide/{slide}/a/0_0.jpg", 400),
        ("/slide/{slide}/3/00.jpg", 400),
        ("/slide/{slide}/3/-1_0.jpg", 400),
        ("/slide/{slide}/3/" + "9" * 5000 + "_0.jpg", 400),
        ("/slide/{slide}/99/0_0.jpg", 404),
        ("/slide/{slide}/10/9_9.jpg", 404),
        ("/slide/{volume}/3/0_0.jpg", 404),
        ("/heat/{slide}/0/0/median/0/0_0.bin", 404),
        ("/heat/{slide}/0/9/mean/0/0_0.bin", 404),
        ("/heat/{slide}/0/0/mean/0/9999_0.bin", 404),
        ("/heat/{volume}/0/0/mean/0/0_0.bin", 404),
        ("/volume/{slide}/source.nii.gz", 404),
        ("/volume/{volume}/0/7.nii.gz", 404),
        ("/raw/0/private.txt", 404),
        ("/raw/9/run.json", 404),
        ("/raw/x/run.json", 400),
        ("/raw/1/run.json", 404),
        ("/raw/0/{slide}/tiles.zarr/zarr.json", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/0/c/9/9/9", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/../report.json", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/../../private.txt", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/%2e%2e/%2e%2e/private.txt", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/%252e%252e/%252e%252e/private.txt", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/..%2f..%2fprivate.txt", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/..%5c..%5cprivate.txt", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/%00", 404),
        ("/raw/0//etc/passwd", 404),
        ("/raw/0/%2fetc%2fheatmap.ome.zarr%2f..%2fpasswd", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/link.json", 404),
        ("/raw/0/{slide}/heatmap.ome.zarr/out/passwd", 404),
        ("/raw/0/" + "a/" * 500 + "heatmap.ome.zarr/zarr.json", 404),
        ("/static/../app.py", 404),
        ("/static/%2e%2e/app.py", 404),
        ("/static/..%2fapp.py", 404),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_line(
    server: Served, slide: str, volume: str, path: str, status: int
) -> None:
    found = server.get(path.format(slide=slide, volume=volume))
    assert found.status == status
    assert len(found.json["error"]) > 8
    assert "Traceback" not in found.json["error"]
    assert found.headers["cache-control"] == "no-store"


def test_raw_files_come_in_parts(server: Served, slide: str, outs: tuple[Path, Path]) -> None:
    name = f"{slide}/heatmap.ome.zarr/0/c/0/0/0"
    whole = (outs[0] / name).read_bytes()
    path, size = f"/raw/0/{name}", len(whole)
    full = server.get(path)
    assert (full.status, full.body, full.headers["accept-ranges"]) == (200, whole, "bytes")
    for asked, start, stop in (
        ("bytes=0-99", 0, 100), ("bytes=100-", 100, size), ("bytes=-36", size - 36, size),
        ("bytes=10-99999999999999999999", 10, size), ("bytes=5-5", 5, 6),
    ):  # fmt: skip
        part = server.get(path, Range=asked)
        assert (part.status, part.body) == (206, whole[start:stop]), asked
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    head = server.get(path, "HEAD", Range="bytes=0-9")
    assert (head.status, head.headers["content-length"], head.body) == (206, "10", b"")
    for asked, status in (
        (f"bytes={size}-", 416), ("bytes=99999999999999999999-", 416), ("bytes=9-2", 400), ("chunks=1-2", 400),
        ("bytes=" + "9" * 4000 + "-", 416), ("bytes=" + "0-1," * 400, 416),
    ):  # fmt: skip
        refused = server.get(path, Range=asked)
        assert refused.status == status, asked
        assert len(refused.body) < 200
        if status == 416:
            assert refused.headers["content-range"] == f"bytes */{size}"


def test_every_answer_says_what_a_page_may_load(server: Served, slide: str) -> None:
    for path in (
        "/api/images",
        "/nothing",
        f"/slide/{slide}/0/0_0.jpg",
        f"/image/{slide}",
        "/static/tables.js",
    ):
        headers = server.get(path, Origin="https://elsewhere.example").headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control")]
        assert "set-cookie" not in headers
        assert "server" not in headers
    library = "/static/vendor/openseadragon-6.1.1/openseadragon.min.js"
    assert "immutable" in server.get(library).headers["cache-control"]
    own = server.get("/static/tables.js")
    assert own.headers["content-type"].startswith("text/javascript")
    assert own.headers["cache-control"] == "private, no-cache"
    assert server.get("/static/tables.js", If_None_Match=own.headers["etag"]).status == 304


def test_a_name_that_was_made_to_point_here_is_refused(server: Served) -> None:
    for host, status in (
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("localhost:80", 200),
        ("[::1]:8000", 200), ("LOCALHOST", 200),
    ):  # fmt: skip
        assert server.get("/api/images", Host=host).status == status, host


def test_a_token_is_asked_for_once(outs: tuple[Path, Path], slide: str) -> None:
    with served(*outs, token="s3cret") as server:
        for path in (
            "/",
            "/api/images",
            f"/slide/{slide}/0/0_0.jpg",
            "/static/tables.js",
            "/api/images?token=wrong",
        ):
            assert server.get(path).status == 401, path
        shown = server.get(f"/image/{slide}?token=s3cret&view=1")
        assert (shown.status, shown.headers["location"]) == (303, f"{slide}?view=1")
        assert server.get("/?token=s3cret").headers["location"] == "./"
        cookie = shown.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert server.get("/api/images", Cookie=cookie.partition(";")[0]).status == 200
        assert server.get("/api/images", Cookie="gigacam=s3cret; \x80=;").status == 401
        assert server.get("/api/images", Authorization="Bearer s3cret").status == 200
        assert server.get("/api/images?token=s3cret").status == 200


def test_only_the_origin_named_reads_and_only_data(outs: tuple[Path, Path], slide: str) -> None:
    friend = "https://vizarr.example"
    raw = f"/raw/0/{slide}/heatmap.ome.zarr/zarr.json"
    with served(*outs, cors=friend) as server:
        for path, origin, open_to in (
            (raw, friend, True), ("/api/images", friend, True), (raw, "https://evil.example", False),
            ("/static/tables.js", friend, False), (f"/api/images/{slide}/thumbnail.jpg", friend, False),
        ):  # fmt: skip
            headers = server.get(path, Origin=origin).headers
            assert (headers.get("access-control-allow-origin") == friend) == open_to, (path, origin)
        asked = server.get(
            raw,
            "OPTIONS",
            Origin=friend,
            Access_Control_Request_Method="GET",
            Access_Control_Request_Headers="range",
        )
        assert asked.status == 204
        assert "Range" in asked.headers["access-control-allow-headers"]
        part = server.get(raw, Origin=friend, Range="bytes=0-3")
        assert part.status == 206
        assert "Content-Range" in part.headers["access-control-expose-headers"]


def test_a_folder_that_is_computed_fills_in(tmp_path: Path) -> None:
    folder = made_run(tmp_path, finished=False)
    (folder / "heatmap.ome.zarr").rename(tmp_path / "aside")
    with served(tmp_path) as server:
        run = server.get("/api/images").json["images"][0]["runs"][0]
        assert (run["status"], run["progress"]["blocks_total"]) == ("computing", 0)
        assert 0 < run["progress"]["done"] < run["progress"]["planned"]
        assert server.get(f"/api/images/{folder.name}").json["runs"][0]["grid"] is None
        assert server.get(f"/heat/{folder.name}/0/0/mean/0/0_0.bin").status == 410
        (tmp_path / "aside").rename(folder / "heatmap.ome.zarr")
        store = HeatmapStore.open(folder / "heatmap.ome.zarr", "r+")
        store.clear_blocks(np.array([[[0, 0], [9, 9]]]))
        pending = server.get(f"/heat/{folder.name}/0/0/mean/0/0_0.bin")
        assert (pending.status, pending.headers["cache-control"]) == (200, "no-store")
        assert np.isnan(np.frombuffer(pending.body[:4096], "<f4")).all()
        written = server.get(f"/heat/{folder.name}/0/0/mean/0/2_3.bin")
        assert "etag" in written.headers
        write_batch(tmp_path, ImageReport(image=SLIDE, status="interrupted"))
        assert _status_after(server, "interrupted")["progress"]["blocks_done"] > 0


def _status_after(server: Served, status: str) -> dict[str, Any]:
    """The run once its folder was read again."""
    until = monotonic() + 5
    while True:
        run: dict[str, Any] = server.get("/api/images").json["images"][0]["runs"][0]
        if run["status"] == status:
            return run
        assert monotonic() < until, run
        sleep(0.1)


def test_a_source_that_moved_is_found_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    path = tmp_path / "in" / "boxes [HE].tiff"
    shutil.copy(DATA / "boxes_4levels.tiff", path)
    folder = made_run(tmp_path / "out", str(path), 2, options=ReadOptions(mpp_um=0.5))
    tile = f"/slide/{folder.name}/9/0_0.jpg"
    with served(tmp_path / "out") as server:
        assert server.get(tile).status == 200
    moved = path.rename(tmp_path / "other" / path.name)
    with served(tmp_path / "out") as server:
        source = server.get(f"/api/images/{folder.name}").json["source"]
        assert not source["available"]
        assert source["deepzoom"] is None
        assert "boxes [HE].tiff is not where it was" in source["reason"]
        assert server.get(tile).status == 404
        assert server.get(f"/heat/{folder.name}/0/0/mean/0/0_0.bin").status == 200
        assert server.get(f"/api/images/{folder.name}/0/overlay.jpg").status == 200
    with served(tmp_path / "out", sources=(tmp_path / "other",)) as server:
        assert server.get(tile).status == 200
    shutil.copy(DATA / "CMU-1-Small-Region.svs", moved)
    with served(tmp_path / "out", sources=(tmp_path / "other",)) as server:
        source = server.get(f"/api/images/{folder.name}").json["source"]
        assert "no longer the image that was explained" in source["reason"]
        assert server.get(tile).status == 404


def test_labels_are_shown_on_demand_only(tmp_path: Path) -> None:
    folder = made_run(tmp_path, str(DATA / "CMU-1-Small-Region.svs"), 16)
    for label, status in ((False, 404), (True, 200)):
        with served(tmp_path, label=label) as server:
            source = server.get(f"/api/images/{folder.name}").json["source"]
            assert source["has_label"] == label
            assert source["objective"] == "20"
            for name in ("label", "macro"):
                found = server.get(f"/api/images/{folder.name}/associated/{name}.jpg")
                assert (found.status, found.headers["cache-control"]) == (status, "no-store")
            assert server.get(f"/api/images/{folder.name}/associated/thumbnail.jpg").status == 404


def test_a_store_deleted_while_open_is_gone_and_the_server_lives_on(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    gone = [f"/heat/{folder.name}/0/0/mean/0/0_0.bin", f"/heat/{folder.name}/0/0/mean/1/0_0.bin",
            f"/api/images/{folder.name}/0/overlay.jpg", f"/api/images/{folder.name}/0/top"]  # fmt: skip
    with served(tmp_path) as server:
        assert [server.get(path).status for path in gone] == [200] * 4
        shutil.rmtree(folder / "heatmap.ome.zarr")
        for path in gone:
            found = server.get(path)
            assert found.status == 410
            assert "not there any more" in found.json["error"]
        assert server.get(f"/raw/0/{folder.name}/heatmap.ome.zarr/zarr.json").status == 404
        assert server.get(f"/slide/{folder.name}/3/0_0.jpg").status == 200
        shutil.rmtree(folder)
        assert _gone(server)


def _gone(server: Served) -> bool:
    until = monotonic() + 5
    while server.get("/api/images").json["images"]:
        assert monotonic() < until
        sleep(0.1)
    return True


def test_a_thousand_connections_at_once(server: Served, slide: str) -> None:
    paths = [f"/heat/{slide}/0/0/mean/0/{i % 3}_{i % 4}.bin" for i in range(500)]
    paths += [f"/slide/{slide}/10/{i % 4}_{i % 3}.jpg" for i in range(500)]

    async def ask(path: str, ready: asyncio.Event, open_: asyncio.Semaphore) -> tuple[int, bytes]:
        async with open_:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await ready.wait()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body

    async def all_at_once() -> list[tuple[int, bytes]]:
        ready, open_ = asyncio.Event(), asyncio.Semaphore(100)
        tasks = [asyncio.create_task(ask(path, ready, open_)) for path in paths]
        await asyncio.sleep(0.5)
        ready.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(all_at_once())
    counts = Counter(status for status, _ in answers)
    assert set(counts) <= {200, 503}
    assert counts[200] > 300
    for status, body in answers:
        if status == 503 and body.startswith(b"{"):
            assert b"try again" in body
    assert server.get(paths[0]).status == 200


def test_half_requests_and_noise_leave_the_server_as_it_was(server: Served) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET /api", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
                  b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(noise)
    assert server.get("/api/images", "POST").status == 405
    assert server.get("/api/images").status == 200


def test_what_is_remembered_is_bounded_in_bytes() -> None:
    kept = Remembered(3 * (30 + ENTRY_BYTES))
    for i in range(50):
        kept.keep(i, Answer(b"x" * 30, "t", '"e"'))
        kept.get(0)
    assert kept.held_bytes == 3 * (30 + ENTRY_BYTES)
    assert kept.get(0) is not None
    assert kept.get(48) is not None
    assert kept.get(1) is None
    kept.keep("large", Answer(b"x" * 4 * ENTRY_BYTES, "t", '"e"'))
    assert kept.get("large") is None


def test_a_run_that_hides_names_hides_them_here(tmp_path: Path) -> None:
    folder = made_run(tmp_path, str(DATA / "boxes_4levels.tiff"), 2, options=ReadOptions(mpp_um=0.5))
    hidden = folder.rename(folder.with_name(folder.name[-8:])).name
    with served(tmp_path) as server:
        for path in ("/api/images", f"/api/images/{hidden}", f"/raw/0/{hidden}/report.json"):
            found = server.get(path)
            assert found.status == 200
            assert b"boxes" not in found.body
        assert server.get("/api/images").json["images"][0]["name"] == hidden
        assert server.get(f"/slide/{hidden}/3/0_0.jpg").status == 200


def test_who_leaves_in_the_middle_of_a_volume_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = made_run(tmp_path, "procedural:volume?shape=48,160,160&seed=2", 8)
    with served(tmp_path, threads=2) as server:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                path = f"/volume/{folder.name}/source.nii.gz"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert connection.recv(64).split()[1] in (b"200", b"503")
        until = monotonic() + 10
        while server.get(f"/volume/{folder.name}/0/0.nii.gz").status != 200:
            assert monotonic() < until
            sleep(0.1)


def test_volumes_are_sent_a_few_at_a_time_however_many_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/volume/{made_run(tmp_path, VOLUME, 1).name}/source.nii.gz"
    find, end = Sources.find, Event()

    def slow_find(sources: Sources, origin: Origin) -> Found:
        sleep(0.1)
        return find(sources, origin)

    def endless(_: Reader) -> Iterator[bytes]:
        while not end.wait(0.01):
            yield b"x"

    with served(tmp_path, threads=2) as server, ThreadPoolExecutor(6) as visitors:
        assert server.get("/api/images").status == 200
        monkeypatch.setattr(Sources, "find", slow_find)
        monkeypatch.setattr(volumes, "source_nifti", endless)
        asked = [visitors.submit(server.get, path) for _ in range(6)]
        until = monotonic() + 5
        while sum(one.done() for one in asked) < 4 and monotonic() < until:
            sleep(0.01)
        end.set()
        assert sorted(one.result().status for one in asked) == [200, 200, 503, 503, 503, 503]
        monkeypatch.undo()
        assert server.get(path).status == 200
        refused = Found(reason="gone")
        monkeypatch.setattr(Sources, "find", lambda *_: refused)
        assert [server.get(path).status for _ in range(3)] == [404] * 3


def test_one_bad_folder_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, old = made_run(tmp_path), made_run(tmp_path, VOLUME, 1)
    shutil.rmtree(old / "tiles.zarr")
    report = json.loads((old / "report.json").read_text())
    (old / "report.json").write_text(json.dumps(report | {"provenance": {"image": {"uri": "/old/b.nii"}}}))
    with served(tmp_path) as server:
        found = {image["id"]: image["runs"][0] for image in server.get("/api/images").json["images"]}
        assert found[sound.name]["status"] == "gaps"
        assert found[old.name]["status"] == "failed"
        assert "report.json is of another version of gigacam" in found[old.name]["error"]
        assert server.get(f"/api/images/{old.name}").status == 200

    # What Python before 3.14 does where a folder may not be looked into; root may look into all.
    exists = Path.exists

    def checked(path: Path, **how: bool) -> bool:
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **how)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(Path, "exists", checked)
    assert image_folders(tmp_path) == sorted((sound, old))
    assert not Sources().find(Origin("/locked/a.svs", "a.svs", "0" * 64, ReadOptions())).meta


def test_an_image_explained_under_two_ids_has_ids_that_are_addresses(tmp_path: Path) -> None:
    outs = tmp_path / "first", tmp_path / "second"
    for out in outs:
        folder = made_run(out)
        shutil.copytree(folder, out / folder.name[-8:])
    with served(*outs) as server:
        ids = [image["id"] for image in server.get("/api/images").json["images"]]
        assert len(ids) == 3
        for name in ids:
            assert re.fullmatch(r"[\w.~-]+", name), name
            assert server.get(f"/api/images/{name}").json["id"] == name
