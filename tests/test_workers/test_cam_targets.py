from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError, SpecError
from schemas.model import OutputSpec
from workers.cam.targets import ResolvedTarget, functionals, predicted_name, resolve

ABC = OutputSpec(classes=("normal", "tumour", "2"))
PAIR = OutputSpec(kind="logit", classes=("benign", "malignant"))
SINGLE = OutputSpec(kind="logit", classes=("malignant",))


def select(scores: Tensor, targets: Sequence[ResolvedTarget]) -> tuple[Tensor, Tensor]:
    weights, index = functionals(scores, targets)
    return torch.stack([(scores * w).sum(1) for w in weights], dim=1), index


def names(output: OutputSpec, n: int, *asked: str) -> list[tuple[str, int | None]]:
    return [(t.name, t.index) for t in resolve(asked, output, n)]


def test_names_indices_predicted_and_all() -> None:
    assert names(ABC, 3, "tumour", "0", "predicted") == [("tumour", 1), ("normal", 0), ("predicted", None)]
    assert names(ABC, 3, "all") == [("normal", 0), ("tumour", 1), ("2", 2)]
    # a class that is called like an index wins over the index
    assert names(OutputSpec(classes=("1", "0")), 2, "1") == [("1", 0)]


def test_a_target_is_kept_once_in_the_order_asked() -> None:
    assert names(ABC, 3, "tumour", "all", "1") == [("tumour", 1), ("normal", 0), ("2", 2)]


def test_nothing_asked_takes_the_cards_default_then_all() -> None:
    assert names(ABC.model_copy(update={"default_target": "tumour"}), 3) == [("tumour", 1)]
    assert len(names(ABC, 3)) == 3


def test_nothing_asked_of_many_classes_is_an_error() -> None:
    many = OutputSpec(classes=tuple(f"c{i}" for i in range(9)))
    with pytest.raises(SpecError, match="9 classes are more than 8"):
        resolve([], many, 9)
    assert len(resolve(["all"], many, 9)) == 9


@pytest.mark.parametrize("name", ["tumor", "3", "-1", ""])
def test_an_unknown_target_names_what_there_is(name: str) -> None:
    with pytest.raises(SpecError, match="tumour"):
        resolve([name], ABC, 3)


def test_classes_must_fit_the_network() -> None:
    with pytest.raises(ModelError, match=r"names 3 classes .* gives 5 scores"):
        resolve(["all"], ABC, 5)
    with pytest.raises(ModelError, match="means one score a tile; the network gives 2"):
        resolve(["all"], PAIR, 2)


def test_a_single_logit_speaks_for_both_classes() -> None:
    scores = torch.tensor([[2.0], [-3.0]])
    y, index = select(scores, resolve(["malignant", "benign", "predicted"], PAIR, 1))
    assert y.tolist() == [[2, -2, 2], [-3, 3, 3]]
    assert index.tolist() == [[1, 0, 1], [1, 0, 0]]


def test_a_single_logit_with_one_name() -> None:
    assert names(SINGLE, 1) == [("malignant", 1)]
    assert names(SINGLE, 1, "0") == [("not malignant", 0)]
    # a resolved name is found again
    assert names(SINGLE, 1, "not malignant") == [("not malignant", 0)]


def test_predicted_is_each_rows_own_class() -> None:
    scores = torch.tensor([[0.0, 1.0, -1.0], [5.0, 1.0, 7.0]])
    y, index = select(scores, resolve(["predicted", "normal"], ABC, 3))
    assert y.tolist() == [[1, 0], [7, 5]]
    assert index.tolist() == [[1, 0], [2, 0]]
    assert index.dtype == torch.int32


def test_regression_outputs_are_targets_but_never_predicted() -> None:
    output = OutputSpec(kind="regression", classes=("age",))
    y, _ = select(torch.tensor([[41.0]]), resolve(["age"], output, 1))
    assert y.tolist() == [[41]]
    with pytest.raises(SpecError, match="regression"):
        resolve(["predicted"], output, 1)


@pytest.mark.parametrize(
    ("output", "scores", "name"),
    [
        (OutputSpec(classes=("1", "2", "0")), [0.0, 3.0, 1.0], "2"),  # index 1 is no class of that name
        (OutputSpec(classes=("1", "2", "0")), [0.0, 1.0, 3.0], "0"),
        (PAIR, [-0.5], "benign"),
        (SINGLE, [-0.5], "not malignant"),
        (OutputSpec(kind="logit", classes=("1", "0")), [2.0], "0"),
        (OutputSpec(kind="regression", classes=("age",)), [41.0], ""),
    ],
)
def test_the_class_predicted_is_named_by_its_place(
    output: OutputSpec, scores: list[float], name: str
) -> None:
    assert predicted_name(torch.tensor(scores), output) == name
