"""Objectives of the DPO family and KTO."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.config.alignment import DpoStage
from orchestrator.dataloader.batch import Batch
from orchestrator.distributed.runtime import Runtime
from orchestrator.losses import preference as losses
from orchestrator.losses.preference import PairLogprobs, pairs_of_documents
from orchestrator.training.objectives import Objective, document_logprobs, documents, pairs

ReferenceOf = Callable[[Batch], torch.Tensor]
"""The reference policy's summed log-probabilities of a batch's documents, D of them."""


def preference_objective(runtime: Runtime, stage: DpoStage, reference_of: ReferenceOf) -> Objective:
    """DPO and its family over pairs; ORPO and SimPO do not use the reference."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        logprobs_D, tokens_D = document_logprobs(runtime, model, batch)
        policy = pairs_of_documents(logprobs_D, tokens_D)
        reference = pairs_of_documents(reference_of(batch).to(logprobs_D.device), tokens_D)
        loss_N = preference_losses_N(stage, policy, reference)
        implicit = losses.implicit_rewards(policy, reference, beta=stage.beta)
        accuracy = implicit.correct_N.sum().float()
        return loss_N.sum() + 0.0 * logprobs_D.sum(), accuracy, implicit.chosen_N.sum(), implicit.rejected_N.sum()

    return Objective(terms=terms, weight=pairs, measures=("accuracy", "reward_chosen", "reward_rejected"))


def kto_objective(
    runtime: Runtime, stage: DpoStage, reference_of: ReferenceOf, divergence: Callable[[], float]
) -> Objective:
    """KTO over single labelled answers; `divergence` is the step's KL estimate, the same on every rank."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        logprobs_D, _ = document_logprobs(runtime, model, batch)
        ratios_D = logprobs_D - reference_of(batch).to(logprobs_D.device)
        desirable_D = batch.values_D > 0.5
        weights = (stage.desirable_weight, stage.undesirable_weight)
        kl = torch.tensor(divergence(), device=logprobs_D.device)
        loss_D = losses.kto_N(ratios_D, desirable_D, kl=kl, beta=stage.beta, weights=weights)
        right = ((ratios_D > kl) == desirable_D).sum().float()
        return loss_D.sum() + 0.0 * logprobs_D.sum(), right, (stage.beta * ratios_D.detach() * desirable_D).sum()

    return Objective(terms=terms, weight=documents, measures=("accuracy", "reward_desirable"))


def preference_losses_N(stage: DpoStage, policy: PairLogprobs, reference: PairLogprobs) -> torch.Tensor:
    """The loss of every pair under the stage's chosen method."""
    match stage.loss:
        case "dpo":
            return losses.dpo_N(policy, reference, beta=stage.beta, label_smoothing=stage.label_smoothing)
        case "ipo":
            return losses.ipo_N(policy, reference, beta=stage.beta)
        case "hinge":
            return losses.hinge_N(policy, reference, beta=stage.beta)
        case "orpo":
            return losses.orpo_N(policy, weight=stage.beta)
        case "simpo":
            return losses.simpo_N(policy, beta=stage.beta, gamma=stage.target_margin)
        case "kto":
            raise AssertionError("KTO has rows, not pairs")
