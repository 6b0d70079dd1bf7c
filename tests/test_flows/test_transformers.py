"""Transformers through the whole path: a card of MONAI's ViT, its tokens on the slide, its attention as heatmaps."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flows.cli import main
from schemas.geometry import Box
from schemas.heatmap import Coverage
from schemas.model import CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
from schemas.run import RunReport
from tests.test_flows.runs import heatmap_of, tiles_of, values_of
from workers.cam.explain import explain
from workers.cam.targets import resolve
from workers.models.card import load_card, write_card
from workers.models.cnn import load_model
from workers.readers import open_image

SLIDE = "procedural:slide?width=512&height=256&seed=1"
METHODS = ("gradcam", "hirescam", "rollout", "attention_relevance", "legrad", "doei")
TILE = (48, 64)
GRID = (3, 4)

pytestmark = pytest.mark.usefixtures("no_pictures")


def vit_card(folder: Path, layer: str) -> str:
    """Card of a small MONAI ViT with fixed random weights; it says nothing of its tokens."""
    from monai.networks.nets.vit import ViT

    folder.mkdir(parents=True, exist_ok=True)
    args: dict[str, Any] = {
        "in_channels": 3, "img_size": list(TILE), "patch_size": 16, "hidden_size": 24, "mlp_dim": 32, "num_layers": 2,
        "num_heads": 2, "classification": True, "num_classes": 2, "spatial_dims": 2, "post_activation": "",
    }  # fmt: skip
    torch.manual_seed(0)
    save_file(ViT(**args).state_dict(), folder / "w.safetensors")
    sha256 = hashlib.sha256((folder / "w.safetensors").read_bytes()).hexdigest()
    card = ModelCard(
        schema=1, name="vit", version="1", licence="Apache-2.0", intended_use="tests",
        network=NetworkSpec(adapter="monai", name="ViT", args=args, weights="w.safetensors", sha256=sha256),
        input=InputSpec(kind="slide", channels=3, tile=TILE, mpp=1.0),
        output=OutputSpec(kind="logits", classes=("benign", "tumour")),
        cam=CamLayer(layer=layer),
    )  # fmt: skip
    write_card(folder / "model.toml", card)
    return str(folder / "model.toml")


def run(out: Path, card: str, *more: str) -> int:
    words = [
        "explain",
        SLIDE,
        "--model",
        card,
        "--out",
        str(out),
        "--target",
        "all",
        "--direct",
        "--pool",
        "serial",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--threads", "1", "--overlap", "0", *more])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_vit_is_explained_by_cams_and_by_its_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    card = vit_card(tmp_path / "m", "blocks.1.norm1")
    capsys.readouterr()
    assert run(tmp_path / "out", card, "--method", ",".join(METHODS), "--json") == 0
    report = RunReport.model_validate_json(capsys.readouterr().out)
    store, heatmap = tiles_of(report), heatmap_of(report)
    loaded = load_card(card)
    model = load_model(loaded)
    assert model.cells.shape == GRID
    assert model.cells.cell_px == (16.0, 16.0)
    # the stored maps are those of the tiles' pixels, each in its place
    rows = store.unit_rows(0)
    boxes, lattice = store.boxes(rows), store.info.lattice
    assert len(boxes) > 4
    with closing(open_image(SLIDE)) as reader:
        read = [
            reader.read(Box(frame="l0", start=tuple(a), stop=tuple(b)), lattice.tile_px, lattice.level)[0]
            for a, b in boxes.tolist()
        ]
    x = model.prepare(np.stack(read))
    expected = explain(model.net, x, resolve(["all"], loaded.card.output, 2), METHODS).maps
    for method in METHODS:
        for target in range(2):
            found = store.maps_of(method, target, rows)
            assert found.shape == (len(rows), *GRID)
            here = expected[method][:, target].numpy()
            np.testing.assert_allclose(found, here, rtol=0, atol=1e-4 * abs(here).max(), err_msg=method)
    labels = [channel.label for channel in heatmap.info.channels]
    assert labels[-2:] == ["doei:benign (reconstruction)", "doei:tumour (reconstruction)"]
    assert {c.title for c in heatmap.info.channels[-2:]} == {"DOEI (reconstruction)"}
    evaluated = heatmap.coverage(0)[:] == Coverage.EVALUATED
    assert evaluated.any()
    values = values_of(heatmap)
    assert len(values) == 2 * len(METHODS)
    assert (np.isfinite(values) == evaluated).all()


def test_a_layer_that_no_score_depends_on_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = vit_card(tmp_path / "m", "blocks.1")
    assert run(tmp_path / "out", card, "--method", "gradcam") == 2
    assert "'blocks.1.norm1'" in " ".join(capsys.readouterr().err.split())
