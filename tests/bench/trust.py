"""Write deploy/guide/methods.md from a finished demo: `python -m tests.bench.trust DEMO`.

DEMO is the folder of `gigacam demo --methods all --out DEMO`. AUROC, class sensitivity, robustness and seconds are
those that the demo measured; what is added here is how much of each map survives when the weights of its network are
shuffled. The noise test asserts that noise reached every method that takes its gradient from the engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path
from typing import Any

import torch

from flows.demo import SLIDE_VALUES, TILES_EACH, VOLUME_VALUES
from workers.cam.method import Method
from workers.cam.methods import METHODS
from workers.metrics.sensitivity import rank_correlation
from workers.models.adapter import ModelAdapter
from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.trust import NOISE, explained, planted_tiles, target_of

PAGE = Path(__file__).parents[2] / "deploy" / "guide" / "methods.md"
SLOW = 150.0
"""Seconds per 1,000 tiles above which a method's maps are not made twice more."""

Facts = dict[str, dict[str, Any]]


def shuffled(net: Any, last_only: bool, seed: int = 0) -> Any:
    """A copy of a split network with the values of each weight tensor in another order: of the last layer, or of all."""
    made = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        m for m in made.module.modules() if isinstance(m, torch.nn.modules.conv._ConvNd | torch.nn.Linear)
    ]
    with torch.no_grad():
        for layer in layers[-1:] if last_only else layers:
            flat = layer.weight.flatten()
            layer.weight.copy_(flat[torch.randperm(len(flat), generator=generator)].view_as(layer.weight))
    return made


def sanity(model: ModelAdapter, tiles: Any, facts: Facts) -> dict[str, tuple[float, float]]:
    """By method: rank correlation with its own maps after the last layer, and after all layers, were shuffled."""
    x = model.prepare(tiles)
    nets = [model.net, shuffled(model.net, True), shuffled(model.net, False)]
    found = {}
    for name, row in facts.items():
        if row["reason"] or row["seconds_per_1000_tiles"] > SLOW:
            continue
        maps = [explained(net, x, target_of(model), name).maps[name][:, 0].numpy() for net in nets]
        found[name] = (rank_correlation(maps[0], maps[1]).mean, rank_correlation(maps[0], maps[2]).mean)
    return found


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def described(row: Method) -> list[str]:
    info = row.info
    options = ", ".join(f"`{k}={v}`" for k, v in info.options.items())
    return [
        f"`{info.name}`", info.title, ", ".join(info.needs), {"1": "none"}.get(info.unit, info.unit),
        "signed" if info.signed else "0 or above", "yes" if info.class_specific else "no", options or "none",
        info.edition, info.citation,
    ]  # fmt: skip


def noise_cell(row: dict[str, Any], name: str) -> str:
    if "ssim" not in row:
        return "none used"
    return f"{number(row['ssim'], 3)} / {row['mse']:.1e}" if row["ssim"] is not None else "-"


def measured(name: str, images: list[Facts], sane: list[dict[str, tuple[float, float]]]) -> list[str]:
    cells = [f"`{name}`"]
    rows = [facts[name] for facts in images]
    if all(row["reason"] for row in rows):
        return [*cells, "not applicable", *[""] * 5]
    known = METHODS[name.partition("+")[0]].info.class_specific

    def each(say: Any) -> str:
        return "; ".join("not applicable" if row["reason"] else say(i, row) for i, row in enumerate(rows))

    def survived(i: int, _: Any) -> str:
        return " / ".join(map(number, sane[i][name])) if name in sane[i] else "not run"

    return [
        *cells,
        "yes" if known else "no",
        each(lambda _, r: " / ".join(number(v) for v in r["auroc"].values())),
        each(lambda _, r: f"{number(r['class_sensitivity'])} ({r['tiles']})"),
        each(lambda _, r: noise_cell(r, name)),
        each(survived),
        each(lambda _, r: f"{r['seconds_per_1000_tiles']:.0f}"),
    ]


def check_noise(images: list[Facts]) -> None:
    """Every method that uses a gradient must see the noise: a robust map of untouched gradients means nothing."""
    for facts in images:
        for name, row in facts.items():
            assert row.get("changed", True), f"{name}: noise on the gradient did not reach any map"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="The demo's.")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("trust.md"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [("slide", "slide.tiff", "slide.truth.tiff", SLIDE_VALUES),
             ("volume", "volume.nii.gz", "volume.truth.nii.gz", VOLUME_VALUES)]  # fmt: skip
    images, sane = [], []
    for kind, image, truth, values in kinds:
        (path,) = asked.demo.glob(f"run/{kind}-*/methods.json")
        facts: Facts = json.loads(path.read_text())
        model = load_model(load_card(str(asked.demo / "models" / kind / "model.toml")))
        inputs = asked.demo / "inputs"
        tiles = planted_tiles(
            str(inputs / image), str(inputs / truth), model.card.input.tile, values, TILES_EACH, asked.seed
        )
        images.append(facts)
        sane.append(sanity(model, tiles, facts))
    check_noise(images)
    text = asked.text.read_text(encoding="utf-8")

    def figure(word: str) -> str:
        kind, key, name = word.split(":")
        row = images[("slide", "volume").index(kind)][name]
        if key.startswith("auroc"):
            return number(list(row["auroc"].values())[int(key[-1])])
        return number(row[key])

    for word in {w.partition("}")[0] for w in text.split("{")[1:] if ":" in w.partition("}")[0]}:
        text = text.replace("{" + word + "}", figure(word))
    about = table(
        ["name", "method", "needs", "unit", "sign", "asked for a class", "options", "edition", "citation"],
        [described(row) for row in METHODS.values()],
    )
    names = dict.fromkeys([*images[0], *images[1]])
    trust = table(
        ["name", "asked for a class", "AUROC", "class sensitivity (tiles)", "noise: SSIM / MSE",
         "shuffled: last layer / all", "s per 1,000 tiles"],
        [measured(name, images, sane) for name in names],
    )  # fmt: skip
    reasons = sorted({f"- `{n}`: {r['reason']}" for facts in images for n, r in facts.items() if r["reason"]})
    machine = f"torch {torch.__version__}, {platform.machine()} CPU, one thread a network"
    for key, value in {"ABOUT": about, "TRUST": trust, "REASONS": "\n".join(reasons), "SEED": str(asked.seed),
                       "TILES": str(2 * TILES_EACH), "NOISE": f"{NOISE:g}", "MACHINE": machine,
                       "SLOW": f"{SLOW:.0f}"}.items():  # fmt: skip
        text = text.replace("{" + key + "}", value)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(names)} rows")


if __name__ == "__main__":
    main()
