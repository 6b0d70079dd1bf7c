"""What a bag of 100,000 tiles costs to attribute, and what forward passes would: `python -m tests.bench.bags`.

Seconds are of one run in this process; ratios are of the same machine in the same run. Forward passes that would take hours
are timed on a sample and multiplied. Nothing here asserts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.cam.bag import BagView
from workers.cam.bag_flipping import flipping
from workers.cam.bag_methods import BAG_METHODS, attribute
from workers.models.heads.registry import build_head

CLOSED = ["attention", "instance_probability", "contribution", "keep_one", "drop_one", "gradient_input"]
FEATURES = 1024


def head(name: str, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return build_head(name, FEATURES, classes).eval()


def bag(n: int) -> Tensor:
    """`(n, 1024)` float16, non-negative as pooled activations are."""
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(1)).relu_().half()


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def attributed(name: str, n: int, classes: int, threads: int, methods: list[str]) -> dict[str, float]:
    """Seconds of all methods for all classes, and MiB that they add at their highest; in a process of its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_attributed, (name, n, classes, threads, methods))


def _attributed(name: str, n: int, classes: int, threads: int, methods: list[str]) -> dict[str, float]:
    torch.set_num_threads(threads)
    model, h = head(name, classes), bag(n)
    attribute(BagView(model, h[:512], torch.eye(classes)), methods)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here (Linux)
    before = _status("VmRSS")
    spent = time.process_time()
    took = seconds(lambda: attribute(BagView(model, h, torch.eye(classes)), methods))
    spent = time.process_time() - spent
    peak = _status("VmHWM")
    return {
        "seconds": took,
        "cpu_seconds": spent,
        "added_mib": (peak - before) / 1024,
        "process_mib": peak / 1024,
    }


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key))


def keep_and_drop(name: str, n: int, classes: int, sample: int) -> dict[str, float]:
    """Closed form of all tiles, features read included, against forward passes of a sample of them."""
    model, h = head(name, classes), bag(n).float()
    view = BagView(model, h, torch.eye(classes))
    closed = seconds(lambda: attribute(view, ["keep_one", "drop_one"]))
    found = attribute(view, ["keep_one", "drop_one"])
    tiles = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:sample].tolist()
    apart, alone, rest = 0.0, [], []
    with torch.no_grad():
        whole = model(h)
        for i in tiles:
            began = time.perf_counter()
            alone.append(model(h[i : i + 1]))
            rest.append(model(torch.cat([h[:i], h[i + 1 :]])))
            apart += time.perf_counter() - began
    error = max(
        float((found["keep_one"].relevance[tiles] - torch.stack(alone)).abs().max()),
        float((found["drop_one"].relevance[tiles] - (whole - torch.stack(rest))).abs().max()),
    )
    forwards = apart / sample * n
    return {
        "closed_s": closed,
        "forwards_s": forwards,
        "ratio": forwards / closed,
        "largest_difference": error,
    }


def flipped(name: str, n: int, classes: int, rounds: int) -> dict[str, float]:
    """Both curves of one target in 100 steps, features read included, against passes of what is left."""
    model, h, target = head(name, classes), bag(n).float(), torch.eye(classes)[:1]
    relevance = attribute(BagView(model, h, target), ["contribution"])["contribution"].relevance

    def again() -> Tensor:
        orders = [relevance[:, 0].argsort(descending=down, stable=True) for down in (True, False)]
        with torch.no_grad():
            return torch.stack([model(h[order[s * n // 100 :]]) for order in orders for s in range(100)])

    ratios, cold, warm, error = [], 0.0, 0.0, 0.0
    for _ in range(rounds):
        view = BagView(model, h, target)
        cold = seconds(lambda view=view: flipping(view, relevance))  # type: ignore[misc]
        warm = seconds(lambda view=view: flipping(view, relevance))  # type: ignore[misc]
        began = time.perf_counter()
        expected = again()
        ratios.append((time.perf_counter() - began) / cold)
        found = flipping(view, relevance)
        error = float((torch.cat([found.most[0], found.least[0]]) - expected).abs().max())
    return {"cold_s": cold, "warm_s": warm, "ratio": statistics.median(ratios), "largest_difference": error}


def main() -> None:
    """Print, and write as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found: dict[str, Any] = {}
    for name in ("abmil", "abmil_gated"):
        found[name] = {
            "closed": attributed(name, asked.tiles, asked.classes, asked.threads, CLOSED),
            "without_gradient": attributed(name, asked.tiles, asked.classes, asked.threads, CLOSED[:-1]),
            "lrp": attributed(name, asked.tiles, asked.classes, asked.threads, ["lrp"]),
        }
        for what, row in found[name].items():
            titles = {"closed": f"{len(CLOSED)} closed forms", "lrp": BAG_METHODS["lrp"].info.title}
            print(
                f"{name}, {asked.tiles:,} x {FEATURES} float16, {asked.classes} classes, {titles.get(what, what)}: "
                f"{row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of CPU), +{row['added_mib']:.0f} MiB (process {row['process_mib']:.0f} MiB)"
            )
    found["keep_drop"] = keep_and_drop("abmil", min(asked.tiles, 20_000), asked.classes, asked.sample)
    found["flipping"] = flipped("abmil", min(asked.tiles, 20_000), asked.classes, asked.rounds)
    for what in ("keep_drop", "flipping"):
        print(what, ", ".join(f"{key} {value:.4g}" for key, value in found[what].items()))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
