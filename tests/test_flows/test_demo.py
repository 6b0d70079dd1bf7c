"""The demo's pieces on a small slide with planted squares and an untrained network: nothing is trained here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from matplotlib.image import imread

import flows.demo
from flows.demo import ALL, BESIDE, LIGHTER, SLIDE_OUTLINES, SLIDE_VALUES, chosen_methods
from flows.tables import class_words, demo_document, demo_table, noise_words
from tests.test_flows.networks import write_densenet_card
from tests.test_flows.runs import explain
from workers.cam.methods import METHODS, method
from workers.evaluator import planted_lesion_scores
from workers.metrics.sensitivity import Measured, Robustness
from workers.readers.regions import read_polygons
from workers.synthetic.tissue import DISTRACTOR, LESION
from workers.trust import Trust, busiest_window, planted_tiles, survey

SIZE, TILE = 2304, 224
PLANTED = {LESION: (slice(800, 1100), slice(1300, 1600)), DISTRACTOR: (slice(1500, 1800), slice(700, 1000))}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A slide and its truth: dark squares, one of each kind, and a far speck of each."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    pixels = rng.integers(190, 230, (SIZE, SIZE, 3)).astype(np.uint8)
    truth = np.zeros((SIZE, SIZE), np.uint8)
    for value, square in PLANTED.items():
        pixels[square] = pixels[square] // 2
        truth[square] = value
    for name, data, photometric in (("s.tiff", pixels, "rgb"), ("t.tiff", truth, "minisblack")):
        tifffile.imwrite(
            folder / name, data, tile=(256, 256), photometric=photometric, compression="zlib",
            resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
        )  # fmt: skip
    return folder / "s.tiff", folder / "t.tiff"


def test_all_stands_for_every_method_and_grad_cam_comes_first() -> None:
    names = chosen_methods((ALL,))
    assert names[0] == "gradcam"
    assert [n for n in names if n not in BESIDE.values()] == [LIGHTER.get(n, n) for n in METHODS]
    for name in names:
        assert method(name).info.name == name
    assert chosen_methods(("eigencam", "gradcam", "eigencam")) == ("gradcam", "eigencam")
    assert chosen_methods(()) == flows.demo.METHODS
    assert set(chosen_methods(("hirescam+", ALL))) > set(names)


def test_tiles_lie_around_what_was_planted(slide: tuple[Path, Path]) -> None:
    image, truth = map(str, slide)
    tiles = planted_tiles(image, truth, (TILE, TILE), SLIDE_VALUES, 3, 0)
    assert tiles.shape == (6, 3, TILE, TILE)
    assert (tiles.mean((1, 2, 3)) < 205).all()  # the squares are dark, the rest is 210
    assert np.array_equal(tiles, planted_tiles(image, truth, (TILE, TILE), SLIDE_VALUES, 3, 0))
    assert not np.array_equal(tiles, planted_tiles(image, truth, (TILE, TILE), SLIDE_VALUES, 3, 1))


def test_the_window_holds_much_of_each_and_comes_back_from_its_file(
    slide: tuple[Path, Path], tmp_path: Path
) -> None:
    window = busiest_window(str(slide[1]), SLIDE_VALUES)
    assert window.shape == (1536, 1536)
    for square in PLANTED.values():
        assert all(
            a <= s.start and s.stop <= b for a, b, s in zip(window.start, window.stop, square, strict=True)
        )
    flows.demo._write_region(tmp_path / "region.geojson", window)
    ring = np.array(read_polygons(tmp_path / "region.geojson")[0])
    assert (tuple(ring.min(0)), tuple(ring.max(0))) == (window.start, window.stop)


def test_methods_are_measured_explained_scored_and_drawn(
    slide: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, truth = slide
    card = write_densenet_card(tmp_path / "model", "slide", tile=(TILE, TILE), mpp=0.5)
    names = ("gradcam", "eigencam", "rollout")
    trust = survey(card, str(image), str(truth), SLIDE_VALUES, names, 2, 0)
    assert [row.method for row in trust] == list(names)
    by_name = {row.method: row for row in trust}
    assert "attention" in by_name["rollout"].reason
    taken = flows.demo._taken(trust)
    assert taken == ("gradcam", "eigencam")
    for row in (by_name[n] for n in taken):
        assert row.seconds_per_1000 > 0
        assert row.sensitivity is not None
        assert row.sensitivity.values.shape == (4,)
    robust = by_name["gradcam"].robustness
    assert robust is not None
    assert robust.changed == 4
    assert by_name["eigencam"].robustness is None
    assert class_words(by_name["eigencam"]) == "1.00"

    flows.demo._write_region(tmp_path / "region.geojson", busiest_window(str(truth), SLIDE_VALUES))
    (done,) = explain(
        str(image), card, tmp_path / "run", methods=taken, targets=("tumour",), tissue="none",
        region=str(tmp_path / "region.geojson"),
    ).images  # fmt: skip
    assert done.status == "complete"
    sheet = flows.demo._tell(image, truth, Path(done.output), planted_lesion_scores, trust, SLIDE_OUTLINES)

    said = capsys.readouterr().out
    assert re.search(
        r"^ *gradcam +[01]\.\d{3} +[01]\.\d{3} +\d+\.\d +\N{MINUS SIGN}?[01]\.\d\d +[01]\.\d{3}", said, re.M
    )
    assert re.search(r"^ *eigencam .* 1\.00 +none used", said, re.M)
    assert re.search(r"^ *rollout .* not applicable", said, re.M)
    assert "rollout: not applicable to this network: " in said
    assert re.search(r"^ *raw darkness ", said, re.M)
    document = json.loads((sheet.parent / "methods.json").read_text())
    assert list(document) == list(names)
    assert set(document["gradcam"]["auroc"]) == set(document["eigencam"]["auroc"])
    assert document["rollout"] == {"reason": by_name["rollout"].reason}
    assert document["eigencam"]["class_sensitivity"] == pytest.approx(1.0)
    picture = imread(sheet)
    assert picture.shape[1] > 1500
    assert picture[..., :3].std() > 0.1


def test_what_is_not_defined_is_said_and_not_shown_as_a_number() -> None:
    nothing = Measured(np.array([np.nan, np.nan]))
    some = Measured(np.array([0.5, np.nan]))
    constant = Trust("gradient", "", 3.0, nothing, Robustness(nothing, nothing, 2))
    unreached = Trust("layercam", "", 3.0, some, Robustness(some, some, 0))
    assert (class_words(constant), noise_words(constant)) == ("-", "-")
    assert (class_words(unreached), noise_words(unreached)) == ("0.50 (1 tiles)", "not reached")
    scores = {"gradient:a": {"q": 0.5}, "layercam:a": {"q": 0.75}, "raw": {"q": 0.25}}
    table = demo_table("t", scores, (constant, unreached))
    assert table.row_count == 3
    document = demo_document(scores, (constant, unreached))
    assert document["gradient"]["class_sensitivity"] is None
    assert document["layercam"]["class_sensitivity"] == 0.5
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_guide_has_a_row_of_facts_and_of_figures_for_every_method() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "guide" / "methods.md").read_text(encoding="utf-8")
    facts, figures = text.split("## How far each can be trusted")
    for name, row in METHODS.items():
        assert f"| `{name}` | {row.info.title} |" in facts, name
        assert f"| `{LIGHTER.get(name, name)}` |" in figures, name
    assert "{" not in text
