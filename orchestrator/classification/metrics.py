"""Agreement of predictions with labels: accuracy, F1, Matthews' correlation, errors and correlations; pure numpy.

N rows, C classes. A ratio with denominator 0 (a class neither present nor predicted) is 0, as in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.training.correlations import pearson, spearman

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def confusion_CC(true_N: Ints, predicted_N: Ints, classes: int) -> Ints:
    """Rows by true class (first axis) and predicted class."""
    return np.bincount(true_N * classes + predicted_N, minlength=classes * classes).reshape(classes, classes)


def class_scores(confusion: Ints) -> tuple[Floats, Floats, Floats]:
    """(precision, recall, F1) of each class."""
    right = np.diag(confusion).astype(np.float64)
    predicted, true = confusion.sum(0), confusion.sum(1)
    return _ratio(right, predicted), _ratio(right, true), _ratio(2 * right, predicted + true)


def matthews(confusion: Ints) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004): 1 right, 0 chance."""
    whole = confusion.astype(np.float64)
    total, right = whole.sum(), np.trace(whole)
    predicted, true = whole.sum(0), whole.sum(1)
    below = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return float((right * total - predicted @ true) / below) if below else 0.0


def single_label_report(
    true_N: Ints, predicted_N: Ints, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """(measures, report) for one class per row; with two classes, the F1 of the second is included."""
    confusion = confusion_CC(true_N, predicted_N, len(names))
    precision_C, recall_C, f1_C = class_scores(confusion)
    there = confusion.sum(0) + confusion.sum(1) > 0
    measures = {
        "accuracy": float(np.trace(confusion) / max(1, confusion.sum())),
        "f1_macro": float(f1_C[there].mean()) if there.any() else 0.0,
        "mcc": matthews(confusion),
    }
    if len(names) == 2:
        measures["f1_binary"] = float(f1_C[1])
    report = {
        "confusion": confusion.tolist(),
        "classes": _by_class(names, precision_C, recall_C, f1_C, confusion.sum(1)),
    }
    return measures, report


def multi_label_report(
    true_NC: Ints, predicted_NC: Ints, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """(measures, report) for any number of classes per row, given as 0 and 1. Accuracy requires all to match."""
    both, predicted, true = (true_NC * predicted_NC).sum(0), predicted_NC.sum(0), true_NC.sum(0)
    f1_C = _ratio(2.0 * both, predicted + true)
    measures = {
        "accuracy": float((true_NC == predicted_NC).all(1).mean()),
        "accuracy_of_labels": float((true_NC == predicted_NC).mean()),
        "f1_macro": float(f1_C.mean()),
        "f1_micro": float(_ratio(np.array([2.0 * both.sum()]), np.array([predicted.sum() + true.sum()]))[0]),
    }
    return measures, {"classes": _by_class(names, _ratio(both, predicted), _ratio(both, true), f1_C, true)}


def regression_report(true_N: Floats, predicted_N: Floats) -> tuple[dict[str, float], dict[str, Any]]:
    """(measures, report) for one number per row; a correlation with a constant is NaN."""
    difference = predicted_N - true_N
    measures = {
        "mse": float((difference**2).mean()),
        "mae": float(np.abs(difference).mean()),
        "pearson": _defined(pearson(true_N, predicted_N)),
        "spearman": _defined(spearman(true_N, predicted_N)),
    }
    return measures, {}


def _defined(correlation: float | None) -> float:
    return float("nan") if correlation is None else correlation


def _ratio(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> Floats:
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


def _by_class(
    names: Sequence[str], precision_C: Floats, recall_C: Floats, f1_C: Floats, rows_C: npt.NDArray[Any]
) -> dict[str, dict[str, float]]:
    columns = zip(names, precision_C.tolist(), recall_C.tolist(), f1_C.tolist(), rows_C.tolist(), strict=True)
    return {
        name: {"precision": precision, "recall": recall, "f1": f1, "rows": rows}
        for name, precision, recall, f1, rows in columns
    }
