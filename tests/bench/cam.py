"""Grad-CAM against the field's libraries and the bare forward pass: `python -m tests.bench.cam`.

Same network, same tiles, same process, in turn (A B C, A B C, ...), so that a machine whose speed drifts drifts for all;
ratios are taken round by round. Needs what tests/bench/requirements.txt lists. Nothing here asserts. With a CUDA device
it measures tiles/s in bfloat16 instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from tests.bench.contenders import CASES, TARGET, Case, Run, bare, contenders, difference, pgc, prepared
from tests.bench.memory import peak_memory
from tests.parity.gradcam_library import pytorch_grad_cam
from workers.cam.capture import HookedNet
from workers.cam.eigen import eigencam
from workers.cam.explain import explain
from workers.cam.score import constant_channels
from workers.cam.targets import ResolvedTarget
from workers.models.fast import accelerate, tiers

COSTLY = ("eigen", "ablation", "score")


def timed(run: Run) -> tuple[float, Tensor | None]:
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        found = run()
    return time.perf_counter() - began, found


def in_turn(
    runs: dict[str, Run], rounds: int, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each by round, and what each gave last."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    maps: dict[str, Any] = {}
    for n in range(rounds + warm):
        # There and back again: who comes first in a round does not gain or lose by it.
        for name, run in list(runs.items())[:: -1 if n % 2 else 1]:
            took, maps[name] = timed(run)
            if n >= warm:
                seconds[name].append(took)
    return seconds, maps


def ratio(a: list[float], b: list[float]) -> tuple[float, list[float]]:
    each = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(each), each


def spread(each: list[float]) -> str:
    """All of a few rounds; of many, the middle half."""
    if len(each) <= 5:
        return ", ".join(f"{r:.3f}" for r in each)
    low, _, high = statistics.quantiles(each, n=4)
    return f"middle half {low:.3f} to {high:.3f} of {len(each)} rounds"


def compare(name: str, rounds: int, batch: int, memory: bool, among: list[str]) -> dict[str, Any]:
    """One network: every contender's seconds, difference and peak memory."""
    case = CASES[name]
    net, x = case.net(), case.x(batch)
    runs = {n: prepared(n, case, net, x) for n in contenders(case) if not among or n in among}
    seconds, maps = in_turn(runs, rounds)
    mine = maps["ours"]
    found: dict[str, Any] = {"seconds": seconds, "difference": {}, "batch": len(x), "tail": tail_share(case)}
    for n, theirs in maps.items():
        if theirs is not None and n not in ("ours", "ours, fast"):
            found["difference"][n] = difference(n, theirs, mine, case.tile[1:])
    fast = maps.get("ours, fast")
    if fast is not None:
        ranks = [
            float(spearmanr(a, b).statistic) for a, b in zip(fast.flatten(1), mine.flatten(1), strict=True)
        ]
        found["fast"] = {"rank": statistics.mean(ranks), "l2": float((fast - mine).norm() / mine.norm())}
    found["memory"] = {n: peak_memory(name, n) for n in runs} if memory else {}
    return found


def tail_share(case: Case) -> float:
    """Share of the multiplications that come after the explained layer."""
    from torch.utils.flop_counter import FlopCounterMode

    net = HookedNet(case.net(), case.layer, tokens=case.tokens)
    counts: list[float] = []
    for part in (net.trunk, net.module):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(case.x(1))
        counts.append(counter.get_total_flops())
    return 1.0 - counts[0] / counts[1]


def report(name: str, found: dict[str, Any]) -> None:
    seconds, batch = found["seconds"], found["batch"]
    print(f"\n{name}, batch {batch}, {found['tail']:.1%} of the multiplications after the layer")
    print(
        f"{'':20}{'s: median (min-max)':>24}{'tiles/s':>9}{'x bare':>8}{'x ours':>8}{'MiB/tile':>10}{'largest difference':>20}"
    )
    for n, took in seconds.items():
        seconds_text = f"{statistics.median(took):.3f} ({min(took):.3f}-{max(took):.3f})"
        memory, differ = found["memory"].get(n), found["difference"].get(n)
        print(
            f"{n:20}{seconds_text:>24}{batch / statistics.median(took):>9.1f}{ratio(took, seconds['bare'])[0]:>8.3f}"
            f"{ratio(took, seconds['ours'])[0]:>8.3f}{'' if memory is None else f'{memory:.1f}':>10}"
            f"{'' if differ is None else f'{differ:.1e}':>20}"
        )
    for wanted, a, b in (
        (f"ours / bare  (<= {bound(found):.3f})", "ours", "bare"),
        ("all classes / one  (<= 1.02)", "ours, all classes", "ours"),
        ("ours / captum  (<= 1.02)", "ours", "captum"),
        ("MONAI / ours  (>= 2.4)", "MONAI", "ours"),
        ("pytorch-grad-cam / ours  (>= 2.4)", "pytorch-grad-cam", "ours"),
        ("ours / ours, fast  (>= 1.6 in bfloat16)", "ours", "ours, fast"),
    ):
        if a in seconds and b in seconds:
            median, each = ratio(seconds[a], seconds[b])
            fastest = min(seconds[a]) / min(seconds[b])
            print(f"  {wanted:42}{median:.3f}  ({spread(each)}; of the fastest {fastest:.3f})")
    if fast := found.get("fast"):
        print(
            f"  fast against fp32: rank correlation {fast['rank']:.4f} (>= 0.99), relative L2 {fast['l2']:.1e} (<= 2e-2)"
        )


def bound(found: dict[str, Any]) -> float:
    """What may be taken over a bare forward: the gradient of the tail, or next to nothing."""
    return 1.05 if found["tail"] < 0.005 else 1 + 1.15 * found["tail"]


def costly(rounds: int, which: list[str]) -> dict[str, Any]:
    """Methods that the field runs the network for, once a channel."""
    found: dict[str, Any] = {}
    target = [ResolvedTarget(str(TARGET), TARGET)]

    def mine(case: Case, x: Tensor, method: str) -> Run:
        split = HookedNet(case.net().requires_grad_(False), case.layer)
        return lambda: next(iter(explain(split, x, target, [method]).maps.values()))[:, 0]

    def pair(
        label: str, name: str, method: str, theirs: str, batch: int, rounds: int, **options: Any
    ) -> None:
        case = CASES[name]
        x = case.x(batch)
        runs = {
            "ours": mine(case, x, method),
            "pytorch-grad-cam": pgc(case.net(), case, x, theirs, **options),
        }
        timed(runs["ours"])  # proves the head
        seconds, maps = in_turn(runs, rounds, warm=False)
        differ = difference("pytorch-grad-cam", maps["pytorch-grad-cam"], maps["ours"], case.tile[1:])
        found[label] = {"seconds": seconds, "difference": differ}

    if "eigen" in which:
        a = torch.randn(16, 2048, 7, 7, generator=torch.Generator().manual_seed(0)).relu()
        library = pytorch_grad_cam()
        project = library.utils.svd_on_activations.get_2d_projection
        runs: dict[str, Run] = {
            "ours": lambda: eigencam(a.flatten(2), centred=True)[0],
            "pytorch-grad-cam": lambda: torch.from_numpy(project(a.numpy().copy())).flatten(1),
        }
        seconds, maps = in_turn(runs, rounds)
        p, q = maps["ours"], maps["pytorch-grad-cam"]
        q = q * (p * q).sum(1, keepdim=True).sign()
        found["Eigen-CAM projection, 2048 channels  (>= 10)"] = {
            "seconds": seconds, "difference": float((p - q).abs().max() / p.abs().max()),
        }  # fmt: skip
        pair("Eigen-CAM end to end, ResNet-50", "resnet50", "eigencam+centred=true", "EigenCAM", 4, rounds)
        found["Eigen-CAM end to end, ResNet-50"]["difference"] = None  # its sign is left to LAPACK
    if "ablation" in which:
        pair(
            "Ablation-CAM, ResNet-18, one tile  (>= 50)",
            "resnet18",
            "ablationcam+divisor=score",
            "AblationCAM",
            1,
            1,
        )
    if "score" in which:
        case = CASES["resnet18"]
        split = HookedNet(case.net(), case.layer)
        constant = constant_channels(split.trunk(case.x(1)).flatten(2)).float().mean()
        label = (
            f"Score-CAM, ResNet-18, one tile, {constant:.1%} of the channels constant  (>= 1.5 or said why)"
        )
        pair(label, "resnet18", "scorecam+mask=pgc", "ScoreCAM", 1, 1)
    return found


def report_costly(found: dict[str, Any]) -> None:
    for label, part in found.items():
        median, each = ratio(part["seconds"]["pytorch-grad-cam"], part["seconds"]["ours"])
        took = ", ".join(f"{n} {statistics.median(s):.4f} s" for n, s in part["seconds"].items())
        differ = part["difference"]
        print(f"\n{label}\n  {took}; {median:.1f} times ({', '.join(f'{r:.1f}' for r in each)})"
              + ("" if differ is None else f"; largest difference {differ:.1e}"))  # fmt: skip


def on_gpu(rounds: int, batch: int = 256) -> dict[str, Any]:
    """Tiles/s in bfloat16: our maps against the bare forward of the same network, with and without `torch.compile`."""
    found: dict[str, Any] = {}
    for name in ("resnet50", "vit-b"):
        case = CASES[name]
        x = case.x(batch).cuda()
        target = [ResolvedTarget(str(TARGET), TARGET)]
        runs: dict[str, Run] = {}
        for compiled in (False, True):
            net = HookedNet(case.net().cuda().requires_grad_(False), case.layer, tokens=case.tokens)
            accelerate(net, "fast-bf16", x[:2])
            if compiled:
                compile_blocks(net)
            suffix = ", compiled" if compiled else ""
            runs["bare" + suffix] = partial(_synchronised, bare(net.module, case, x))
            runs["ours" + suffix] = partial(_synchronised, partial(_maps, net, x, target))
        seconds, _ = in_turn(runs, rounds)
        found[name] = seconds
        print(f"\n{name}, batch {batch}, bfloat16, {torch.cuda.get_device_name()}")
        for n, took in seconds.items():
            base = seconds["bare, compiled" if n.endswith("compiled") else "bare"]
            print(
                f"{n:20}{batch / statistics.median(took):>10.0f} tiles/s  {1 / ratio(took, base)[0]:.3f} of the bare forward's"
            )
    return found


def _maps(net: HookedNet, x: Tensor, target: list[ResolvedTarget]) -> Tensor:
    return explain(net, x, target, ["gradcam"]).maps["gradcam"]


def _synchronised(run: Run) -> Tensor | None:
    found = run()
    torch.cuda.synchronize()
    return found


def compile_blocks(net: HookedNet) -> None:
    """Compile the largest modules that do not hold the explained layer inside, in place.

    Only their `forward`, so that the hook on the explained layer fires. On a CPU it took a minute and a half and gained nothing.
    """

    def visit(module: torch.nn.Module) -> None:
        for child in module.children():
            inside = net.target in child.modules() and child is not net.target
            if inside or isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
                visit(child)
            else:
                child.forward = torch.compile(child.forward)

    visit(net.module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help=f"of {', '.join((*CASES, *COSTLY))}, separated by commas")
    parser.add_argument("--among", default="", help="contenders, separated by slashes; default: all")
    parser.add_argument(
        "--batch", type=int, default=0, help="tiles; default: 32, volumes 4, ViT-B 8, on a GPU 256"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, a process a contender")
    parser.add_argument("--json", default="", help="file for the raw figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    only = args.only.split(",") if args.only else [*CASES, *COSTLY]
    if unknown := set(only) - {*CASES, *COSTLY}:
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join((*CASES, *COSTLY))}")
    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        found["gpu"] = on_gpu(args.rounds, args.batch or 256)
    else:
        tier = tiers("fast", "cpu")[0]
        print(
            f"{args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, fast = {tier}",
            flush=True,
        )
        for name in [n for n in CASES if n in only]:
            found[name] = compare(
                name, args.rounds, args.batch, not args.no_memory, args.among.split("/") if args.among else []
            )
            report(name, found[name])
        found["costly"] = costly(args.rounds, only)
        report_costly(found["costly"])
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
