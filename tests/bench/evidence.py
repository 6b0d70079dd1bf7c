"""What bag methods say of tiles whose evidence is known: `python -m tests.bench.evidence` writes deploy/guide/bags.md.

Heads are trained on toy bags of `workers.synthetic.bags` by the label of the bag alone; then every bag method is asked which
tiles speak for class 1 and which against it. AUPRC on positive evidence ranks a bag's tiles by the value, on negative evidence by
the value with its sign turned. The target is the logit of class 1 less the mean of all logits (of two classes: half the margin).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.errors import ModelError
from schemas.training import FitSpec
from workers.cam.bag import BagView
from workers.cam.bag_methods import BAG_METHODS, attribute
from workers.metrics.classification import METRICS, auprc
from workers.models.heads.head import BagHead
from workers.models.heads.registry import build_head
from workers.synthetic.bags import ToyBag, block_slides, toy_bags
from workers.training.bags import Bags, Case, Fold
from workers.training.mil import Plain, fit, predict

PAGE = Path(__file__).parents[2] / "deploy" / "guide" / "bags.md"
TEXT = Path(__file__).with_name("evidence.md")
TARGET = 1
UPRIGHT = "attention, sign not turned"
"""Attention read the same way for both signs: the kindest reading that something unsigned can be given."""


@dataclass(frozen=True)
class World:
    """Bags, and which evidence they hold for and against class 1."""

    title: str
    make: Callable[..., tuple[ToyBag, ...]]
    """`make(count, seed=...)`."""
    signs: tuple[int, ...]


def toys(rule: str) -> Callable[..., tuple[ToyBag, ...]]:
    def make(count: int, *, seed: int) -> tuple[ToyBag, ...]:
        return toy_bags(rule, count, seed=seed)

    return make


WORLDS: dict[str, World] = {
    "signed": World("majority of two signs", toys("signed"), (1, -1)),
    "blocks": World("block slides", block_slides, (1, -1)),
    "four": World("four classes", toys("four"), (1, -1)),
    "presence": World("presence", toys("presence"), (1,)),
    "pairs": World("neighbouring pairs", toys("pairs"), (1,)),
}
_ATTENDING: dict[str, Any] = {"hidden": 32, "size": 16, "dropout": 0.25}
HEADS: dict[str, dict[str, Any]] = {
    "mean": {"hidden": 32, "dropout": 0.25},
    "max": {"hidden": 32, "dropout": 0.25},
    "abmil": _ATTENDING,
    "clam_mb": _ATTENDING,
    "additive": _ATTENDING,
    "dsmil": _ATTENDING,
    "transmil": {"hidden": 32, "dropout": 0.25},
}
FIT = FitSpec(epochs=30, patience=8, learning_rate=3e-3)


@dataclass(frozen=True)
class Sizes:
    """Bags to learn from, to stop by, to be measured on."""

    train: int = 64
    validation: int = 24
    test: int = 24


Figures = dict[str, dict[str, float]]
"""By method: mean AUPRC over bags by sign, `+` and `-`; under `bags` the AUROC of the head and what chance gives."""


def compare(world: str, name: str, seed: int, sizes: Sizes = Sizes(), spec: FitSpec = FIT) -> Figures:
    """Train one head on one world, and measure every method that it can have."""
    torch.set_num_threads(1)
    bags, made, fold = drawn(WORLDS[world], seed, sizes)
    classes = made[0].evidence.shape[1]
    torch.manual_seed(seed)
    head = build_head(name, bags.width, classes, HEADS[name])
    fit(Plain(head), bags, fold, spec.model_copy(update={"seed": seed}), classes)
    probability = torch.softmax(predict(head, bags, fold.test).double(), 1).numpy()
    found: Figures = {"bags": {"auroc": METRICS["auroc"](probability, bags.labels[list(fold.test)])}}
    for sign in WORLDS[world].signs:
        mark = "+" if sign > 0 else "-"
        of = [i for i in fold.test if (made[i].evidence[:, TARGET] == sign).any()]
        truths = [made[i].evidence[:, TARGET] == sign for i in of]
        found["bags"][mark] = float(np.mean([t.mean() for t in truths]))
        scores = [relevance(head, bags[i]) for i in of]
        for method in scores[0]:
            turned = 1 if method == UPRIGHT else sign
            areas = [auprc(turned * s[method], t) for s, t in zip(scores, truths, strict=True)]
            found.setdefault(method, {})[mark] = float(np.mean(areas))
    return found


def drawn(world: World, seed: int, sizes: Sizes) -> tuple[Bags, tuple[ToyBag, ...], Fold]:
    """The bags of one seed, and their parts."""
    ends = np.cumsum([0, sizes.train, sizes.validation, sizes.test]).tolist()
    made = world.make(ends[-1], seed=seed)
    bags = Bags(
        [Case(f"{i}", toy.label, f"{i}") for i, toy in enumerate(made)],
        lambda case: made[int(case.image)].features,
    )
    bags.check()
    return bags, made, Fold(*(tuple(range(a, b)) for a, b in pairwise(ends)))


def relevance(head: BagHead, h: torch.Tensor) -> dict[str, np.ndarray]:
    """`(N,)` by each method that the head can have."""
    target = -torch.full((1, head.classes), 1 / head.classes)
    target[0, TARGET] += 1
    found = attribute(BagView(head, h, target), able(head))
    values = {name: one.relevance[:, 0].numpy() for name, one in found.items()}
    return {UPRIGHT: values["attention"], **values} if "attention" in values else values


def able(head: BagHead) -> list[str]:
    """Methods that a head can have."""
    names = []
    for name, row in BAG_METHODS.items():
        try:
            row.check(head)
        except ModelError:
            continue
        names.append(name)
    return names


def job(asked: tuple[str, str, int]) -> tuple[tuple[str, str, int], Figures]:
    return asked, compare(*asked)


Results = dict[tuple[str, str], list[Figures]]
"""By world and head: a `Figures` a seed."""


def spread(results: Results, world: str, head: str, method: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [figures[method][key] for figures in results[world, head]]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def columns() -> list[tuple[str, str]]:
    """World and sign of each column."""
    return [(name, "+" if s > 0 else "-") for name, world in WORLDS.items() for s in world.signs]


def table(results: Results) -> str:
    """One row a head and method; mean over seeds and its standard deviation."""
    heads = list(dict.fromkeys(head for _, head in results))
    titles = [f"{WORLDS[w].title} {'+' if s == '+' else '−'}" for w, s in columns()]
    rows = ["| " + " | ".join(["head", "method", *titles]) + " |", "| --- " * (2 + len(titles)) + "|"]
    chance = [f"{spread(results, w, heads[0], 'bags', s)[0]:.2f}" for w, s in columns()]
    rows.append("| " + " | ".join(["", "*chance: share of such tiles*", *chance]) + " |")
    for head in heads:
        area = []
        for w, s in columns():
            mean, sd = spread(results, w, head, "bags", "auroc")
            area.append(f"*{mean:.2f} ± {sd:.2f}*" if s == "+" else "")
        rows.append("| " + " | ".join([f"**`{head}`**", "*AUROC of bags*", *area]) + " |")
        for method in (*list(BAG_METHODS)[:1], UPRIGHT, *list(BAG_METHODS)[1:]):
            if method not in results[columns()[0][0], head][0]:
                continue
            cells = []
            for w, s in columns():
                mean, sd = spread(results, w, head, method, s)
                cells.append(f"{mean:.2f} ± {sd:.2f}")
            said = f"`{method}`" if method in BAG_METHODS else method
            rows.append("| " + " | ".join([f"`{head}`", said, *cells]) + " |")
    return "\n".join(rows)


def page(text: str, results: Results, facts: dict[str, str]) -> str:
    """The text with `{KEY}` and `{world:head:method:sign}` filled in."""
    for word in {w.partition("}")[0] for w in text.split("{")[1:] if ":" in w.partition("}")[0]}:
        world, head, method, key = word.split(":")
        text = text.replace("{" + word + "}", f"{spread(results, world, head, method, key)[0]:.2f}")
    for key, value in {"TABLE": table(results), **facts}.items():
        text = text.replace("{" + key + "}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="Keeps every figure; what is in it is not computed again.")
    asked = parser.parse_args()
    known: dict[str, Figures] = {}
    if asked.json and asked.json.exists():
        known = json.loads(asked.json.read_text())
    wanted = [(w, h, s) for s in range(asked.seeds) for h in HEADS for w in WORLDS]
    missing = [one for one in wanted if " ".join(map(str, one)) not in known]
    with mp.get_context("spawn").Pool(asked.processes) as pool:
        for one, figures in pool.imap_unordered(job, missing):
            known[" ".join(map(str, one))] = figures
            print(*one, f"AUROC {figures['bags']['auroc']:.3f}", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(known, indent=1))
    results: Results = {
        (w, h): [known[f"{w} {h} {s}"] for s in range(asked.seeds)] for h in HEADS for w in WORLDS
    }
    facts = {
        "SEEDS": str(asked.seeds),
        "SIZES": f"{Sizes.train} bags to learn from, {Sizes.validation} to stop by, {Sizes.test} to be measured on",
        "MACHINE": f"torch {torch.__version__}, {platform.machine()} CPU",
    }
    PAGE.write_text(page(TEXT.read_text(encoding="utf-8"), results, facts), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
