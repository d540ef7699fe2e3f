"""Losses and metrics of classifiers against plain references, hand-made cases and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from orchestrator.classification.metrics import (
    matthews,
    multi_label_report,
    regression_report,
    single_label_report,
)
from orchestrator.losses.classification import (
    class_losses_D,
    confidences_D,
    contrastive_loss,
    divergence_D,
    soft_pseudo_labels_DC,
    uniform_divergence_D,
)
from orchestrator.training.correlations import pearson, ranks_of

LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
FEATURES = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in row)
    return [math.exp(value) / whole for value in row]


def assert_gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> None:
    """Central differences in fp64."""
    point = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(point), point)
    step = 1e-6
    for place in range(at.numel()):
        shift = torch.zeros(at.numel(), dtype=at.dtype)
        shift[place] = step
        shift = shift.view_as(at)
        slope = (loss(at + shift) - loss(at - shift)) / (2 * step)
        assert gradient.flatten()[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_the_losses_of_the_three_problems() -> None:
    numbers, sets = torch.tensor([0, 2, 1, 1, 0]), (LABELS > 1 / 3).double()
    plain = [-math.log(softmax(row)[number]) for row, number in zip(LOGITS.tolist(), numbers.tolist(), strict=True)]
    assert class_losses_D(LOGITS, numbers, problem="single_label").tolist() == pytest.approx(plain)
    plain = [
        -sum(math.log(1 / (1 + math.exp(-x if wanted else x))) for x, wanted in zip(row, chosen, strict=True)) / 3
        for row, chosen in zip(LOGITS.tolist(), sets.tolist(), strict=True)
    ]
    assert class_losses_D(LOGITS, sets, problem="multi_label").tolist() == pytest.approx(plain)
    wanted = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    plain = [(x - y) ** 2 for x, y in zip(LOGITS[:, 0].tolist(), wanted.tolist(), strict=True)]
    assert class_losses_D(LOGITS[:, :1], wanted, problem="regression").tolist() == pytest.approx(plain)


def test_pseudo_labels_are_sharpened_and_balanced_as_in_the_paper() -> None:
    rows = LABELS.tolist()
    sums = [sum(row[j] for row in rows) for j in range(3)]
    plain = [[row[j] ** 2 / sums[j] for j in range(3)] for row in rows]
    plain = [[value / sum(row) for value in row] for row in plain]
    found = soft_pseudo_labels_DC(LABELS)
    for ours, theirs in zip(found.tolist(), plain, strict=True):
        assert ours == pytest.approx(theirs)
    assert soft_pseudo_labels_DC(torch.full((4, 3), 1 / 3)).flatten().tolist() == pytest.approx([1 / 3] * 12)


def test_confidence_is_0_for_uniform_and_1_for_certain_labels() -> None:
    rows = torch.tensor([[1 / 3] * 3, [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert confidences_D(rows).tolist() == pytest.approx([0.0, 1.0, 1 - math.log(2) / math.log(3)], abs=1e-12)


def test_divergences_are_those_of_the_definition() -> None:
    plain = [
        sum(y * math.log(y / f) for y, f in zip(row, softmax(logits), strict=True))
        for row, logits in zip(LABELS.tolist(), LOGITS.tolist(), strict=True)
    ]
    assert divergence_D(LABELS, LOGITS).tolist() == pytest.approx(plain)
    assert divergence_D(LOGITS.softmax(1), LOGITS).abs().max() < 1e-12
    plain = [sum(math.log(1 / 3 / f) / 3 for f in softmax(logits)) for logits in LOGITS.tolist()]
    assert uniform_divergence_D(LOGITS).tolist() == pytest.approx(plain)


def test_the_contrastive_loss_over_all_pairs() -> None:
    classes, margin, total, pairs = [0, 1, 0, 1, 1], 1.5, 0.0, 0
    rows = FEATURES.tolist()
    for i in range(5):
        for j in range(5):
            if i == j:
                continue
            squared = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) / 4
            total += squared if classes[i] == classes[j] else max(0.0, margin - math.sqrt(squared)) ** 2
            pairs += 1
    found = contrastive_loss(FEATURES, torch.tensor(classes), margin=margin)
    assert found.item() == pytest.approx(total / pairs)
    assert contrastive_loss(FEATURES[:1], torch.tensor([0]), margin=margin).item() == 0.0
    same = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    contrastive_loss(same, torch.tensor([0, 1]), margin=1.0).backward()
    assert same.grad is not None and bool(same.grad.isfinite().all()), "equal features of two classes"


def test_gradients_by_finite_differences() -> None:
    classes = torch.tensor([0, 1, 0, 1, 1])
    assert_gradient(lambda logits: divergence_D(LABELS, logits).sum(), LOGITS)
    assert_gradient(lambda logits: uniform_divergence_D(logits).sum(), LOGITS)
    assert_gradient(lambda features: contrastive_loss(features, classes, margin=1.5), FEATURES)


def test_metrics_of_single_labels_by_counting() -> None:
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 4, 200), random.integers(0, 4, 200)
    measures, report = single_label_report(true, predicted, ("a", "b", "c", "d"))
    f1 = []
    for c in range(4):
        hits = sum(1 for t, p in zip(true, predicted, strict=True) if t == p == c)
        guessed, there = int((predicted == c).sum()), int((true == c).sum())
        f1.append(2 * (hits / guessed) * (hits / there) / (hits / guessed + hits / there))
        assert report["classes"]["abcd"[c]]["f1"] == pytest.approx(f1[-1])
        assert report["confusion"][c] == [int(((true == c) & (predicted == q)).sum()) for q in range(4)]
    assert measures["f1_macro"] == pytest.approx(sum(f1) / 4)
    assert measures["accuracy"] == float((true == predicted).mean())
    one_hot = [np.eye(4)[which] - np.eye(4)[which].mean(0) for which in (true, predicted)]
    above = (one_hot[0] * one_hot[1]).sum()
    below = math.sqrt((one_hot[0] ** 2).sum() * (one_hot[1] ** 2).sum())
    assert measures["mcc"] == pytest.approx(above / below), "the correlation of one-hot labels"


def test_binary_metrics_and_the_ends_of_the_scale() -> None:
    true, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    measures, _ = single_label_report(true, predicted, ("no", "yes"))
    assert measures["f1_binary"] == pytest.approx(2 / 3)
    assert measures["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert matthews(np.diag([3, 4])) == pytest.approx(1.0)
    assert matthews(np.array([[5, 0], [3, 0]])) == 0.0, "one class is always said"


def test_metrics_of_label_sets_and_of_numbers() -> None:
    true, predicted = np.array([[1, 0, 1], [0, 1, 0]]), np.array([[1, 0, 0], [0, 1, 0]])
    measures, _ = multi_label_report(true, predicted, ("a", "b", "c"))
    assert measures == pytest.approx({"accuracy": 0.5, "accuracy_of_labels": 5 / 6, "f1_macro": 2 / 3, "f1_micro": 0.8})
    random = np.random.default_rng(0)
    first = random.normal(size=50)
    second = first + random.normal(size=50)
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert ranks_of(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    measures, _ = regression_report(first, np.exp(first))
    assert measures["spearman"] == pytest.approx(1.0) and measures["pearson"] < 1
    assert measures["mse"] == pytest.approx(np.mean((np.exp(first) - first) ** 2))
    assert pearson(first, np.ones(50)) is None
    assert math.isnan(regression_report(first, np.ones(50))[0]["pearson"]), (
        "a constant prediction correlates with nothing"
    )
