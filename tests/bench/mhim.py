"""Does MHIM find hard positive tiles that a plain head misses? `python -m tests.bench.mhim [--seeds 5] [--out FILE]`.

The bags are those of `workers.synthetic.bags.hard_bags`, whose easy and hard positives are stated there; the settings are the
published ones of `schemas.training.MHIM`. Nothing was tuned on what is measured here. The plain head is the teacher that MHIM
starts from. Recall: of the K tiles of a positive test bag that rank highest, K the number of its positive tiles, the share of
all hard ones that is among them; ranked by attention, and by what the tile adds to the positive class's margin. Differences are
paired by seed, with a 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from schemas.training import MHIM, FitSpec
from workers.metrics.localisation import auroc
from workers.models.heads.abmil import AttentionHead
from workers.models.heads.registry import build_head
from workers.synthetic.bags import HARD, REST, ToyBag, hard_bags
from workers.training.bags import Bags, Case, Fold
from workers.training.mhim import Mhim
from workers.training.mil import Plain, fit, predict

TRAIN, VALIDATION, TEST = 48, 16, 40
FIT = FitSpec(epochs=100, patience=20)
HEAD = {"hidden": 64, "size": 32, "dropout": 0.25, "attention_activation": "relu", "attention_bias": False}
EDITIONS = ("v1", "v2")
MEASURES = ("recall of hard tiles by attention", "recall of hard tiles by contribution", "AUROC of bags")


def new_head(width: int, seed: int) -> AttentionHead:
    torch.manual_seed(seed)
    head = build_head("abmil", width, 2, HEAD)
    assert isinstance(head, AttentionHead)
    return head


@torch.no_grad()
def measure(
    head: AttentionHead, bags: Bags, toys: tuple[ToyBag, ...], test: tuple[int, ...]
) -> dict[str, float]:
    """The three figures of one head on the test bags."""
    recalls: dict[str, list[float]] = {MEASURES[0]: [], MEASURES[1]: []}
    for i in test:
        kind = toys[i].kind
        if not toys[i].label:
            continue
        parts = head.parts(bags[i])
        evidence = parts.attention.T * (parts.values @ parts.weight.T)
        for name, score in zip(recalls, (parts.attention[0], evidence[:, 1] - evidence[:, 0]), strict=True):
            top = score.topk(int((kind != REST).sum())).indices.numpy()
            recalls[name].append(float((kind[top] == HARD).sum() / (kind == HARD).sum()))
    logits = predict(head, bags, test).numpy()
    area = auroc(logits[:, 1] - logits[:, 0], bags.labels[list(test)] == 1)
    return {name: float(np.mean(values)) for name, values in recalls.items()} | {MEASURES[2]: area}


def compare(seed: int) -> dict[str, dict[str, float]]:
    """By name of the training: the figures."""
    toys = hard_bags(TRAIN + VALIDATION + TEST, seed=seed)
    bags = Bags(
        [Case(f"{i}", toy.label, f"{i}") for i, toy in enumerate(toys)],
        lambda case: toys[int(case.image)].features,
    )
    bags.check()
    ends = np.cumsum([0, TRAIN, VALIDATION, TEST]).tolist()
    fold = Fold(*(tuple(range(a, b)) for a, b in pairwise(ends)))
    spec = FIT.model_copy(update={"seed": seed})
    plain = new_head(bags.width, seed)
    fit(Plain(plain), bags, fold, spec, 2)
    found = {"plain": measure(plain, bags, toys, fold.test)}
    for edition in EDITIONS:
        student = new_head(bags.width, seed + 1)
        fit(Mhim(plain, student, MHIM[edition]), bags, fold, spec, 2)
        found[edition] = measure(student, bags, toys, fold.test)
    return found


def paired(differences: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval."""
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    half = error * float(stats.t.ppf(0.975, len(differences) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = []
    for seed in range(asked.seeds):
        rows.append(compare(seed))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    document: dict[str, Any] = {"seeds": asked.seeds, "machine": platform.processor(), "rows": rows}
    for measure_name in MEASURES:
        print(f"\n{measure_name}")
        for name in ("plain", *EDITIONS):
            values = [row[name][measure_name] for row in rows]
            print(f"  {name:6} mean {np.mean(values):.3f}  seeds {' '.join(f'{v:.3f}' for v in values)}")
        for name in EDITIONS:
            difference = paired([row[name][measure_name] - row["plain"][measure_name] for row in rows])
            document.setdefault("differences", {}).setdefault(measure_name, {})[name] = difference
            print("  {} - plain: {mean:+.3f} (95 % {low:+.3f} to {high:+.3f})".format(name, **difference))
    if asked.out:
        asked.out.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
