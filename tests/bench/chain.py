"""What pixel maps of a slide's decision cost over the encoder's forward passes: `python -m tests.bench.chain`.

Once a batch in memory (the chained maps against the bare forward of the same encoder, in turn), and once a whole slide
(embed, attribute, explain against forwarding its tiles twice). Nothing here asserts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.bench.cam import in_turn, ratio, spread
from tests.bench.contenders import Case as Network
from tests.bench.contenders import First, bare
from tests.bench.path import BATCH, TILE, WIDTHS, in_process, path, plan_boxes, write_inputs
from tests.test_workers.tiny_networks import lively
from workers.cam.capture import HookedNet
from workers.cam.explain import explain
from workers.cam.targets import TileTarget
from workers.cam.tokens import TokenLayout


def resnet(block: str, layers: list[int]) -> nn.Module:
    """Its pooled features are the embedding."""
    from monai.networks.nets.resnet import ResNet

    widths = [64, 128, 256, 512]
    return ResNet(
        block, layers, widths, spatial_dims=2, n_input_channels=3, conv1_t_size=7, conv1_t_stride=2,
        feed_forward=False,
    )  # fmt: skip


def vit() -> nn.Module:
    """Its class token is the embedding."""
    from monai.networks.nets.vit import ViT

    net = ViT(
        3, (224, 224), (16, 16), hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12, proj_type="conv",
        classification=True, num_classes=2, spatial_dims=2,
    )  # fmt: skip
    net.classification_head = nn.Sequential()  # does nothing
    return First(net)


ENCODERS = {
    "resnet18": (Network(lambda: resnet("basic", [2, 2, 2, 2]), "layer4", (3, 224, 224), 32), 1.10),
    "resnet50": (Network(lambda: resnet("bottleneck", [3, 4, 6, 3]), "layer4", (3, 224, 224), 32), 1.10),
    "resnet18-layer3": (Network(lambda: resnet("basic", [2, 2, 2, 2]), "layer3", (3, 224, 224), 32), 1.35),
    "vit-b": (
        Network(vit, "net.blocks.11.norm1", (3, 224, 224), 8, TokenLayout("tokens", 1, (14, 14))), 1.35,
    ),
}  # fmt: skip
"""Network and what it may take over the bare forward: the first two end in pooling at the explained layer."""


def chained(name: str, rounds: int) -> None:
    """Print seconds of one batch: bare, and explained for one target of the slide."""
    case, wanted = ENCODERS[name]
    net, x = lively(case.net()).eval().requires_grad_(False), case.x()
    with torch.no_grad():
        width = net(x[:1]).shape[1]
    v = torch.randn(len(x), width, generator=torch.Generator().manual_seed(2))
    split = HookedNet(net, case.layer, tokens=case.tokens)

    def maps() -> torch.Tensor:
        return explain(split, x, [TileTarget("slide", v)], ["hirescam"]).maps["hirescam"]

    seconds, _ = in_turn({"bare": bare(net, case, x), "chained": maps}, rounds)
    median, each = ratio(seconds["chained"], seconds["bare"])
    fastest = min(seconds["chained"]) / min(seconds["bare"])
    took = "  ".join(f"{n} {statistics.median(s):.3f} s" for n, s in seconds.items())
    print(
        f"{name:18}{took}  chained / bare (<= {wanted:.2f}) {median:.3f} ({spread(each)}; of the fastest {fastest:.3f})"
    )


def write_bag_card(folder: Path) -> str:
    """ResNet-18-like at half width, and an ABMIL head, both with fixed random weights."""
    from safetensors.torch import save_file

    from schemas.model import BagSpec, CamLayer, InputSpec, ModelCard, NetworkSpec, OutputSpec
    from workers.models.card import write_card
    from workers.models.heads.registry import build_head
    from workers.models.networks import monai_network

    args: dict[str, Any] = {
        "block": "basic", "layers": [2, 2, 2, 2], "block_inplanes": WIDTHS, "spatial_dims": 2, "n_input_channels": 3,
        "conv1_t_size": 7, "conv1_t_stride": 2, "feed_forward": False,
    }  # fmt: skip
    torch.manual_seed(0)
    parts = {"encoder": monai_network("ResNet", args), "head": build_head("abmil", WIDTHS[-1], 2, {})}
    for name, module in parts.items():
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    sha = {n: hashlib.sha256((folder / f"{n}.safetensors").read_bytes()).hexdigest() for n in parts}
    card = ModelCard(
        schema=1,
        name="bench of bags",
        version="1",
        licence="Apache-2.0",
        intended_use="timing",
        network=NetworkSpec(
            adapter="monai", name="ResNet", args=args, weights="encoder.safetensors", sha256=sha["encoder"]
        ),
        input=InputSpec(kind="slide", channels=3, tile=(TILE, TILE), mpp=0.5),
        output=OutputSpec(kind="logits", classes=("a", "b"), default_target="a"),
        cam=CamLayer(layer="layer4"),
        bag=BagSpec(head="abmil", weights="head.safetensors", sha256=sha["head"], features=WIDTHS[-1]),
    )
    write_card(folder / "bag.toml", card)
    return str(folder / "bag.toml")


def forwards(model: str, tiles: int, threads: int) -> dict[str, float]:
    """Seconds of forwarding so many tiles that lie in memory."""
    from workers.allocator import keep_freed_memory
    from workers.models.card import load_card
    from workers.models.cnn import load_model

    torch.set_num_threads(threads)
    keep_freed_memory()
    net = load_model(load_card(model)).net.module
    x = torch.randn(BATCH, 3, TILE, TILE)
    with torch.no_grad():
        net(x)
        began = time.perf_counter()
        for first in range(0, tiles, BATCH):
            net(x[: tiles - first])
    return {"seconds": time.perf_counter() - began}


def slide(folder: Path, size: int, overlap: float, rounds: int) -> None:
    """Print what a whole slide takes beyond forwarding its tiles twice."""
    image, _ = write_inputs(folder, size)
    model = write_bag_card(folder)
    cores = os.cpu_count() or 1
    tiles = int(in_process(plan_boxes, image, model, str(folder / "boxes-bag.npy"), overlap)["tiles"])
    shares, own = [], []
    for _ in range(rounds):
        alone = in_process(forwards, model, tiles, cores)["seconds"]
        out = tempfile.mkdtemp(prefix="out-", dir=folder)
        stages = in_process(path, image, model, out, "serial", 1, cores, overlap)["stages"]
        again = in_process(forwards, model, tiles, cores)["seconds"]
        inside = sum(s for name, s in stages.items() if name.endswith("compute"))
        shares.append(1 - (alone + again) / stages["all"])
        own.append(1 - inside / stages["all"])
        print(
            f"  {tiles} tiles: forwarded twice {alone + again:.1f} s, the image {stages['all']:.1f} s, of it in the encoder {inside:.1f} s",
            flush=True,
        )
    for label, values in (
        ("all but the bare forwards / wall (< 0.20)", shares),
        ("all but the encoder's stages / wall", own),
    ):
        print(f"{label:44}{statistics.median(values):.3f}  ({', '.join(f'{v:.3f}' for v in values)})")
    print("stage by stage (last round):")
    for stage, seconds in sorted(stages.items()):
        print(f"  {stage:24}{seconds:8.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of the batch in memory")
    parser.add_argument("--slide-rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=8192, help="side of the slide in pixels")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--keep", default="", help="folder to make the inputs in, and keep")
    args = parser.parse_args()
    for name in ENCODERS:
        chained(name, args.rounds)
    folder = Path(args.keep or tempfile.mkdtemp(prefix="gigacam-bench-"))
    slide(folder, args.size, args.overlap, args.slide_rounds)
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
