"""The volume page: heat lies at the right anatomical place in all three planes, whatever the file's axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schemas.image import ReadOptions
from tests.browser.conftest import Visit
from tests.browser.runs import AFFINES, FAILED_VOXELS, HOT_VOXEL, SOURCE, Place
from tests.browser.test_slide import YELLOW, extent, near
from tests.test_workers.viewer_runs import VOLUME, made_run, served

SIDES = (("L", "R"), ("P", "A"), ("I", "S"))


@pytest.mark.parametrize("name", AFFINES)
def test_a_hot_voxel_is_where_anatomy_has_it(visit: Visit, ids: dict[str, str], name: str) -> None:
    page = visit.open(f"image/{ids[name]}", "#a.op=1&a.thr=0.5")
    page.wait_for_function("() => window.gigacam")
    place = Place.of(AFFINES[name])
    # the page opens at the strongest voxel
    np.testing.assert_allclose(page.evaluate("gigacam.mm()"), place.mm, atol=1e-3)
    words = page.locator("#readout").inner_text()
    for value, (less, more) in zip(place.mm, SIDES, strict=True):
        assert f"{float(f'{abs(value):.4g}'):g} {more if value >= 0 else less}" in words
    assert f"voxel {', '.join(map(str, HOT_VOXEL))}" in words
    assert f"source {float(f'{SOURCE[HOT_VOXEL]:.4g}'):g} " in words
    assert words.endswith("heat 1")

    # only the volume, so that its edges can be seen
    page.evaluate(
        "Object.assign(gigacam.nv.opts, { isRuler: false, crosshairWidth: 0, isOrientationTextVisible: false })"
    )
    canvas = visit.box("#volume")
    for view, axis in (("sagittal", 0), ("coronal", 1), ("axial", 2)):
        page.get_by_label("Show", exact=True).last.select_option(view)
        page.evaluate("(mm) => gigacam.goToMm(mm)", place.away[axis].tolist())
        assert page.locator("#readout").inner_text().endswith("heat 0")
        shot = visit.pixels(**canvas)
        top, left, bottom, right = extent(np.abs(shot - shot[0, 0]).max(axis=-1) > 12)
        x, y, z = place.shares
        # radiological: the patient's right is on the screen's left; front is to the right of a sagittal plane
        across, up = {"sagittal": (y, z), "coronal": (1 - x, z), "axial": (1 - x, y)}[view]
        a, b, c, d = extent(near(shot, YELLOW, 60))
        expected = top + (1 - up) * (bottom - top), left + across * (right - left)
        np.testing.assert_allclose(((a + c) / 2, (b + d) / 2), expected, atol=2)


def test_what_failed_is_striped_and_said(visit: Visit, ids: dict[str, str]) -> None:
    page = visit.open(f"image/{ids['oblique']}", "#a.op=1&planes=axial")
    page.wait_for_function("() => window.gigacam")
    centre = [(part.start + part.stop - 1) / 2 for part in FAILED_VOXELS]
    page.evaluate("(mm) => gigacam.goToMm(mm)", (AFFINES["oblique"] @ [*centre, 1])[:3].tolist())
    assert page.locator("#readout").inner_text().endswith("heat failed")
    assert "failed: no value" in (page.locator(".legend").get_attribute("aria-label") or "")
    page.evaluate(
        "Object.assign(gigacam.nv.opts, { isRuler: false, crosshairWidth: 0, isOrientationTextVisible: false })"
    )
    page.evaluate("gigacam.nv.drawScene()")
    shot = visit.pixels(**visit.box("#volume"))
    light = near(shot, (196, 196, 196), 12)
    top, left, bottom, right = (int(n) for n in extent(light))
    dark = near(shot[top:bottom, left:right], (25, 25, 25), 12)
    assert 0.2 < dark.mean() < 0.5 < light[top:bottom, left:right].mean() + dark.mean()
    outside = AFFINES["oblique"] @ [*(part.stop + 2 for part in FAILED_VOXELS), 1]
    page.evaluate("(mm) => gigacam.goToMm(mm)", outside[:3].tolist())
    assert page.locator("#readout").inner_text().endswith("heat 0")


def test_colours_of_a_volume_are_those_of_a_slide_and_cost_no_request(
    visit: Visit, ids: dict[str, str]
) -> None:
    page = visit.open(f"image/{ids['RAS']}", "#a.op=1&planes=axial")
    page.wait_for_function("() => window.gigacam")
    left, top, width, height = page.evaluate("Array.from(gigacam.nv.screenSlices[0].leftTopWidthHeight)")
    canvas = visit.box("#volume")
    spot = {
        "x": canvas["x"] + left + width * 0.3,
        "y": canvas["y"] + top + height * 0.8,
        "width": 15,
        "height": 15,
    }
    opaque = visit.pixels(**spot)
    np.testing.assert_allclose(opaque, np.broadcast_to((68, 1, 84), opaque.shape), atol=2)
    page.wait_for_timeout(300)
    before = len(visit.requests)
    opacity = page.locator("input[title^=Opacity]")
    opacity.fill("0")
    ground = visit.pixels(**spot)
    opacity.fill("0.5")
    np.testing.assert_allclose(visit.pixels(**spot), (ground + opaque) / 2, atol=2)
    page.get_by_label("Colours", exact=True).select_option("cividis")
    opacity.fill("1")
    np.testing.assert_allclose(visit.pixels(**spot), np.broadcast_to((0, 34, 78), opaque.shape), atol=2)
    page.locator("input[aria-label=Threshold][type=number]").fill("0.5")
    np.testing.assert_array_equal(visit.pixels(**spot), ground)
    assert visit.requests[before:] == []


def test_another_run_of_a_volume_says_by_which_voxels_it_is_placed(visit: Visit, tmp_path: Path) -> None:
    outs = tmp_path / "first", tmp_path / "second"
    options = ReadOptions(), ReadOptions(spacing_mm=(6.0, 3.0, 2.0))
    folders = [made_run(out, VOLUME, 1, options=how) for out, how in zip(outs, options, strict=True)]
    with served(*outs) as server:
        visit.root = f"http://127.0.0.1:{server.port}"
        page = visit.open(f"image/{folders[0].name}")
        page.wait_for_function("() => window.gigacam")
        legend = page.locator(".legend")
        assert "voxels of" not in page.locator("#readout").inner_text()
        assert "CAM cell 3.5 × 4.5 × 7.5 mm" in (legend.get_attribute("aria-label") or "")
        page.get_by_label("Run", exact=True).select_option("1")
        page.get_by_text("mm by voxels of 1 × 1.5 × 3 mm").wait_for()
        assert "CAM cell 7 × 9 × 15 mm" in (legend.get_attribute("aria-label") or "")
