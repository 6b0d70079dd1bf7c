"""The demo's networks: cards that load, and a loop that learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from workers.models.card import load_card
from workers.models.cnn import load_model
from workers.synthetic import models
from workers.synthetic.models import train_slide_model, train_volume_model
from workers.training.fit import fit, turn_and_jitter_tiles, turn_and_jitter_volumes


def stripes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles with rising or falling diagonal stripes, and which is which; the third column is noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    rising = rng.random(n) < 0.5
    phase = rng.uniform(0, 2 * np.pi, n)
    wave = np.where(rising[:, None, None], y + x, y - x) * 1.3 + phase[:, None, None]
    tiles = (128 + 60 * np.sin(wave))[:, None] + rng.normal(0, 10, (n, 1, 16, 16))
    labels = np.stack([rising, ~rising, rng.random(n) < 0.5], axis=1)
    return tiles.astype(np.float32), labels.astype(np.float32)


def small_net(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)
        )


def scaled(raw: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(raw) - 128) / 60


def test_loss_falls_and_what_is_masked_is_not_learned() -> None:
    x, y = stripes(256, 1)
    mask = np.ones(y.shape, np.bool_)
    mask[:, 2] = False
    net = small_net(3)
    before = net[4].weight[2].detach().clone()  # type: ignore[index]
    seen: list[tuple[int, int]] = []
    losses = fit(
        net,
        x,
        y,
        mask=mask,
        prepare=scaled,
        augment=turn_and_jitter_tiles,
        seed=1,
        steps=80,
        learning_rate=0.02,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert seen[-1] == (80, 80)
    assert not net.training
    # weight decay alone moves the masked output's weights, all by one factor
    ratio = (net[4].weight[2] / before).detach()  # type: ignore[index]
    torch.testing.assert_close(ratio, ratio[0].expand(8), rtol=1e-3, atol=0.0)


def test_equal_seeds_train_equal_weights() -> None:
    x, y = stripes(64, 1)
    nets = [small_net(3) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        fit(net, x, y, prepare=scaled, augment=turn_and_jitter_tiles, seed=seed, steps=4)
    first, again, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tile_augmentation_keeps_the_direction_of_nuclei() -> None:
    """A turned tile is one of two; a mirrored one would be another class."""
    x, _ = stripes(40, 2)
    images = torch.from_numpy(x)
    changed = turn_and_jitter_tiles(images, torch.Generator().manual_seed(0))
    turned = 0
    for before, after in zip(images[:, 0], changed[:, 0], strict=True):
        alike = [
            float(torch.corrcoef(torch.stack([after.flatten(), b.flatten()]))[0, 1])
            for b in (before, before.flip(0, 1))
        ]
        assert max(alike) == pytest.approx(1.0, abs=1e-4)
        turned += alike[1] > alike[0]
    assert 8 < turned < 32


def test_volume_augmentation_keeps_values_up_to_gain_and_offset() -> None:
    images = torch.randn(6, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = turn_and_jitter_volumes(images, torch.Generator().manual_seed(2))
    assert changed.shape == images.shape
    for before, after in zip(images, changed, strict=True):
        a, b = before.flatten().sort().values, after.flatten().sort().values
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(1.0, abs=1e-5)
    assert not torch.allclose(images, changed)


def test_models_train_and_load_through_their_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps only; what full training reaches is measured by the demo itself."""
    monkeypatch.setattr(models, "_SLIDE_STEPS", 2)
    monkeypatch.setattr(models, "_VOLUME_STEPS", 2)
    monkeypatch.setattr(models, "_VOLUME_CROPS", 12)
    monkeypatch.setattr(models, "_TRAINING_SLIDE_PX", 1024)
    slide = load_card(train_slide_model(tmp_path / "slide", 1))
    volume = load_card(train_volume_model(tmp_path / "volume", 1))
    assert slide.card.output.classes == ("distractor", "lesion")
    assert volume.card.output.default_target == "rim+"
    for loaded, cell in ((slide, 16.0), (volume, 4.0)):
        model = load_model(loaded)
        assert model.cells.cell_px == (cell,) * len(loaded.card.input.tile)
        pixels = np.full((2, loaded.card.input.channels, *loaded.card.input.tile), 50, np.float32)
        assert torch.isfinite(model.scores(model.prepare(pixels))).all()
