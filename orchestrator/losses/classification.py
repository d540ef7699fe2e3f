"""Losses of classifiers, pure functions over tensors. D documents, C classes, W width of the features."""

from __future__ import annotations

import math

import torch

from orchestrator.config.classification import Problem

SMALLEST_DISTANCE_SQUARED = 1e-12
"""The root of a smaller value has no usable gradient."""


def class_losses_D(logits_DC: torch.Tensor, targets: torch.Tensor, *, problem: Problem) -> torch.Tensor:
    """Loss of each document in nats (or squared units): cross-entropy for class indices; mean over classes of binary
    cross-entropies for 0 and 1 (D x C); the squared difference for a number, with C = 1.
    """
    match problem:
        case "single_label":
            return torch.nn.functional.cross_entropy(logits_DC, targets, reduction="none")
        case "multi_label":
            each_DC = torch.nn.functional.binary_cross_entropy_with_logits(logits_DC, targets, reduction="none")
            return each_DC.mean(1)
        case "regression":
            return (logits_DC[:, 0] - targets) ** 2


def soft_pseudo_labels_DC(probabilities_DC: torch.Tensor) -> torch.Tensor:
    """y_ij = (f_ij^2 / f_j) / sum_j' (f_ij'^2 / f_j') with f_j = sum_i f_ij over all documents (2010.07835, section 4.1)."""
    sharpened_DC = probabilities_DC**2 / probabilities_DC.sum(0)
    return sharpened_DC / sharpened_DC.sum(1, keepdim=True)


def confidences_D(labels_DC: torch.Tensor) -> torch.Tensor:
    """w_i = 1 - H(y_i) / log C: 0 for uniform labels, 1 for certain ones (2010.07835, section 4.3)."""
    entropies_D = -torch.xlogy(labels_DC, labels_DC).sum(1)
    return 1.0 - entropies_D / math.log(labels_DC.shape[1])


def divergence_D(labels_DC: torch.Tensor, logits_DC: torch.Tensor) -> torch.Tensor:
    """KL(y || f) of each document, in nats; f is the softmax of the logits."""
    return (torch.xlogy(labels_DC, labels_DC) - labels_DC * logits_DC.log_softmax(1)).sum(1)


def uniform_divergence_D(logits_DC: torch.Tensor) -> torch.Tensor:
    """R2 = KL(u || f) of each document with u uniform (2010.07835, section 4.3)."""
    classes = logits_DC.shape[1]
    return -math.log(classes) - logits_DC.log_softmax(1).mean(1)


def contrastive_loss(features_DW: torch.Tensor, classes_D: torch.Tensor, *, margin: float) -> torch.Tensor:
    """R1: the mean over pairs i != j of W_ij d_ij^2 + (1 - W_ij) max(0, margin - d_ij)^2, W_ij = 1 where the pseudo-classes
    are the same (2010.07835, section 4.2); d_ij^2 is the mean over the width of squared differences, as in the authors' code.
    0 if there is no pair.
    """
    count = len(features_DW)
    if count < 2:
        return 0.0 * features_DW.sum()
    first_P, second_P = torch.triu_indices(count, count, offset=1, device=features_DW.device)
    squared_P = ((features_DW[first_P] - features_DW[second_P]) ** 2).mean(1)
    distance_P = squared_P.clamp_min(SMALLEST_DISTANCE_SQUARED).sqrt()
    apart_P = (margin - distance_P).clamp_min(0.0) ** 2
    return torch.where(classes_D[first_P] == classes_D[second_P], squared_P, apart_P).mean()
