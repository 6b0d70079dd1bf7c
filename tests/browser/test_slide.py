"""The slide page: heat lies where it belongs, colours are exact and cost no request, and everything can be reached."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from schemas.image import ReadOptions
from tests.browser.conftest import Visit
from tests.browser.runs import DOWNSAMPLE, HOT, SHAPE
from tests.test_workers.made_heatmaps import SIGNED
from tests.test_workers.viewer_runs import SLIDE, made_run, served

YELLOW = (253, 231, 37)
"""The end of viridis."""
PLAIN = "a.op=1&a.thr=0.5&a.pyr=peak"
"""Only what is hot is drawn, and hides the slide below."""


def near(picture: NDArray[np.int16], colour: tuple[int, int, int], most: int = 40) -> NDArray[np.bool_]:
    return np.asarray(np.abs(picture - colour).max(axis=-1) <= most)


def extent(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """First and one past the last row and column."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def look_at(visit: Visit, y: float, x: float, size: float) -> None:
    visit.page.evaluate("([y, x, size]) => gigacam.views[0].setView([y, x, size])", [y, x, size])
    visit.settle()


def expect_hot(visit: Visit, hot: tuple[int, int], level: int, size: float) -> None:
    """One hot px, and the slide's mark below it, are within a px of the screen where arithmetic has them."""
    step = DOWNSAMPLE * 2**level
    start = np.array([n // 2**level * step for n in hot], float)
    # Off the middle, so that an error of scale shows, too.
    centre = start + step / 2 + np.array([90.3, -120.7]) * size
    look_at(visit, float(centre[0]), float(centre[1]), size)
    assert visit.page.evaluate("gigacam.views[0].layer.level") == level
    stage = visit.box(".stage")
    middle = np.array([stage["height"], stage["width"]]) / 2
    box = np.concatenate([(start - centre) / size + middle, (start + step - centre) / size + middle])
    pad = 12
    top, left = np.floor(box[:2]) - pad
    clip = {
        "x": stage["x"] + left, "y": stage["y"] + top, "width": np.ceil(box[3] - box[1]) + 2 * pad,
        "height": np.ceil(box[2] - box[0]) + 2 * pad,
    }  # fmt: skip
    found = extent(near(visit.pixels(**clip), YELLOW))
    np.testing.assert_allclose(found, box - (top, left, top, left), atol=1)


def stop_moving(visit: Visit) -> None:
    """Wait until a movement has ended."""
    visit.page.evaluate(
        """async () => {
            for (let last; last !== (last = JSON.stringify(gigacam.views[0].view()));) await new Promise((d) => setTimeout(d, 250));
        }"""
    )


@pytest.fixture
def slide(visit: Visit, ids: dict[str, str]) -> Visit:
    visit.open(f"image/{ids['slide']}", f"#{PLAIN}")
    visit.settle()
    return visit


def test_hot_pixels_lie_where_they_are_at_every_level_and_after_a_resize(slide: Visit) -> None:
    for level, places in enumerate((HOT, HOT[1:4], HOT[1::2])):
        for hot in places:
            expect_hot(slide, hot, level, DOWNSAMPLE * 2**level * 0.7)
    expect_hot(slide, HOT[0], 0, 0.21)  # one heatmap px is 19 of the screen's
    slide.page.set_viewport_size({"width": 901, "height": 563})
    for level in range(3):
        expect_hot(slide, HOT[1], level, DOWNSAMPLE * 2**level * 0.83)


def test_slide_and_heat_are_registered(slide: Visit) -> None:
    """The black mark of the slide is hidden by its hot px and by nothing else."""
    y, x = ((n + 0.5) * DOWNSAMPLE for n in HOT[0])
    look_at(slide, y, x, 0.25)
    stage = slide.box(".stage")
    clip = {
        "x": stage["x"] + stage["width"] // 2 - 40, "y": stage["y"] + stage["height"] // 2 - 40, "width": 80, "height": 80,
    }  # fmt: skip
    hot = np.array(extent(near(slide.pixels(**clip), YELLOW)))
    slide.page.keyboard.press("h")
    slide.settle()
    mark = np.array(extent(slide.pixels(**clip).max(axis=-1) < 110))
    np.testing.assert_allclose(mark, hot, atol=1)


def test_colours_are_exact_and_cost_no_request(slide: Visit) -> None:
    page = slide.page

    def at(heat_y: float, heat_x: float, size: int = 21) -> NDArray[np.int16]:
        look_at(slide, heat_y * DOWNSAMPLE, heat_x * DOWNSAMPLE, 4)
        stage = slide.box(".stage")
        clip = {
            "x": stage["x"] + stage["width"] // 2 - size // 2,
            "y": stage["y"] + stage["height"] // 2 - size // 2,
        }
        return slide.pixels(**clip, width=size, height=size)

    def set_opacity(value: float) -> None:
        page.locator("input[title^=Opacity]").fill(str(value))

    zero, nobody, failed = (800, 1000), (150, 300), (1050, 300)
    page.keyboard.press("h")
    ground = {place: at(*place) for place in (zero, nobody, failed)}
    page.keyboard.press("h")
    page.keyboard.press("t")
    np.testing.assert_array_equal(at(*nobody), ground[nobody])
    opaque = at(*zero)
    np.testing.assert_allclose(opaque, np.broadcast_to((68, 1, 84), opaque.shape), atol=1)
    hatched = at(*failed)
    assert np.ptp(hatched, axis=(0, 1)).min() > 60  # stripes, not a colour of the map
    page.locator("#hatch").check()
    assert np.ptp(at(*nobody), axis=(0, 1)).max() > 10
    page.locator("#hatch").uncheck()

    at(*zero)
    before = len(slide.requests)
    set_opacity(0.5)
    slide.settle()
    half = at(*zero)
    np.testing.assert_allclose(half, (ground[zero] + opaque) / 2, atol=1)
    for name, lowest in (("cividis", (0, 34, 78)), ("magma", (0, 0, 4)), ("gray", (0, 0, 0))):
        page.get_by_label("Colours", exact=True).select_option(name)
        set_opacity(1)
        slide.settle()
        np.testing.assert_allclose(at(*zero), np.broadcast_to(lowest, opaque.shape), atol=1)
    page.get_by_label("Window to", exact=True).first.fill("0.5")
    page.get_by_label("Window from", exact=True).first.fill("-0.5")  # zero is the middle now
    page.get_by_label("Smooth", exact=True).check()
    page.get_by_role("button", name="Full range").click()
    page.get_by_label("Threshold", exact=True).last.fill("0.2")
    slide.settle()
    np.testing.assert_array_equal(at(*zero), ground[zero])
    page.wait_for_timeout(300)
    assert slide.requests[before:] == []


def test_signed_maps_are_symmetrical_about_zero(slide: Visit) -> None:
    page = slide.page
    page.get_by_label("Method", exact=True).select_option("hirescam")
    slide.settle()
    assert page.get_by_label("Colours", exact=True).input_value() == "signed"
    page.get_by_label("Window to", exact=True).first.fill("0.25")
    slide.settle()
    assert float(page.get_by_label("Window from", exact=True).first.input_value()) == -0.25
    assert page.evaluate("gigacam.views[0].layer.look.window") == [-0.25, 0.25]
    assert "from −0.25 to 0.25 (logit)" in (page.locator(".legend").get_attribute("aria-label") or "")


def test_the_pointer_tells_value_and_place(slide: Visit) -> None:
    page = slide.page
    y, x = ((n + 0.5) * DOWNSAMPLE for n in HOT[0])
    look_at(slide, y, x, 1)
    stage = slide.box(".stage")

    def read(dx: float) -> str:
        page.mouse.move(stage["x"] + stage["width"] / 2 + dx, stage["y"] + stage["height"] / 2)
        return re.sub(r"(?<=\d)[^ \d](?=\d{3})", "", page.locator("#readout").inner_text())

    assert f"x {int(x)}  y {int(y)} px" in read(0)
    assert f"{x / 2:.0f}, {y / 2:.0f} µm" in read(0)
    assert "1 (2 µm)" in read(0)
    assert "0 (2 µm)" in read(9)
    look_at(slide, 1050 * DOWNSAMPLE, 300 * DOWNSAMPLE, 1)
    assert "failed" in read(1)
    look_at(slide, 150 * DOWNSAMPLE, 300 * DOWNSAMPLE, 1)
    assert "not evaluated" in read(0)


def test_a_link_restores_the_view(slide: Visit) -> None:
    page = slide.page
    page.get_by_label("Colours", exact=True).select_option("magma")
    page.locator("input[aria-label=Threshold][type=number]").fill("0.25")
    page.get_by_role("button", name="Compare").click()
    slide.settle()
    look_at(slide, 2000, 3000, 5)
    page.wait_for_timeout(300)
    before = page.evaluate("[gigacam.views.map((v) => v.view()), gigacam.looks]")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_function("() => window.gigacam && gigacam.views.length === 2 && gigacam.settled()")
    after = other.evaluate("[gigacam.views.map((v) => v.view()), gigacam.looks]")
    other.close()
    np.testing.assert_allclose(after[0], before[0], rtol=1e-3)
    assert after[1] == before[1]


def test_two_maps_side_by_side_move_together(slide: Visit) -> None:
    page = slide.page
    page.keyboard.press("v")
    slide.settle()
    left = slide.box(".stage")
    page.mouse.move(left["x"] + 200, left["y"] + 200)
    page.mouse.wheel(0, -400)
    stop_moving(slide)
    first, second = page.evaluate("gigacam.views.map((v) => v.view())")
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert [look["channel"] for look in page.evaluate("gigacam.looks")] == [0, 1]
    page.keyboard.press("v")
    assert page.locator(".view").count() == 1


def test_regions_keys_and_picture(slide: Visit) -> None:
    page = slide.page
    page.locator(".regions button").first.click()
    stop_moving(slide)
    y, x, _ = page.evaluate("gigacam.views[0].view()")
    assert min(abs(y - (a + 0.5) * DOWNSAMPLE) + abs(x - (b + 0.5) * DOWNSAMPLE) for a, b in HOT) < 64
    page.keyboard.press("?")
    assert "heat on, off" in page.locator("#keys").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    stop_moving(slide)
    view = page.evaluate("gigacam.views[0].view()")
    np.testing.assert_allclose(view[:2], [n / 2 for n in SHAPE], rtol=0.01)
    with page.expect_download() as started:
        page.keyboard.press("i")
    picture = np.asarray(Image.open(BytesIO(started.value.path().read_bytes())).convert("RGB")).astype(int)
    stage = slide.box(".stage")
    assert picture.shape[1] == stage["width"]
    assert picture.shape[0] > stage["height"] + 40
    assert near(picture[-26:], (240, 198, 116), 8).sum() > 300  # the intended use
    assert near(picture[-300:, :300], YELLOW, 25).sum() > 20  # the legend's end of the map


def test_the_intended_use_is_always_there(slide: Visit, ids: dict[str, str]) -> None:
    pages: tuple[Any, ...] = ("", f"image/{ids['slide']}", f"image/{ids['RAS']}")
    for path in pages:
        slide.open(path)
        words = slide.page.locator("#intended-use")
        assert words.inner_text() == "For research use only. Not for use in diagnostic procedures."
        assert words.is_visible()


def test_two_runs_of_a_slide_are_each_read_on_their_own_terms(visit: Visit, tmp_path: Path) -> None:
    outs = tmp_path / "first", tmp_path / "second"
    unverified = SIGNED.model_copy(update={"encoder_unverified": True, "title": "HiResCAM"})
    folders = [
        made_run(out, SLIDE, 4, channels=(channel,), options=ReadOptions(mpp_um=um))
        for out, channel, um in zip(outs, (SIGNED, unverified), (0.5, 2.0), strict=True)
    ]
    with served(*outs) as server:
        visit.root = f"http://127.0.0.1:{server.port}"
        page = visit.open(f"image/{folders[0].name}", "#a.run=0&b.run=1&b.ch=0")
        visit.settle()
        look_at(visit, 300.5, 400.5, 1)
        assert page.locator(".zoom").all_inner_texts() == ["0.5 µm a px, about 20×", "2 µm a px, about 5×"]
        scales = page.locator(".scale").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
        assert scales == ["Scale bar: 20 µm", "Scale bar: 100 µm"]
        legends = page.locator(".legend").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
        for legend, cell, marked in zip(legends, (8, 32), (False, True), strict=True):
            assert f"CAM cell {cell} µm" in legend
            assert ("Encoder unverified" in legend) == marked
        for side, um in zip(page.locator(".stage").all(), (0.5, 2.0), strict=True):
            box = side.bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            found = re.match(
                r"x (\d+)  y (\d+) px   (\d+), (\d+) µm   A: ", page.locator("#readout").inner_text()
            )
            assert found
            x, y, x_um, y_um = map(int, found.groups())
            np.testing.assert_allclose((x, y), (400, 300), atol=1)
            np.testing.assert_allclose((x_um, y_um), ((x + 0.5) * um, (y + 0.5) * um), atol=0.5 * um + 0.5)
        page.keyboard.press("x")
        facts = page.locator("#panel details").text_content() or ""
        assert "of 2 µm" in facts
        assert "Encoder unverified" in facts
        page.get_by_label("Run", exact=True).select_option("0")
        visit.settle()
        assert page.locator(".zoom").last.inner_text() == "0.5 µm a px, about 20×"
