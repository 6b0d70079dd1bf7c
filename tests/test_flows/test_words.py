"""`--words`: channels ranked over the best tiles, named by the card, in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SpecError
from schemas.model import CamLayer, ChannelName
from schemas.run import ImageReport
from tests.test_flows import networks
from tests.test_flows.runs import explain
from workers.models.card import load_card, write_card
from workers.ranker import Ranker

pytestmark = pytest.mark.usefixtures("no_pictures")

SLIDE = "procedural:slide?width=300&height=200&tissue=1&seed=2"
RED = ChannelName(name="red", score=1.0, provenance="by construction")
GREEN = ChannelName(name="green", score=1.0, provenance="by construction")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Score c is the sum of channel c over all cells: its gradient is 1 there and 0 elsewhere."""
    path = networks.write_factory_card(
        tmp_path / "model", "pooled_channels", {"cell": 16}, "pool", ("r", "g", "b"),
        kind="slide", channels=3, tile=(64, 64), mpp=0.5,
    )  # fmt: skip
    card = load_card(path).card
    write_card(Path(path), card.model_copy(update={"cam": CamLayer(layer="pool", channels={0: RED})}))
    return path


def test_the_report_says_which_channels_weigh(model: str, tmp_path: Path) -> None:
    report = explain(SLIDE, model, tmp_path / "out", targets=("r~b", "g"), words=3)
    image = report.images[0]
    contrast, green = image.evidence
    assert (contrast.target, contrast.tiles, green.target) == ("r~b", 3, "g")
    assert [(n.channel, n.importance, n.name) for n in contrast.supports] == [(0, 1.0, RED)]
    assert [(n.channel, n.importance, n.name) for n in contrast.opposes] == [(2, -1.0, None)]
    assert [(n.channel, n.importance) for n in green.supports] == [(1, 1.0)]
    assert green.opposes == ()
    assert "evidence for r~b: red (unit 0, score 1, by construction) +1" in image.notes
    assert "evidence against r~b (their absence would help): unit 2 -1" in image.notes
    written = ImageReport.model_validate_json((Path(image.output) / "report.json").read_text())
    assert written.evidence == image.evidence


def test_asked_of_a_finished_run_it_is_added(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = explain(SLIDE, model, tmp_path / "out", targets=("g",)).images[0]
    assert first.evidence == ()
    second = explain(SLIDE, model, tmp_path / "out", targets=("g",), words=2).images[0]
    assert second.provenance["tiles_this_run"] == 0
    assert [n.channel for n in second.evidence[0].supports] == [1]
    (
        Path(second.output) / "overview.png"
    ).touch()  # no pictures are drawn here, and a run without one is not finished
    third = explain(SLIDE, model, tmp_path / "out", targets=("g",)).images[0]
    assert third.evidence == second.evidence

    # of other tiles, or with names given since, it is another answer
    more = explain(SLIDE, model, tmp_path / "out", targets=("g",), words=3).images[0]
    assert more.evidence[0].tiles == 3
    card = load_card(model).card
    named = CamLayer(layer="pool", channels={0: RED, 1: GREEN})
    write_card(Path(model), card.model_copy(update={"cam": named}))
    words: dict[str, Any] = {"targets": ("g",), "words": 3}
    found = explain(SLIDE, model, tmp_path / "out", **words).images[0]
    assert [n.name for n in found.evidence[0].supports] == [GREEN]
    assert found.provenance["tiles_this_run"] == 0
    monkeypatch.delattr(Ranker, "run")  # asked the same once more, nothing is ranked
    again = explain(SLIDE, model, tmp_path / "out", **words).images[0]
    assert (again.evidence, again.notes) == (found.evidence, found.notes)


def test_a_bag_has_no_such_list(tmp_path: Path) -> None:
    model = networks.write_bag_card(tmp_path / "model", "abmil")
    with pytest.raises(SpecError, match=r"--words 3: .* scores bags of tiles"):
        explain(SLIDE, model, tmp_path / "out", words=3)
