"""Training of bag heads: masks, teacher, recycling, losses, folds, stopping and going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ModelError, SourceError, SpecError, StoreError
from schemas.training import MHIM, FitSpec, HeadSpec, MhimSpec
from workers.metrics.classification import accuracy, balanced_accuracy
from workers.models.heads.head import BagHead, PartsHead
from workers.models.heads.registry import build_head
from workers.synthetic.bags import RULES, ToyBag, block_slides, hard_bags, toy_bags
from workers.training import mhim
from workers.training.bags import Bags, Case, Fold, make_folds, read_cases
from workers.training.heads import fit_head
from workers.training.losses import LOSSES, needs_every_class, soft_cross_entropy
from workers.training.mhim import Mhim, Recycle, masked, tile_scores
from workers.training.mil import History, Plain, class_weights, fit, predict

SMALL: dict[str, dict[str, Any]] = {
    "abmil": {"hidden": 16, "size": 8},
    "clam_mb": {"hidden": 16, "size": 8},
    "dsmil": {"hidden": 16, "size": 8},
    "transmil": {"hidden": 16},
}
NONE = MhimSpec(edition="v1", alpha=0.0)
"""Masks nothing, asks for nothing."""


def head(name: str = "abmil", seed: int = 0, **args: Any) -> BagHead:
    torch.manual_seed(seed)
    return build_head(name, 6, 2, SMALL[name] | args)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bag(tiles: int, seed: int = 3) -> Tensor:
    return torch.randn(tiles, 6, generator=source(seed))


def as_bags(toys: tuple[ToyBag, ...]) -> Bags:
    bags = Bags(
        [Case(f"slide {i}", toy.label, f"patient {i}", features=str(i)) for i, toy in enumerate(toys)],
        lambda case: toys[int(case.features)].features,
    )
    bags.check()
    return bags


def test_the_teacher_follows_in_closed_form() -> None:
    learner = Mhim(head(), head(seed=1), MhimSpec(edition="v1", momentum=0.5))
    for p in learner.teacher.parameters():
        p.zero_()
    with torch.no_grad():
        for p in learner.head.parameters():
            p.fill_(1.0)
    for expected in (0.5, 0.75, 0.875):
        learner.stepped(0.0)
        assert all(torch.equal(p, torch.full_like(p, expected)) for p in learner.teacher.parameters())
    rising = Mhim(head(), head(seed=1), MhimSpec(edition="v1", momentum=0.5, momentum_to_one=True))
    before = [p.clone() for p in rising.teacher.parameters()]
    rising.stepped(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, rising.teacher.parameters(), strict=True))


def test_the_student_begins_with_the_teachers_projection_alone() -> None:
    teacher, student = head(), head(seed=1)
    learner = Mhim(teacher, student, NONE)
    same = {k: torch.equal(v, teacher.state_dict()[k]) for k, v in learner.head.state_dict().items()}
    assert {k for k, equal in same.items() if equal} == {"projection.0.weight", "projection.0.bias"}
    assert not any(p.requires_grad for p in learner.teacher.parameters())


@pytest.mark.parametrize("n", [2, 7, 100, 255, 1000])
def test_masks_have_the_stated_size_and_place(n: int) -> None:
    scores = torch.randperm(n, generator=source(n)).float()[None]
    rank = scores[0].argsort().argsort()  # 0: lowest

    def mask(seed: int = 0, done: float = 0.0, **shares: Any) -> Tensor:
        return masked(scores, MhimSpec(edition="v1", **shares), done, source(seed))

    assert int(mask(random=0.07).sum()) == -(-n * 7 // 100)
    assert torch.equal(mask(low=0.2), rank < -(-n // 5))
    high = mask(high=0.02, high_random=0.5)  # the top 4 %, half of them
    wide = -(-n // 25)
    assert int(high.sum()) == -(-wide // 2)
    assert bool((rank[high] >= n - wide).all())
    assert torch.equal(mask(high=0.05), rank >= n + (-n // 20))
    union = mask(random=0.3, low=0.1, high=0.05)
    assert torch.equal(union, mask(random=0.3) | mask(low=0.1) | mask(high=0.05)) or bool((~union).all())
    assert torch.equal(union, mask(random=0.3, low=0.1, high=0.05))
    assert torch.equal(mask(high=0.05, decay_high=True), mask(high=0.05))
    assert not mask(high=0.05, decay_high=True, done=1.0).any()


def test_a_bag_is_never_masked_whole() -> None:
    assert not masked(torch.zeros(1, 1), MHIM["v1"], 0.0, source()).any()
    everything = MhimSpec(edition="v1", low=0.9, high=0.9)
    assert not masked(torch.arange(10.0)[None], everything, 0.0, source()).any()


def test_heads_vote() -> None:
    scores = torch.tensor([[9.0, 8, 1, 0, 0], [0, 7, 6, 1, 0], [1, 0, 5, 9, 0]])
    # tops of two: {0, 1}, {1, 2}, {3, 2}: tiles 1 and 2 have two votes each
    mask = masked(scores, MhimSpec(edition="v1", high=0.4), 0.0, source())
    assert mask.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("spec", [MHIM["v1"], MHIM["v2"]], ids=["v1", "v2"])
@pytest.mark.parametrize("name", SMALL)
def test_a_masked_tile_never_reaches_the_student(
    name: str, spec: MhimSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = bag(40)
    scores = torch.rand(1, 40, generator=source(1))
    monkeypatch.setattr(mhim, "tile_scores", lambda *_: scores)
    learner = Mhim(head(name), head(name, seed=1), spec).train()
    for m in learner.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    hidden = masked(scores, spec, 0.0, source(5))
    changed = h.clone()
    changed[hidden] = 100.0
    assert 0 < int(hidden.sum()) < 40
    queries = None if learner.recycle is None else learner.recycle.queries.clone()
    first, _ = learner.step(h, 0.0, source(5))
    if learner.recycle is not None and queries is not None:
        learner.recycle.queries.copy_(queries)
    second, _ = learner.step(changed, 0.0, source(5))
    assert torch.equal(first, second)
    seen = h.clone()
    seen[~hidden] += 1.0
    assert not torch.equal(learner.step(seen, 0.0, source(5))[0], first)


@pytest.mark.parametrize("tiles", [1, 2, 30])
@pytest.mark.parametrize("edition", ["v1", "v2", "v1-transmil"])
@pytest.mark.parametrize("name", SMALL)
def test_bags_of_any_size(name: str, edition: str, tiles: int) -> None:
    learner = Mhim(head(name), head(name, seed=1), MHIM[edition])
    logits, extra = learner.step(bag(tiles), 0.0, source())
    assert logits.shape == (2,)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(extra)
    torch.autograd.backward(logits.sum() + extra)
    with pytest.raises(ModelError, match="no tile"):
        learner.step(bag(0), 0.0, source())


def test_scores_are_those_of_the_papers() -> None:
    h, one = bag(9), head()
    assert isinstance(one, PartsHead)
    parts = one.parts(h)
    evidence = parts.attention.T * (parts.values @ parts.weight.T)
    assert torch.allclose(evidence.sum(0) + parts.bias, one(h), atol=1e-6)  # e_ic sums to the logit
    assert torch.equal(tile_scores(one, h, "v1"), one.attention(h))
    margin = evidence[:, 1] - evidence[:, 0]  # of two classes: sigmoid of |margin|, whatever its sign
    assert torch.allclose(tile_scores(one, h, "v2")[0], torch.sigmoid(margin.abs()))
    for name in ("abmil", "dsmil"):
        order = torch.randperm(9, generator=source())
        for edition in ("v1", "v2"):
            there, here = (tile_scores(head(name), x, edition) for x in (h[order], h))
            assert torch.allclose(there, here[:, order], atol=1e-6)
    assert tile_scores(head("transmil"), h, "v1").shape == (8, 9)
    with pytest.raises(SpecError, match="MeanHead"):
        tile_scores(build_head("mean", 6, 2), h, "v1")


def test_scores_and_bag_feature_are_of_one_noisy_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Mhim(head(dropout=0.5), head(seed=1), NONE)
    seen: list[Tensor] = []
    project = learner.teacher.project

    def watched(h: Tensor) -> Tensor:
        seen.append(project(h))
        return seen[-1]

    monkeypatch.setattr(learner.teacher, "project", watched)
    learner.step(bag(20), 0.0, source())
    learner.step(bag(20), 0.0, source())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_recycling_keeps_a_share_and_makes_tokens_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MHIM["v2"].model_copy(update={"keep": 0.8, "tokens": 3, "high": 0.05})
    learner = Mhim(head(), head(seed=1), spec)
    assert learner.recycle is not None
    before = learner.recycle.queries.clone()
    pooled: list[int] = []
    pool = learner.head.pool

    def watched(f: Tensor) -> Any:
        pooled.append(len(f))
        return pool(f)

    monkeypatch.setattr(learner.head, "pool", watched)
    learner.step(bag(100), 0.0, source())
    assert pooled == [int(95 * 0.8) + 3]
    assert not torch.equal(learner.recycle.queries, before)
    assert not any(name.endswith("queries") for name, _ in learner.named_parameters())


def test_queries_follow_the_tokens() -> None:
    torch.manual_seed(0)
    recycle = Recycle(16, 2, 0.5).train()
    recycle.dropout.p = 0.0
    before = recycle.queries.clone()
    tokens = recycle(torch.randn(5, 16))
    assert torch.allclose(recycle.queries, 0.5 * before + 0.5 * tokens.detach(), atol=1e-6)
    after = recycle.queries.clone()
    recycle.eval()(torch.randn(5, 16))
    assert torch.equal(recycle.queries, after)


TOYS = toy_bags("presence", 16, seed=1, tiles=(8, 14))
FOLD = Fold(tuple(range(10)), (10, 11, 12), (13, 14, 15))
QUICK = FitSpec(epochs=4, learning_rate=1e-3)
SMALL_HEAD = HeadSpec(head="abmil", args={"hidden": 8, "size": 4})


def test_masking_nothing_is_the_plain_baseline() -> None:
    bags = as_bags(TOYS)
    states = []
    for make in (Plain, lambda h: Mhim(h, h, NONE)):
        torch.manual_seed(0)
        student = build_head("abmil", bags.width, 2, SMALL["abmil"] | {"dropout": 0.0})
        history = fit(make(student), bags, FOLD, QUICK, 2)
        states.append((history, student.state_dict()))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(v, states[1][1][k]) for k, v in states[0][1].items())


@pytest.mark.parametrize("edition", [None, "v1", "v2"])
def test_a_training_cut_short_goes_on_to_the_same_weights(tmp_path: Path, edition: str | None) -> None:
    bags = as_bags(TOYS)
    spec = SMALL_HEAD.model_copy(update={"mhim": MHIM.get(edition or "")})

    def run(folder: Path | None, tell: Callable[..., None] | None = None) -> Any:
        return fit_head(bags, FOLD, spec, QUICK, 2, folder=folder, tell=tell)

    def stop(name: str, done: int, total: int, history: History) -> None:
        if name == "head" and done == 2:
            raise KeyboardInterrupt

    whole, histories = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    resumed, again = run(tmp_path)
    assert again == histories
    assert set(histories) == ({"head"} if edition is None else {"head teacher", "head"})
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not resumed.training
    with pytest.raises(StoreError, match="another training"):
        fit_head(bags, FOLD, spec, QUICK.model_copy(update={"seed": 5}), 2, folder=tmp_path)


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best() -> None:
    toys = list(TOYS)
    for i in FOLD.validation:  # what is learnt is wrong there
        toys[i] = ToyBag(
            toys[i].features, 1 - toys[i].label, toys[i].evidence, toys[i].kind, toys[i].position
        )
    bags = as_bags(tuple(toys))
    spec = FitSpec(epochs=200, patience=3, learning_rate=1e-2)
    found, histories = fit_head(bags, FOLD, SMALL_HEAD, spec, 2)
    history = histories["head"]
    assert len(history.train) == history.best + 1 + 3 < 200
    logits = predict(found, bags, FOLD.validation)
    weights = class_weights(bags.labels[list(FOLD.train)], 2)
    labels = torch.from_numpy(bags.labels[list(FOLD.validation)])
    assert LOSSES["cross_entropy"](logits, labels, weights).item() == pytest.approx(min(history.validation))


@pytest.mark.parametrize(
    ("loss", "bags_a_step", "seed"), [("cross_entropy", 1, 0), ("any_balanced_accuracy", 8, 2)]
)
def test_a_head_learns_what_makes_a_bag_positive(loss: str, bags_a_step: int, seed: int) -> None:
    """AnyLoss hardly moves where all bags begin on one side of one half: of seeds 0, 1 and 2 it learns 1 and 2."""
    bags = as_bags(toy_bags("presence", 64, seed=2, tiles=(4, 8)))
    fold = Fold(tuple(range(32)), tuple(range(32, 40)), tuple(range(40, 64)))
    spec = FitSpec.model_validate(
        {"loss": loss, "epochs": 15, "learning_rate": 1e-2, "bags": bags_a_step, "seed": seed}
    )
    found, _ = fit_head(bags, fold, HeadSpec(args={"hidden": 16, "size": 8, "dropout": 0.0}), spec, 2)
    logits = predict(found, bags, fold.test)
    assert float((logits.argmax(1).numpy() == bags.labels[list(fold.test)]).mean()) >= 0.85


def test_anyloss_is_the_metric_where_the_scores_are_sure() -> None:
    generator = np.random.default_rng(0)
    label = generator.integers(2, size=40)
    said = np.where(generator.random(40) < 0.7, label, 1 - label)
    logits = torch.tensor(np.stack([-8.0 * (2 * said - 1), 8.0 * (2 * said - 1)], 1), requires_grad=True)
    hard = np.eye(2)[said]
    tp, fp, fn = (int(((said == a) & (label == b)).sum()) for a, b in ((1, 1), (1, 0), (0, 1)))
    recall, specificity = tp / (tp + fn), 1 - fp / (label == 0).sum()
    expected = {
        "any_accuracy": accuracy(hard, label),
        "any_balanced_accuracy": balanced_accuracy(hard, label),
        "any_f1": 2 * tp / (2 * tp + fp + fn),
        "any_gmean": (recall * specificity) ** 0.5,
    }
    for name, value in expected.items():
        assert 1 - LOSSES[name](logits, torch.from_numpy(label), None).item() == pytest.approx(
            value, abs=1e-9
        )
        soft = (0.1 * torch.randn(12, 2, generator=source(), dtype=torch.float64)).requires_grad_()
        loss, labels = LOSSES[name], torch.arange(12) % 2
        assert torch.autograd.gradcheck(lambda x, loss=loss, labels=labels: loss(x, labels, None), soft)
    assert {name for name in LOSSES if needs_every_class(name)} == set(expected)


def test_cross_entropies() -> None:
    logits, labels = torch.randn(5, 3, generator=source()), torch.tensor([0, 1, 2, 1, 1])
    weights = class_weights(labels.numpy(), 3)
    assert torch.allclose(weights, torch.tensor([5 / 3, 5 / 9, 5 / 3]))
    each = -torch.log_softmax(logits, 1)[torch.arange(5), labels] * weights[labels]
    assert torch.allclose(LOSSES["cross_entropy"](logits, labels, weights), each.mean())
    single = LOSSES["cross_entropy"](logits[:1], labels[:1], weights)
    assert torch.allclose(single, each[0])  # one bag a step: its weight must not cancel
    student = torch.tensor([1.0, 2.0], requires_grad=True)
    teacher = torch.tensor([0.1, 0.0], requires_grad=True)
    share = 1 / (1 + np.exp(-1.0))  # softmax([1, 0])
    log = torch.log_softmax(student, 0)
    value = soft_cross_entropy(student, teacher)
    assert value.item() == pytest.approx(-(share * log[0] + (1 - share) * log[1]).item())
    torch.autograd.backward(value)
    assert teacher.grad is None


def made_cases(patients: int, classes: int = 2) -> list[Case]:
    """One to three slides a patient."""
    return [Case(f"{p}-{s}", p % classes, f"patient {p}") for p in range(patients) for s in range(1 + p % 3)]


@pytest.mark.parametrize(("patients", "count"), [(10, 5), (23, 4), (30, 1), (9, 3)])
def test_folds_keep_patients_apart_and_classes_together(patients: int, count: int) -> None:
    cases = made_cases(patients)
    folds = make_folds(cases, count, seed=3)
    assert len(folds) == count
    for fold in folds:
        parts = [{cases[i].patient for i in part} for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == patients
        assert all(
            {cases[i].label for i in part} == {0, 1} for part in (fold.train, fold.validation, fold.test)
        )
    tested = [i for fold in folds for i in fold.test]
    assert len(tested) == len(set(tested))
    if count > 1:
        assert sorted(tested) == list(range(len(cases)))
    assert folds == make_folds(cases, count, seed=3) != make_folds(cases, count, seed=4)


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(SpecError, match="fewer"):
        make_folds(made_cases(8), 5, seed=0)
    with pytest.raises(SpecError, match="at least two"):
        make_folds([Case(str(i), int(i == 0), str(i)) for i in range(9)], 3, seed=0)


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "slides.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    rows = [
        f"s{i}.svs,{'ab'[i % 2]},p{i},{('train', 'train', 'test')[i // 2 % 3]},f/{i}.h5" for i in range(18)
    ]
    path = csv_file(tmp_path, "image,label,patient,split,features\n" + "\n".join(rows))
    cases, classes = read_cases(path)
    assert classes == ("a", "b")
    assert read_cases(path, ("b", "a"))[0][0].label == 1
    assert cases[3] == Case(str(tmp_path / "s3.svs"), 1, "p3", "train", str(tmp_path / "f/3.h5"))
    (fold,) = make_folds(cases, 5, seed=0)
    assert {cases[i].split for i in fold.test} == {"test"}
    assert {cases[i].split for i in (*fold.train, *fold.validation)} == {"train"}
    assert fold.validation


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,label\na,1", "expected image, label, patient"),
        ("image,label,patient,colour\na,1,p,red", "expected image, label, patient"),
        ("image,label,patient\n", "0 rows"),
        ("image,label,patient\na,1,p\nb,1,q", "at least two classes"),
        ("image,label,patient\na,1,p\nb,,q", "line 3: label is empty"),
        ("image,label,patient\na,1,p\nb,0", "line 3: expected 3 values"),
        ("image,label,patient\na,1,p\na,0,q", "more than once"),
        ("image,label,patient,split\na,1,p,train\nb,0,p,test", "patient p"),
        ("image,label,patient,split\na,1,p,dev\nb,0,q,test", "line 2: split is 'dev'"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_cases(csv_file(tmp_path, text))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((3, 5)), "5 numbers a tile; .* has 4"),
        (np.full((3, 4), np.nan), "3 of 3 tiles"),
        (np.zeros(4), r"shape \(4,\)"),
    ],
)
def test_bags_that_cannot_be_trained_on_are_named(second: Any, words: str) -> None:
    features = {"a": np.zeros((2, 4), np.float32), "b": second.astype(np.float32)}
    bags = Bags([Case("a", 0, "p"), Case("b", 1, "q")], lambda case: features[case.image])
    with pytest.raises(SourceError, match=f"b: .*{words}"):
        bags.check()


def test_features_are_read_again_beyond_the_cache() -> None:
    reads: list[str] = []

    def read(case: Case) -> Any:
        reads.append(case.image)
        return np.ones((4, 8), np.float16)

    bags = Bags([Case(name, 0, name) for name in "abc"], read, cache_bytes=2 * 128)
    for _ in range(2):
        assert all(bags[i].dtype == torch.float32 for i in range(3))
    assert reads == ["a", "b", "c", "c"]


@pytest.mark.parametrize("rule", RULES)
def test_toy_bags_say_what_speaks_for_their_class(rule: str) -> None:
    toys = toy_bags(rule, 24, seed=4)
    classes = 4 if rule == "four" else 2
    for i, toy in enumerate(toys):
        assert toy.label == i % classes
        n, width = toy.features.shape
        assert toy.evidence.shape == (n, classes)
        assert (n, width) == (len(toy.kind), 32)
        assert toy.features.dtype == np.float32
        assert len(np.unique(toy.position, axis=0)) == n
        if rule == "signed":
            assert (toy.evidence[:, 1].sum() > 0) == (toy.label == 1)
            assert np.array_equal(toy.evidence[:, 0], -toy.evidence[:, 1])
        elif rule == "presence":
            assert np.array_equal(toy.evidence[:, 1] == 1, toy.kind == 9)
            assert (toy.kind == 9).any() == (toy.label == 1)
        elif rule == "four":
            assert ((toy.kind == 8).any(), (toy.kind == 9).any()) == (
                toy.label in (1, 3),
                toy.label in (2, 3),
            )
    assert all(
        np.array_equal(a.features, b.features) for a, b in zip(toys, toy_bags(rule, 24, seed=4), strict=True)
    )
    assert not np.array_equal(toys[0].features[:8], toy_bags(rule, 1, seed=5)[0].features[:8])


def test_hard_positives_and_block_slides_are_as_stated() -> None:
    for i, toy in enumerate(hard_bags(6, seed=0)):
        n = len(toy.kind)
        counts = np.bincount(toy.kind, minlength=3)[1:].tolist()
        assert counts == ([round(0.02 * n), round(0.06 * n)] if i % 2 else [0, 0])
        assert np.array_equal(toy.evidence[:, 1], toy.kind > 0)
    for fixed in (False, True):
        for toy in block_slides(4, seed=0, fixed=fixed):
            assert np.bincount(toy.kind).tolist() == [108, 6, 6]
            assert np.array_equal(toy.evidence[:, toy.label] == 1, toy.kind == 2)
            upper = toy.position[:, 0] < 6
            if fixed:
                assert upper[toy.kind == 2].all()
                assert not upper[toy.kind == 1].any()
