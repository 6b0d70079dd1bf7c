"""How far each method's maps of one network can be trusted: class sensitivity, robustness and cost, on given tiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import ModelError
from schemas.geometry import Box
from schemas.image import ReadOptions
from workers.cam.capture import SplitNet
from workers.cam.explain import Explained, explain
from workers.cam.methods import method
from workers.cam.noise import NoisyNet
from workers.cam.reduce import collect, solve
from workers.cam.targets import ResolvedTarget, class_names, resolve
from workers.evaluator import at_centres
from workers.metrics.sensitivity import Measured, Robustness, class_sensitivity, robustness
from workers.models.adapter import ModelAdapter
from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.readers import open_image

NOISE = 0.1
"""Standard deviation of the noise on gradients, as a share of the gradient's own."""
VANISHING = 1e-30
"""Noise lost in rounding: what noise is compared with takes the same way through the engine, so that bits can tell."""
TIMED_S = 1.0
"""A quick method is timed again until so much time is spent."""
TIMED_MOST = 5
WINDOWS_PX = (1536, 2048, 3072)
WINDOW_SHARE = 0.03
"""Of a window's area that each planted thing should cover."""
TRUTH_PX = 1024
"""Longest side at which a truth is looked through for places."""


@dataclass(frozen=True)
class Trust:
    """One method on one network's tiles."""

    method: str
    reason: str = ""
    """Why the network cannot take the method; nothing else is known then."""
    seconds_per_1000: float = float("nan")
    """Of tiles, one target each, after a first pass over the same tiles; reading them is not counted. On a CPU, its own time."""
    sensitivity: Measured | None = None
    """Rank correlation of the maps for the highest and the lowest class."""
    robustness: Robustness | None = None
    """None: the method uses no gradient of the layer or the input; one at attention matrices is not noised."""


def measure(model: ModelAdapter, pixels: NDArray[Any], name: str, *, noise: float = NOISE) -> Trust:
    """Measure one method alone.

    Parameters
    ----------
    model
        The network, on the device that is timed.
    pixels
        `(B, C_in, *S)` as read; all are explained in one batch.
    name
        Of `workers.cam.methods.METHODS`, options included.
    noise
        Of the robustness test, as a share of the gradient's own standard deviation; 0 leaves the test out.
    """
    x = model.prepare(pixels)
    classes, one = both_classes(model), target_of(model)
    try:
        found = explained(model.net, x, classes, name)
    except ModelError as error:
        return Trust(name, reason=str(error))
    plain = found.maps[name].cpu().numpy()
    sensitivity = class_sensitivity(plain, found.scores.cpu().numpy(), tuple(x.shape[2:]))
    robust = None
    if noise and "gradients" in method(name).info.needs:
        still, noisy = (
            explained(model.net, x, one, name, n).maps[name].cpu().numpy() for n in (VANISHING, noise)
        )
        robust = robustness(still[:, 0], noisy[:, 0])
    # Of one thread, on a machine that others use too, the processor's time is what an idle one would take.
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    seconds: list[float] = []
    while len(seconds) < TIMED_MOST and sum(seconds) < TIMED_S:
        began = clock()
        explained(model.net, x, one, name).maps[name].cpu()  # done only when it is on the host
        seconds.append(clock() - began)
    per_1000 = statistics.median(seconds) * 1000 / len(pixels)
    return Trust(name, seconds_per_1000=per_1000, sensitivity=sensitivity, robustness=robust)


def both_classes(model: ModelAdapter) -> tuple[ResolvedTarget, ...]:
    """Every class as a target; of a one-logit network, both its signs."""
    output = model.card.output
    return resolve(class_names(output, model.n_outputs), output, model.n_outputs)


def target_of(model: ModelAdapter) -> tuple[ResolvedTarget, ...]:
    """The card's default target alone, else class 0."""
    output, n = model.card.output, model.n_outputs
    return resolve([output.default_target or class_names(output, n)[0]], output, n)


def explained(
    net: SplitNet, x: Tensor, targets: Sequence[ResolvedTarget], name: str, gradient_noise: float = 0.0
) -> Explained:
    """One method's maps; for one that needs the whole image, the batch is the image."""
    states = {}
    if method(name).slide is not None:
        seen = NoisyNet(net, gradient_noise, torch.arange(len(x))) if gradient_noise else net
        states = {name: solve(name, collect(seen, x, targets, [name], range(len(x)))[name])}
    return explain(net, x, targets, [name], gradient_noise=gradient_noise, states=states)


def planted_tiles(
    image: str, truth: str, tile: tuple[int, ...], values: tuple[int, ...], each: int, seed: int
) -> NDArray[Any]:
    """Level-0 tiles of an image around what was planted in it.

    Parameters
    ----------
    truth
        Image of the same size.
    values
        Values of the truth: a tile holds a pixel of one of them, anywhere in its inner half.
    each
        How many tiles for each value.

    Returns
    -------
    NDArray
        `(len(values) * each, C, *tile)`, the values in turn.
    """
    rng = np.random.default_rng(seed)
    reader = open_image(image)
    size = np.array(reader.meta.shape_l0)
    step = max(1, int(size.max()) // TRUTH_PX)
    labels = at_centres(truth, ReadOptions(), tuple(-(-size // step)), step)
    places = [rng.permutation(np.argwhere(labels == value))[:each] * step for value in values]
    tiles = []
    for centre in np.stack(places, axis=1).reshape(-1, len(size)):
        shift = rng.integers(-(np.array(tile) // 4), np.array(tile) // 4 + 1)
        start = np.clip(centre + shift - np.array(tile) // 2, 0, size - tile)
        box = Box(frame="l0", start=tuple(start.tolist()), stop=tuple((start + tile).tolist()))
        tiles.append(reader.read(box, tile, 0)[0])
    reader.close()
    return np.stack(tiles)


def survey(
    card: str, image: str, truth: str, values: tuple[int, ...], methods: Sequence[str], each: int, seed: int
) -> tuple[Trust, ...]:
    """Measure methods, each alone, on tiles of an image around what was planted in it; see `measure`, `planted_tiles`."""
    model = load_model(load_card(card))
    tiles = planted_tiles(image, truth, model.card.input.tile, values, each, seed)
    return tuple(measure(model, tiles, name) for name in methods)


def busiest_window(truth: str, values: tuple[int, ...]) -> Box:
    """A square of a slide that holds much of each of the planted `values`: the smallest of a few sizes that does."""
    reader = open_image(truth)
    size = reader.meta.shape_l0
    reader.close()
    step = max(1, max(size) // TRUTH_PX)
    labels = at_centres(truth, ReadOptions(), tuple(-(-n // step) for n in size), step)
    for side in (*(s for s in WINDOWS_PX if s < min(size)), min(size)):
        cells = side // step
        corner = tuple(n - cells + 1 for n in labels.shape)
        sums = [np.cumsum(np.cumsum(np.pad(labels == v, ((1, 0), (1, 0))), 0), 1) for v in values]
        shares = np.min(
            [s[cells:, cells:] - s[:-cells, cells:] - s[cells:, :-cells] + s[:-cells, :-cells] for s in sums], axis=0
        ) / cells**2  # fmt: skip
        y, x = np.unravel_index(int(shares.argmax()), corner)
        if shares.max() >= WINDOW_SHARE:
            break
    start = (int(y) * step, int(x) * step)
    return Box(frame="l0", start=start, stop=tuple(s + cells * step for s in start))
