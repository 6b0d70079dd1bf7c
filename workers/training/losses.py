"""Losses of bag classifiers: cross-entropy, soft cross-entropy, and AnyLoss.

AnyLoss: D. Han, N. Moniz, N. V. Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", KDD 2024
(arXiv 2405.14745); its confusion-matrix sums and recommended amplification L = 73.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

AMPLIFICATION = 73.0
"""L of AnyLoss: how steeply a probability is pushed to 0 or 1 about one half."""
_TINY = 1e-12

BagLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`(B, C)` logits, `(B,)` classes, `(C,)` class weights or None -> scalar."""


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over bags of `weight[label] * -log softmax(logits)[label]`.

    Divided by the number of bags, not by the sum of their weights: of a single bag the latter would cancel its weight.
    """
    each = nn.functional.cross_entropy(logits, labels, weights, reduction="none")
    return each.mean()


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, *, teacher_temperature: float = 0.1, student_temperature: float = 1.0
) -> Tensor:
    """`-sum_j softmax(teacher / 0.1)_j log softmax(student)_j` over the last axis, mean over the others.

    No gradient reaches `teacher`.
    """
    target = torch.softmax(teacher.detach() / teacher_temperature, -1)
    return -(target * torch.log_softmax(student / student_temperature, -1)).sum(-1).mean()


def confusion(probability: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable TP, FN, FP, TN of `(B,)` probabilities and 0/1 truth: counts of `A(p) = 1 / (1 + e^(-L (p - 1/2)))`."""
    a = torch.sigmoid(AMPLIFICATION * (probability - 0.5))
    tp, ap, yp = (positive * a).sum(), a.sum(), positive.sum()
    return tp, yp - tp, ap - tp, len(a) - yp - ap + tp


def _accuracy(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return (tp + tn) / (tp + fn + fp + tn)


def _f1(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    return 2 * tp / (2 * tp + fn + fp).clamp(min=_TINY)


def _rates(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> tuple[Tensor, Tensor]:
    return tp / (tp + fn).clamp(min=_TINY), tn / (tn + fp).clamp(min=_TINY)


def _balanced_accuracy(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    sensitivity, specificity = _rates(tp, fn, fp, tn)
    return (sensitivity + specificity) / 2


def _gmean(tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
    sensitivity, specificity = _rates(tp, fn, fp, tn)
    return (sensitivity * specificity).clamp(min=_TINY).sqrt()


def any_loss(metric: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> BagLoss:
    """`1 - metric` of the differentiable confusion matrix, over the bags of a step.

    As published for two classes (the probability of the second). For more: the mean over each class against the rest, which
    is ours. Class weights have no place in a confusion matrix and are left out. A step needs bags of every class.
    """

    def loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        probability = torch.softmax(logits, -1)
        classes = [1] if logits.shape[-1] == 2 else range(logits.shape[-1])
        values = [metric(*confusion(probability[:, c], (labels == c).to(logits))) for c in classes]
        return 1 - torch.stack(values).mean()

    return loss


LOSSES: dict[str, BagLoss] = {
    "cross_entropy": cross_entropy,
    "any_accuracy": any_loss(_accuracy),
    "any_f1": any_loss(_f1),
    "any_gmean": any_loss(_gmean),
    "any_balanced_accuracy": any_loss(_balanced_accuracy),
}


def needs_every_class(name: str) -> bool:
    """Whether a step must hold several bags, some of each class."""
    return name != "cross_entropy"
