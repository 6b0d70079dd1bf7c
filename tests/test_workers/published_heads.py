"""Bag heads under the names of their published checkpoints, written slowly from their papers: one tile, one head, one class
at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 12, 3


class Named(nn.Module):
    """A module whose parts are got by their published names."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Clam(Named):
    """CLAM: `gated` or not, an attention a class or one, with dropout layers (which move the names) or without."""

    def __init__(self, *, gated: bool = True, per_class: bool = False, dropout: bool = True) -> None:
        super().__init__()
        branches = CLASSES if per_class else 1
        drop = [nn.Dropout(0.25)] if dropout else []
        attention: Named
        if gated:
            attention = Named()
            attention.attention_a = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), *drop)
            attention.attention_b = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), *drop)
            attention.attention_c = nn.Linear(6, branches)
        else:
            attention = Named()
            attention.module = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), *drop, nn.Linear(6, branches))
        self.gated, self.per_class = gated, per_class
        self.attention_net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), *drop, attention)
        self.classifiers: Any = nn.Linear(8, CLASSES)
        if per_class:
            self.classifiers = nn.ModuleList([nn.Linear(8, 1) for _ in range(CLASSES)])
        self.instance_classifiers = nn.ModuleList([nn.Linear(8, 2) for _ in range(CLASSES)])

    def forward(self, h: Tensor) -> Tensor:
        f = self.attention_net[:-1](h)
        net: Any = self.attention_net[-1]
        raw = net.attention_c(net.attention_a(f) * net.attention_b(f)) if self.gated else net.module(f)
        logits = []
        for c in range(CLASSES):
            e = raw[:, c if self.per_class else 0].exp()
            z = sum(e[i] / e.sum() * f[i] for i in range(len(f)))
            logits.append(self.classifiers[c](z)[0] if self.per_class else self.classifiers(z)[c])
        return torch.stack(logits)


class Abmil(Named):
    """ABMIL as published with the paper (`feature_extractor_part2`; gated: V, U, w) or in MHIM-MIL's edition (`feature`;
    gated: a, b, c)."""

    def __init__(self, *, gated: bool = False, names: str = "paper", bias: bool = True) -> None:
        super().__init__()
        paper = names == "paper"
        self.first = "feature_extractor_part2" if paper else "feature"
        setattr(self, self.first, nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU()))
        self.inner, self.gate, self.outer = (
            (f"attention_{n}" for n in ("V", "U", "w"))
            if paper
            else (f"attention_{n}" for n in ("a", "b", "c"))
        )
        self.gated = gated
        if gated:
            setattr(self, self.inner, nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh()))
            setattr(self, self.gate, nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Sigmoid()))
            setattr(self, self.outer, nn.Linear(6, 1, bias=bias))
        else:
            self.attention = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 1, bias=bias))
        self.classifier = nn.Sequential(nn.Linear(8, CLASSES))

    def forward(self, h: Tensor) -> Tensor:
        f = getattr(self, self.first)(h)
        if self.gated:
            raw = getattr(self, self.outer)(getattr(self, self.inner)(f) * getattr(self, self.gate)(f))
        else:
            raw = self.attention(f)
        e = raw[:, 0].exp()
        out: Tensor = self.classifier(sum(e[i] / e.sum() * f[i] for i in range(len(f))))
        return out


class Dsmil(Named):
    """DSMIL in MHIM-MIL's edition."""

    def __init__(self) -> None:
        super().__init__()
        self.i_classifier = Named()
        self.i_classifier.embed = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU())
        self.i_classifier.fc = nn.Sequential(nn.Linear(8, CLASSES))
        self.b_classifier = Named()
        self.b_classifier.q = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
        self.b_classifier.v = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU())
        self.b_classifier.fcc = nn.Conv1d(CLASSES, CLASSES, 8)

    def forward(self, h: Tensor) -> Tensor:
        f = self.i_classifier.embed(h)
        c = self.i_classifier.fc(f)
        rows = []
        for k in range(CLASSES):
            critical = self.b_classifier.q(f[c[:, k].argmax()])
            e = torch.stack([(self.b_classifier.q(t) @ critical / 6**0.5).exp() for t in f])
            rows.append(sum(e[i] / e.sum() * self.b_classifier.v(f[i]) for i in range(len(f))))
        bag = torch.stack(rows)
        w, b = self.b_classifier.fcc.weight, self.b_classifier.fcc.bias
        logits = torch.stack([(w[k] * bag).sum() + b[k] for k in range(CLASSES)])
        out: Tensor = (logits + c.max(0).values) / 2
        return out


class Nystrom(Named):
    def __init__(self, width: int, heads: int, landmarks: int) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.res_conv = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Whole attention `(heads, n', n')` and values `(heads, n', d)`, of the sequence with zeros in front."""
        n, width = x.shape
        fill = -n % self.landmarks
        x = torch.cat([x.new_zeros(fill, width), x])
        d = width // self.heads
        q, k, v = self.to_qkv(x).split(width, 1)
        ones, middles, others, values = [], [], [], []
        group = len(x) // self.landmarks
        for head in range(self.heads):
            part = slice(head * d, head * d + d)
            qh, kh = q[:, part] / d**0.5, k[:, part]
            ql = torch.stack([qh[i : i + group].mean(0) for i in range(0, len(x), group)])
            kl = torch.stack([kh[i : i + group].mean(0) for i in range(0, len(x), group)])
            ones.append((qh @ kl.T).softmax(1))
            middles.append((ql @ kl.T).softmax(1))
            others.append((ql @ kh.T).softmax(1))
            values.append(v[:, part])
        columns = max(m.sum(0).max() for m in middles)
        rows = max(m.sum(1).max() for m in middles)
        found = []
        for a, m, b in zip(ones, middles, others, strict=True):
            z, eye = m.T / (columns * rows), torch.eye(len(m), dtype=m.dtype)
            for _ in range(6):
                mz = m @ z
                z = z @ (13 * eye - mz @ (15 * eye - mz @ (7 * eye - mz))) / 4
            found.append(a @ z @ b)
        return torch.stack(found), torch.stack(values), fill

    def forward(self, x: Tensor) -> Tensor:
        attention, v, fill = self.matrices(x)
        mixed = attention @ v + self.res_conv(v[None])[0]
        out: Tensor = self.to_out(torch.cat(list(mixed), dim=1))
        return out[fill:]


class Transmil(Named):
    """TransMIL as published; `grid`: tiles are repeated and zeros added around the positional convolution only."""

    def __init__(self, *, grid: bool = False, width: int = 8, heads: int = 2, landmarks: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self._fc1 = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_layer = Named()
        for name, kernel in (("proj", 7), ("proj1", 5), ("proj2", 3)):
            self.pos_layer.add_module(name, nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width))
        for layer in ("layer1", "layer2"):
            block = Named()
            block.norm = nn.LayerNorm(width)
            block.attn = Nystrom(width, heads, landmarks)
            self.add_module(layer, block)
        self.norm = nn.LayerNorm(width)
        self._fc2 = nn.Linear(width, CLASSES)

    def tokens(self, h: Tensor) -> Tensor:
        f = self._fc1(h)
        if not self.grid:
            side = int(torch.tensor(len(f)).sqrt().ceil())
            f = torch.cat([f, f[: side * side - len(f)]])
        return torch.cat([self.cls_token[0], f])

    def forward(self, h: Tensor) -> Tensor:
        x = self.tokens(h)
        x = x + self.layer1.attn(self.layer1.norm(x))
        n = len(x) - 1
        side = int(torch.tensor(n).sqrt().ceil())
        tiles = torch.cat([x[1:], x[1 : 1 + side * side - n]])
        if self.grid and side < 7:
            tiles = torch.cat([tiles, tiles.new_zeros(49 - len(tiles), tiles.shape[1])])
            side = 7
        picture = torch.stack(list(torch.split(tiles, side))).permute(2, 0, 1)[None]
        convs = self.pos_layer.proj, self.pos_layer.proj1, self.pos_layer.proj2
        picture = picture + sum(conv(picture) for conv in convs)
        x = torch.cat([x[:1], picture[0].permute(1, 2, 0).reshape(side * side, -1)[:n]])
        x = x + self.layer2.attn(self.layer2.norm(x))
        out: Tensor = self._fc2(self.norm(x[0]))
        return out


def anywhere(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys as they are after parts of a network went through `nn.DataParallel`."""
    return {key.replace("attention_net.", "attention_net.module."): value for key, value in state.items()}


SMALL: dict[str, Any] = {"hidden": 8, "size": 6}
PUBLISHED: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module]]] = {
    "CLAM-SB": ("clam_sb", SMALL, Clam),
    "CLAM-SB without dropout": ("clam_sb", SMALL, lambda: Clam(dropout=False)),
    "CLAM-SB without gate": ("clam_sb", {**SMALL, "gated": False}, lambda: Clam(gated=False)),
    "CLAM-SB without either": (
        "clam_sb",
        {**SMALL, "gated": False},
        lambda: Clam(gated=False, dropout=False),
    ),
    "CLAM-MB": ("clam_mb", SMALL, lambda: Clam(per_class=True)),
    "CLAM-MB without gate": ("clam_mb", {**SMALL, "gated": False}, lambda: Clam(per_class=True, gated=False)),
    "ABMIL": ("abmil", SMALL, Abmil),
    "ABMIL, gated": ("abmil_gated", SMALL, lambda: Abmil(gated=True)),
    "ABMIL of MHIM-MIL": (
        "abmil",
        {**SMALL, "attention_bias": False},
        lambda: Abmil(names="mhim", bias=False),
    ),
    "ABMIL of MHIM-MIL, gated": ("abmil_gated", SMALL, lambda: Abmil(names="mhim", gated=True)),
    "DSMIL": ("dsmil", SMALL, Dsmil),
    "TransMIL": ("transmil", {"hidden": 8, "heads": 2}, Transmil),
    "TransMIL of MHIM-MIL": (
        "transmil",
        {"hidden": 8, "heads": 2, "padding": "grid"},
        lambda: Transmil(grid=True),
    ),
}
"""What is published -> our head and its arguments, and the reference."""
