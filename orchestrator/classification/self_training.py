"""What self-training minimises over micro-batches (COSINE, 2010.07835, equation 3). Must not know files."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.classification.model import document_answers
from orchestrator.config.classification import SelfTrainingStage
from orchestrator.dataloader.batch import Batch
from orchestrator.distributed.runtime import Runtime
from orchestrator.losses.classification import contrastive_loss, divergence_D, uniform_divergence_D
from orchestrator.training.objectives import Objective, documents

PseudoLabelsOf = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""(labels_DC, weights_D) of a batch's documents; a weight of 0 excludes a document."""


def self_training_objective(runtime: Runtime, stage: SelfTrainingStage, labels_of: PseudoLabelsOf) -> Objective:
    """w KL(y || f) + lambda R1 + R2, as a mean over documents; R1 and R2 cover those with nonzero weight.

    R1 is a mean over the pairs of a micro-batch and counts for all its documents: it depends on `batch.micro_size`, but
    not on how many ranks share the micro-batches.
    """

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        logits_DC, features_DW = document_answers(runtime, model, batch)
        labels_DC, weights_D = labels_of(batch)
        kept_D = weights_D > 0
        fit = (weights_D * divergence_D(labels_DC, logits_DC)).sum()
        apart = contrastive_loss(features_DW[kept_D], labels_DC[kept_D].argmax(1), margin=stage.margin)
        apart = apart * len(batch.documents)
        smooth = (kept_D * uniform_divergence_D(logits_DC)).sum()
        loss = fit + stage.contrastive_weight * apart + stage.confidence_weight * smooth
        return loss + 0.0 * logits_DC.sum(), fit, apart, smooth

    return Objective(terms=terms, weight=documents, measures=("fit", "contrastive", "confidence"))


def uniform_objective(runtime: Runtime) -> Objective:
    """KL(uniform || prediction) of any texts, labelled or not: enough to tell two classifiers apart."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        logits_DC, _ = document_answers(runtime, model, batch)
        return (uniform_divergence_D(logits_DC).sum(),)

    return Objective(terms=terms, weight=documents)
