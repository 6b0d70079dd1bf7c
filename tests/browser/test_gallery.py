"""The gallery: from the list of images to one of them, and back."""

from __future__ import annotations

from tests.browser.conftest import Visit


def test_from_the_gallery_to_a_slide(visit: Visit, ids: dict[str, str]) -> None:
    page = visit.open("")
    page.locator(".image").nth(len(ids) - 1).wait_for()
    names = page.locator(".image h2").all_inner_texts()
    assert names == sorted(names, key=str.lower)
    assert page.locator(f"[data-id='{ids['slide']}'] .chip").inner_text() == "gaps"
    page.locator("#filter").select_option("gaps")
    assert page.locator(".image h2").all_inner_texts() == ["oblique.nii.gz", "slide.tiff"]
    page.locator("#filter").select_option("")
    page.get_by_label("Search").fill("oblique layercam")
    assert page.locator(".image h2").all_inner_texts() == ["oblique.nii.gz"]
    page.get_by_label("Search").fill("nothing like that")
    assert "No image is like that." in page.locator("main").inner_text()
    page.get_by_label("Search").fill("slide")
    picture = page.locator(".image img")
    page.wait_for_function("() => document.querySelector('.image img').naturalWidth > 0")
    picture.click()
    page.wait_for_function("() => window.gigacam")
    assert page.locator("#name").inner_text() == "slide.tiff"
    page.get_by_role("link", name="gigacam").click()
    page.locator(".image").first.wait_for()
