"""The README is run: every command and every snippet in it, on small inputs.

What stands for what: `slide.svs` is the real slide of tests/data, `slides/` and `slides.csv` hold two small TIFFs, the
card's network is a DenseNet of a few layers with random weights and their digest. `--ray-address` gets the Ray of the
test session, and Ray runs get one actor. The bags are eight slides of one tile each, the head is trained for four epochs in
two folds, and that part runs serially and draws no overviews. `view` gets a free port, and is interrupted. The two `make` lines are not run: their targets must exist, and the lines by
hand must be what make would run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import save_file

from flows.cli import main
from schemas.model import ModelCard, OutputSpec
from schemas.run import RunReport
from workers.cam.methods import METHODS
from workers.models.card import write_card

nets: Any = import_module("monai.networks.nets")  # its names are not exported as typing wants

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SMALL = {"init_features": 8, "growth_rate": 4, "block_config": [2, 2], "bn_size": 2}


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[list[str]]:
    """Words of each command of the console blocks, in order."""
    lines = [line for text in blocks("console") for line in text.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def by_hand() -> list[list[str]]:
    """Words of the lines that stand for `make`."""
    lines = [line for text in blocks("bash") for line in text.splitlines() if not line.startswith("make ")]
    return [shlex.split(line) for line in lines]


def part(words: list[str]) -> str:
    """Which test runs a command."""
    if words[0] == "prefect":
        return "prefect"
    if "slide.svs" in words:
        return "alone"
    if words[1] in ("view", "report", "export"):
        return "open"
    return "bags" if {"encoder.toml", "trained/model.toml"} & set(words) else "many"


PARTS = {
    name: [c for c in commands() if part(c) == name] for name in ("alone", "many", "bags", "open", "prefect")
}


def run(words: list[str]) -> int:
    """Exit code of a `gigacam` command in this process."""
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
    finally:
        signal.signal(signal.SIGTERM, at_sigterm)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: slides, and the card of the README beside its weights."""
    made = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "tests/data/CMU-1-Small-Region.svs", made / "slide.svs")
    write_slides(made, 2, 512)
    (made / "slides.csv").write_text("image\nslides/0.tiff\nslides/1.tiff\n")
    write_model(made)
    return made


def write_slides(folder: Path, count: int, side_px: int) -> None:
    (folder / "slides").mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(-25, 25, (side_px, side_px, 3))
        pixels = (np.array((205, 120, 170)) + noise).astype(np.uint8)
        tifffile.imwrite(
            folder / "slides" / f"{i}.tiff", pixels, tile=(256, 256), photometric="rgb",
            resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
        )  # fmt: skip


def write_model(made: Path) -> ModelCard:
    """The card of the README beside the weights of a small network."""
    card = card_of_the_readme()
    args = {**card.network.args, **SMALL}
    torch.manual_seed(0)
    save_file(nets.DenseNet(**args).state_dict(), made / card.network.weights)
    sha256 = hashlib.sha256((made / card.network.weights).read_bytes()).hexdigest()
    network = card.network.model_copy(update={"name": "DenseNet", "args": args, "sha256": sha256})
    card = card.model_copy(update={"network": network})
    write_card(made / "model.toml", card)
    return card


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def card_of_the_readme() -> ModelCard:
    (text,) = blocks("toml")
    return ModelCard.model_validate(tomllib.loads(text))


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {name for name, _ in BLOCKS} == {"bash", "toml", "console", "python", ""}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert sum(map(len, PARTS.values())) == len(commands())
    assert min(map(len, PARTS.values())) >= 3


def test_make_targets_exist_and_the_lines_by_hand_are_what_make_runs() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert targets == ["demo", "test"]
    settings = ["PYTHON=python3.11", "PIP_FLAGS="]
    dry = subprocess.run(
        ["make", "--dry-run", "--always-make", *targets, *settings],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    runs = [
        set(shlex.split(line))
        for line in dry.stdout.replace("\\\n", " ").splitlines()
        if line.startswith((".venv", "python"))
    ]
    assert len(by_hand()) == 4
    for words in by_hand():
        assert any(set(words) <= made for made in runs), words


def test_the_model_card_is_one() -> None:
    card = card_of_the_readme()
    assert card.output.default_target in card.output.classes
    assert hasattr(nets, card.network.name)
    assert card.cam.layer in dict(getattr(nets, card.network.name)(**card.network.args).named_modules())


def test_one_slide(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in PARTS["alone"]:
        assert run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "openslide:aperio" in said
    assert re.search(r"complete +slide.svs +(\d+)/\1 tiles", said)

    # What the README says lies there, does.
    (tree,) = blocks("")
    (made,) = (here / "out").glob("slide-*")
    for line in tree.splitlines():
        name = line.split()[0]
        if name == "heatmap.nii.gz" or name.startswith("out/<"):
            continue  # volumes only; the folder itself
        places = [here / name, made / name, made / "heatmap.ome.zarr" / name]
        assert any(place.exists() for place in places), name

    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    labels, highest = capsys.readouterr().out.splitlines()
    assert labels == "['gradcam:tumour']"
    report = RunReport.model_validate_json((here / "out" / "run.json").read_text())
    assert float(highest.strip("[]")) == pytest.approx(report.images[0].value_range[0][1], rel=1e-5)


@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.usefixtures("ray_session")
def test_many_slides_through_prefect_and_ray(
    here: Path, prefect_session: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setenv("PREFECT_API_URL", prefect_session)
    address = ray.get_runtime_context().gcs_address
    for words in PARTS["many"]:
        if "--workers" in words:
            words = [*words[: words.index("--workers")], *words[words.index("--workers") + 2 :]]
        given = [address if word == "ray-head:6379" else word for word in words]
        assert run([*given, "--workers", "1"]) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        assert "; Prefect" in said.err
        assert re.findall(r"^complete +(\S+)", said.out, re.MULTILINE) == ["0.tiff", "1.tiff"]


@pytest.mark.usefixtures("no_pictures")
def test_a_slides_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_slides(tmp_path, 8, 224)
    rows = [f"slides/{i}.tiff,{'ab'[i % 2]},p{i}" for i in range(8)]
    (tmp_path / "cases.csv").write_text("\n".join(["image,label,patient", *rows]))
    card = write_model(tmp_path)
    network = card.network.model_copy(update={"embedding": "mean", "embedding_layer": card.cam.layer})
    encoder = {"network": network, "output": OutputSpec(kind="embedding")}
    write_card(tmp_path / "encoder.toml", card.model_copy(update=encoder))
    for words in PARTS["bags"]:
        more = (
            ["--epochs", "4", "--folds", "2"]
            if words[1] == "train"
            else ["--pool", "serial", "--threads", "1"]
        )
        assert run([*words, *more]) == 0, capsys.readouterr().err
    report = RunReport.model_validate_json((tmp_path / "decisions" / "run.json").read_text())
    assert len(report.images) == 8
    for image in report.images:
        assert image.bag is not None
        assert [c.method for c in image.channels] == ["contribution", "hirescam"]
        assert {c.unit for c in image.channels} == {"logit"}


def test_opening_the_result(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (here / "out").exists():  # asked for alone
        assert run(PARTS["alone"][-1]) == 0
    for words in PARTS["open"]:
        if words[1] != "view":
            assert run(words) == 0, capsys.readouterr().err
            continue
        viewer = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words[1:], "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert viewer.stdout is not None
            address = viewer.stdout.readline().split()[-1]
            with urllib.request.urlopen(f"{address}api/images", timeout=30) as answer:
                assert any(image["name"] == "slide.svs" for image in json.load(answer)["images"])
        finally:
            viewer.send_signal(signal.SIGINT)
            viewer.communicate(timeout=30)
    (made,) = (here / "out").glob("slide-*")
    for name in ("heatmap.ome.tif", "qupath_overlay.groovy", "regions.geojson", "tiles.csv"):
        assert (made / "export" / name).stat().st_size > 0
    assert (made / "report.html").stat().st_size > 10_000


@pytest.mark.prefect
def test_prefect_deployment(prefect_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_session)
    for words in PARTS["prefect"]:
        more = ["--run-once", "--prefetch-seconds", "0"] if "worker" in words else []
        done = subprocess.run(
            [sys.executable, "-m", *words, *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_methods_shown_are_those_there_are() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert len(names) > 5
    assert set(names) <= set(METHODS)
    for name, title, meaning in rows:
        info = METHODS[name].info
        assert title.startswith(info.title)
        sign, unit = meaning.split(", ")
        assert sign == ("signed" if info.signed else "0 or above")
        assert unit == {"1": "no unit", "logit": "logit", "logit/cell": "logit per cell"}[info.unit]


def test_pictures_and_files_named_exist() -> None:
    (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert 10_000 < (ROOT / picture).stat().st_size < 400_000
    for name in (
        "deploy/constraints.txt",
        "deploy/guide/methods.md",
        "deploy/guide/bags.md",
        "deploy/guide/encoders.md",
        "deploy/prefect.yaml",
        "CHANGELOG.md",
        "LICENSE",
    ):
        assert (ROOT / name).exists()
    for example in ("Dockerfile", "compose.yaml", "kuberay", "slurm", "decisions"):
        assert (ROOT / "deploy" / example).exists()
