"""What the path costs over bare decoding and forwarding of the same tiles: `python -m tests.bench.path`.

Every figure of one run is taken on one slide, in fresh processes, in turn (A B C, A B C, ...), so that a machine
whose speed drifts drifts for all; ratios are given round by round. Nothing here asserts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing as mp
import os
import platform
import queue
import resource
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

TILE = 224
SPECK = "procedural:slide?width=500&height=500&tissue=1&seed=1"
"""A slide of a few tiles: explaining it is all start-up."""
WARM = "procedural:slide?width=4000&height=4000&tissue=1&seed=3"
"""A slide of several units: every actor gets one, and has imported and loaded what it needs."""
BATCH = 32
WIDTHS = [32, 64, 128, 256]
"""ResNet-18's blocks at half its width: on two cores a full one would hide every overhead behind its forward."""


def write_inputs(folder: Path, size: int) -> tuple[str, str]:
    """Make a pyramidal JPEG slide and a ResNet-18-like network with fixed random weights."""
    import torch
    from safetensors.torch import save_file

    from schemas.model import CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
    from workers.models.card import write_card
    from workers.models.networks import monai_network
    from workers.synthetic.slides import write_slide

    slide = folder / f"slide{size}.tiff"
    if not slide.exists():
        write_slide(slide, folder / f"slide{size}.truth.tiff", size=size, seed=1)
    args: dict[str, Any] = {
        "block": "basic",
        "layers": [2, 2, 2, 2],
        "block_inplanes": WIDTHS,
        "spatial_dims": 2,
        "n_input_channels": 3,
        "num_classes": 2,
        "conv1_t_size": 7,
        "conv1_t_stride": 2,
    }
    torch.manual_seed(0)
    save_file(monai_network("ResNet", args).state_dict(), folder / "weights.safetensors")
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    card = ModelCard(
        schema=1,
        name="bench",
        version="1",
        licence="Apache-2.0",
        intended_use="timing",
        network=NetworkSpec(
            adapter="monai", name="ResNet", args=args, weights="weights.safetensors", sha256=sha256
        ),
        input=InputSpec(kind="slide", channels=3, tile=(TILE, TILE), mpp=0.5),
        output=OutputSpec(kind="logits", classes=("a", "b"), default_target="a"),
        cam=CamLayer(layer="layer4"),
    )
    write_card(folder / "model.toml", card)
    return str(slide), str(folder / "model.toml")


def bare(slide: str, model: str, boxes: str, threads: int, part: int, parts: int) -> dict[str, float]:
    """Decode and forward tiles and do nothing else; decoding runs ahead in threads, as in the path."""
    import torch

    from schemas.geometry import Box
    from workers.allocator import keep_freed_memory
    from workers.models.card import load_card
    from workers.models.cnn import load_model
    from workers.readers import open_image

    torch.set_num_threads(threads)
    keep_freed_memory()  # as the path's workers do: what is compared is the path
    adapter = load_model(load_card(model))
    network = adapter.net.module
    every = np.load(boxes)
    mine = every[len(every) * part // parts : len(every) * (part + 1) // parts]
    began = time.perf_counter()
    reader = open_image(slide)

    def read(box: np.ndarray) -> np.ndarray:
        place = Box(frame="l0", start=tuple(box[0].tolist()), stop=tuple(box[1].tolist()))
        return reader.read(place, (TILE, TILE), 0)[0]

    with ThreadPoolExecutor(1) as decoder, torch.no_grad():
        batches = [mine[i : i + BATCH] for i in range(0, len(mine), BATCH)]
        ahead = deque([decoder.submit(lambda b: [read(x) for x in b], b) for b in batches[:3]])
        for i in range(len(batches)):
            pixels = ahead.popleft().result()
            if i + 3 < len(batches):
                ahead.append(decoder.submit(lambda b: [read(x) for x in b], batches[i + 3]))
            network(adapter.prepare(np.stack(pixels)))
    return {"seconds": time.perf_counter() - began, "tiles": float(len(mine))}


class Silent:
    """A listener that draws nothing."""

    def __call__(self, event: object) -> None: ...

    def close(self) -> None: ...


def path(
    slide: str, model: str, out: str, kind: str, workers: int, threads: int, overlap: float
) -> dict[str, Any]:
    """The whole path; `through` Prefect and Ray, or serial and direct. Start-up of Ray and Prefect is apart."""
    from flows.batch import explain_batch
    from flows.server import recorded
    from schemas.run import ExplainRequest, PoolSettings

    request = ExplainRequest(images=(slide,), model=model, out=out, overlap=overlap, batch=BATCH)
    settings = PoolSettings(kind=kind, workers=workers, threads=threads)
    startup = again = 0.0
    began = time.perf_counter()
    if kind == "serial":
        report = explain_batch(request, settings, Silent())
        seconds = time.perf_counter() - began
    else:
        with recorded(Silent(), settings) as run:
            # What starting costs, actors with their libraries and the model too: a slide of a few tiles.
            run(request.model_copy(update={"images": (SPECK,), "overlap": 0.0}), settings)
            startup = time.perf_counter() - began
            began = time.perf_counter()
            run(request.model_copy(update={"images": (SPECK.replace("seed=1", "seed=2"),)}), settings)
            again = time.perf_counter() - began
            began = time.perf_counter()
            report = run(request, settings)
            seconds = time.perf_counter() - began
    image = report.images[0]
    assert image.status == "complete", image.error
    assert image.counts is not None
    return {
        "seconds": seconds,
        "startup": startup,
        "actors": again,
        "tiles": float(image.counts.done),
        "stages": image.seconds,
        "pool": report.pool,
    }


def actors(gate: Any, answer: Any, slide: str, model: str, out: str, overlap: float) -> None:
    """Explain the slide on one one-thread actor, then on two, each time the gate says so; all started beforehand.

    Both pools stay alive and idle ones wait on Ray, so that what is timed is an image from plan to report, no start-up.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    from flows.settings import quiet_environment

    quiet_environment()
    from flows.steps import explain_image
    from schemas.image import ImageRequest
    from schemas.run import ExplainRequest, PoolSettings
    from workers.planner import open_model
    from workers.ray_pool import RayPool, start_ray, stop_ray

    start_ray(cpus=3)
    pools = {}
    request = ExplainRequest(images=(slide,), model=model, out=out, overlap=overlap, batch=BATCH)
    loaded = open_model(request)
    for count in (1, 2):
        settings = PoolSettings(kind="ray", workers=count, threads=1)
        pools[count] = RayPool(settings), settings
    for turn in itertools.count():
        count = 1 if turn < 1 else 2 if turn < 2 else gate.get()
        if not count:
            break
        pool, settings = pools[count]
        image = ImageRequest(uri=WARM if turn < 2 else slide)
        asked = request.model_copy(update={"out": f"{out}/{turn}"})
        began = time.perf_counter()
        report = explain_image(image, asked, loaded, pool, settings, Silent())
        assert report.status == "complete", report.error
        answer.put((time.perf_counter() - began, report.seconds))
    for pool, _ in pools.values():
        pool.close()
    stop_ray()


def scaling(folder: Path, slide: str, model: str, boxes: str, overlap: float, rounds: int) -> None:
    """Print what a second process gains, bare and as an actor, in turn on the same slide."""
    context = mp.get_context("spawn")
    gate, answer = context.Queue(), context.Queue()
    out = tempfile.mkdtemp(prefix="out-", dir=folder)
    driver = context.Process(target=actors, args=(gate, answer, slide, model, out, overlap))
    driver.start()

    def told() -> Any:
        while driver.is_alive():
            with contextlib.suppress(queue.Empty):
                return answer.get(timeout=5)
        msg = f"the process of the actors ended with {driver.exitcode}"
        raise RuntimeError(msg)

    for _ in range(2):
        told()
    found = []
    stages: dict[int, dict[str, float]] = {}
    for _ in range(rounds):
        seconds = {}
        for count in (1, 2):
            calls = [(bare, (slide, model, boxes, 1, part, count)) for part in range(count)]
            seconds[f"bare {count}"] = max(r["seconds"] for r in together(calls))
            gate.put(count)
            seconds[f"actors {count}"], stages[count] = told()
        found.append(seconds)
        print("  " + "  ".join(f"{name} {s:.1f} s" for name, s in seconds.items()), flush=True)
    gate.put(0)
    driver.join()
    gains = [_gains(seconds) for seconds in found]
    best = _gains({key: min(seconds[key] for seconds in found) for key in found[0]})
    for name in best:
        values = [gain[name] for gain in gains]
        spread = ", ".join(f"{v:.3f}" for v in values)
        print(
            f"scaling, {name:26}{statistics.median(values):.3f}  ({spread}); of the fastest {best[name]:.3f}"
        )
    print("\nstage by stage, one actor and two (last round; parts are summed over workers):")
    for stage in sorted(stages[1]):
        print(f"  {stage:20}{stages[1][stage]:8.2f} s{stages[2].get(stage, 0.0):8.2f} s")


def _gains(seconds: dict[str, float]) -> dict[str, float]:
    gained = {who: seconds[f"{who} 1"] / seconds[f"{who} 2"] for who in ("bare", "actors")}
    return gained | {"actors / bare  (>= 0.93)": gained["actors"] / gained["bare"]}


def in_process(target: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run in a fresh process; adds its peak memory and that of its children."""
    return together([(target, args)])[0]


def together(calls: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """Run each call in a fresh process of its own, all at once."""
    context = mp.get_context("spawn")
    gate = context.Barrier(len(calls))
    queue: Any = context.Queue()
    processes = [
        context.Process(target=_child, args=(queue, gate, i, target, args))
        for i, (target, args) in enumerate(calls)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[i] for i in range(len(calls))]


def _child(
    queue: Any, gate: Any, index: int, target: Callable[..., dict[str, Any]], args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    from flows.settings import quiet_environment

    quiet_environment()
    import torch  # noqa: F401  (imports are start-up, not work)

    import workers.models.cnn  # noqa: F401

    gate.wait()
    result = target(*args)
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["peak_mib"] = max(usage) / 1024
    queue.put((index, result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192, help="side of the slide in pixels")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", default="", help="folder to make the inputs in, and keep")
    parser.add_argument("--part", choices=("all", "overhead", "scaling"), default="all")
    parser.add_argument("--json", default="", help="file for the raw figures")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="gigacam-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    slide, model = write_inputs(folder, args.size)
    boxes = str(folder / "boxes.npy")
    count = in_process(plan_boxes, slide, model, boxes, args.overlap)["tiles"]
    cores = os.cpu_count() or 1
    print(
        f"{count:.0f} tissue tiles of {TILE} px; {cores} cores, Python {platform.python_version()}",
        flush=True,
    )
    if args.part != "scaling":
        rounds = [_round(folder, slide, model, boxes, cores, args.overlap) for _ in range(args.rounds)]
        report(rounds, count)
        if args.json:
            Path(args.json).write_text(json.dumps(rounds, indent=2))
    if args.part != "overhead":
        scaling(folder, slide, model, boxes, args.overlap, args.rounds)
    if not args.keep:
        shutil.rmtree(folder)


def plan_boxes(slide: str, model: str, boxes: str, overlap: float) -> dict[str, float]:
    """Plan the slide as the path will, and save the boxes of its tiles."""
    from schemas.image import ImageRequest
    from schemas.run import ExplainRequest
    from workers.planner import open_model, plan_image

    request = ExplainRequest(images=(slide,), model=model, out="unused", overlap=overlap)
    job = plan_image(ImageRequest(uri=slide), request, open_model(request))
    np.save(boxes, job.plan.boxes[: job.plan.planned])
    return {"tiles": float(job.plan.planned)}


def _round(folder: Path, slide: str, model: str, boxes: str, cores: int, overlap: float) -> dict[str, Any]:
    def out() -> str:
        return tempfile.mkdtemp(prefix="out-", dir=folder)

    found = {
        "bare": in_process(bare, slide, model, boxes, cores, 0, 1),
        "serial": in_process(path, slide, model, out(), "serial", 1, cores, overlap),
        "ray": in_process(path, slide, model, out(), "ray", 1, cores, overlap),
    }
    print("  " + "  ".join(f"{name} {r['seconds']:.1f} s" for name, r in found.items()), flush=True)
    return found


def report(rounds: list[dict[str, Any]], tiles: float) -> None:
    """Print medians with their spread, the ratios round by round, and where the time goes."""
    print(f"\n{'':28}{'seconds: median (min-max)':>30}{'tiles/s':>10}{'peak MiB':>10}")
    for name in rounds[0]:
        seconds = [r[name]["seconds"] for r in rounds]
        median = statistics.median(seconds)
        peak = max(r[name]["peak_mib"] for r in rounds)
        spread = f"{median:.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
        print(f"{name:28}{spread:>30}{tiles / median:>10.1f}{peak:>10.0f}")
    ratios = {
        "serial / bare  (<= 1.25)": [r["serial"]["seconds"] / r["bare"]["seconds"] for r in rounds],
        "Prefect + Ray / bare": [r["ray"]["seconds"] / r["bare"]["seconds"] for r in rounds],
        "the same less start-up  (<= 1.35)": [
            (r["ray"]["seconds"] - r["ray"]["actors"]) / r["bare"]["seconds"] for r in rounds
        ],
    }
    print()
    for name, values in ratios.items():
        spread = ", ".join(f"{v:.3f}" for v in values)
        print(f"{name:36}{statistics.median(values):.3f}  ({spread})")
    for what, key in (
        ("first start-up of Prefect, Ray and actors", "startup"),
        ("start-up of a further run", "actors"),
    ):
        print(f"{what:44}{statistics.median(r['ray'][key] for r in rounds):.1f} s")
    for name in ("serial", "ray"):
        stages = rounds[-1][name]["stages"]
        print(f"\n{name}, stage by stage (last round; parts are summed over workers):")
        for stage, seconds in sorted(stages.items()):
            print(f"  {stage:20}{seconds:8.2f} s")


if __name__ == "__main__":
    main()
