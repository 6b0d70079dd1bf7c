"""The head of a card: published checkpoints as they lie on disk; all that is refused, and in which words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from schemas.errors import ModelError
from schemas.model import ModelCard
from tests.test_workers.published_heads import CLASSES, FEATURES, PUBLISHED, SMALL, Clam, Transmil, anywhere
from workers.models.bags import load_head
from workers.models.card import LoadedCard, load_card, write_card
from workers.models.heads.head import BagHead
from workers.models.heads.registry import build_head

NAMES = ["a", "b", "c"]


def card(folder: Path, bag: Mapping[str, Any] | None, **output: Any) -> LoadedCard:
    value = ModelCard.model_validate(
        {
            "schema": 1, "name": "n", "version": "1", "licence": "CC0", "intended_use": "tests",
            "network": {"adapter": "monai", "name": "DenseNet"},
            "input": {"kind": "slide", "channels": 3, "tile": (32, 32), "mpp": 0.5},
            "output": output or {"classes": NAMES}, "cam": {"layer": "features"}, "bag": bag,
        }
    )  # fmt: skip
    return LoadedCard(value, folder / "model.toml", folder)


def saved(folder: Path, state: Any, head: str, **more: Any) -> dict[str, Any]:
    """`[bag]` of a head whose checkpoint is written into `folder`."""
    path = folder / "head.pt"
    torch.save(state, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"head": head, "weights": path.name, "sha256": sha, "features": FEATURES, **more}


def clam() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Clam().state_dict()


def same(found: BagHead, reference: torch.nn.Module) -> None:
    h = torch.randn(9, FEATURES)
    torch.testing.assert_close(found(h), reference.eval()(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("wrap", [dict, anywhere, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_a_published_checkpoint_is_loaded(tmp_path: Path, name: str, wrap: Callable[..., Any]) -> None:
    head, args, build = PUBLISHED[name]
    torch.manual_seed(1)
    reference = build()
    order = "row_col" if head == "transmil" else "any"
    found = load_head(
        card(tmp_path, saved(tmp_path, wrap(reference.state_dict()), head, args=args, order=order))
    )
    same(found, reference)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_our_own_head_in_safetensors_through_a_card_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(2)
    ours = build_head("additive", FEATURES, 1, {**SMALL, "layers": [5]})
    path = tmp_path / "head.safetensors"
    safetensors.torch.save_file(ours.state_dict(), path)
    bag = saved(tmp_path, {}, "additive", args={**SMALL, "layers": [5]})
    bag |= {"weights": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_card(tmp_path / "model.toml", card(tmp_path, bag, kind="logit", classes=["rest", "lesion"]).card)
    same(load_head(load_card(tmp_path / "model.toml")), ours)


def refused(loaded: LoadedCard, *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        load_head(loaded)
    for part in ("model.toml", *parts):
        assert part in error.value.message


def test_a_clustering_branch_is_left_out_by_name_and_nothing_else(tmp_path: Path) -> None:
    more = {"instance_classifiers.7.weight": torch.zeros(2, 8)}
    load_head(card(tmp_path, saved(tmp_path, clam() | more, "clam_sb", args=SMALL)))
    for key in ("instance_classifier.0.weight", "attention_net.4.attention_c.weight", "classifiers.0.weight"):
        state = clam() | {key: torch.zeros(1)}
        refused(
            card(tmp_path, saved(tmp_path, state, "clam_sb", args=SMALL)), "head.pt", f"1 unexpected: {key}"
        )


def test_keys_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    state = {k: v for k, v in clam().items() if k != "attention_net.3.attention_c.bias"}
    refused(card(tmp_path, saved(tmp_path, state, "clam_sb", args=SMALL)), "1 missing: attend.outer.bias")
    refused(
        card(tmp_path, saved(tmp_path, clam(), "clam_mb", args=SMALL)),
        "missing: classifier.weight", "unexpected: classifiers.weight", "[bag] head, features and args",
    )  # fmt: skip
    refused(
        card(tmp_path, saved(tmp_path, clam(), "clam_sb", args=SMALL, features=FEATURES + 1)),
        "projection.0.weight (file [8, 12], network [8, 13])",
    )
    refused(
        card(tmp_path, saved(tmp_path, clam(), "clam_sb", args=SMALL), classes=["a", "b"]),
        "classifier.weight (file [3, 8], network [2, 8])", "[output] classes",
    )  # fmt: skip


def test_two_entries_for_one_place_are_refused(tmp_path: Path) -> None:
    state = clam() | {"classifiers.module.weight": torch.zeros(CLASSES, 8)}
    refused(
        card(tmp_path, saved(tmp_path, state, "clam_sb", args=SMALL)),
        "twice", "'classifiers.module.weight'",
    )  # fmt: skip


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    whole = Clam()
    refused(
        card(tmp_path, saved(tmp_path, whole, "clam_sb", args=SMALL)), "head.pt", "can run code", "refused"
    )


def test_another_file_than_the_cards_is_refused(tmp_path: Path) -> None:
    bag = saved(tmp_path, clam(), "clam_sb", args=SMALL)
    refused(card(tmp_path, {**bag, "sha256": "0" * 64}), "sha256 found", "expected 0000")


def test_a_head_of_broken_weights_is_refused(tmp_path: Path) -> None:
    state = clam() | {"classifiers.bias": torch.full((CLASSES,), torch.nan)}
    refused(card(tmp_path, saved(tmp_path, state, "clam_sb", args=SMALL)), "nan", "head.pt")


def test_an_ordered_head_needs_an_order(tmp_path: Path) -> None:
    bag = saved(tmp_path, Transmil().state_dict(), "transmil", args={"hidden": 8, "heads": 2})
    refused(card(tmp_path, bag), "order = 'row_col'")


@pytest.mark.parametrize(
    ("bag", "output", "complaint"),
    [
        (None, {}, "has no [bag]"),
        ({"head": "abmill"}, {}, "did you mean abmil"),
        ({"args": {"gates": 1}}, {}, "no argument gates"),
        ({}, {"kind": "embedding"}, "kind 'embedding'"),
        ({}, {"kind": "regression"}, "0 classes"),
    ],
)
def test_a_card_that_names_no_head(
    tmp_path: Path, bag: dict[str, Any] | None, output: dict[str, Any], complaint: str
) -> None:
    given = None if bag is None else saved(tmp_path, clam(), "clam_sb", args=SMALL) | bag
    refused(card(tmp_path, given, **output), complaint)
