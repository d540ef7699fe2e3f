"""The objective of the GRPO family."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.alignment.rollout_rows import PolicyBatch
from orchestrator.config.alignment import PolicyStage
from orchestrator.dataloader.protocols import Rows
from orchestrator.distributed.runtime import Runtime
from orchestrator.losses.policy import aggregate_sum, kl_BT, policy_token_losses_BT
from orchestrator.losses.policy import weight as weight_of
from orchestrator.losses.token_logprobs import IGNORED
from orchestrator.training.objectives import Objective, token_scores_BT


def policy_objective(runtime: Runtime, stage: PolicyStage) -> Objective:
    """The clipped surrogate with a KL to the reference, over the completions of a global batch."""
    measured = "token" if stage.aggregation == "token" else "sequence"
    temperature = stage.rollout.temperature or 1.0
    most = stage.rollout.max_new_tokens

    def terms(model: torch.nn.Module, policy: PolicyBatch) -> tuple[torch.Tensor, ...]:
        batch = policy.batch
        mask_BT = batch.labels_BT != IGNORED
        logprobs_BT, _ = token_scores_BT(runtime, model, batch, temperature=temperature)
        losses_BT, clipped_BT = policy_token_losses_BT(
            logprobs_BT, policy.old_BT, policy.advantages_B, clip_low=stage.clip_low, clip_high=stage.clip_high
        )
        if stage.kl_coefficient and stage.kl_estimator != "k1":  # k1 has no gradient in a loss: it is in the rewards
            losses_BT = losses_BT + stage.kl_coefficient * kl_BT(
                logprobs_BT, policy.reference_BT, kind=stage.kl_estimator
            )
        loss = aggregate_sum(losses_BT, mask_BT, kind=stage.aggregation, max_new_tokens=most)
        with torch.no_grad():
            clipped = aggregate_sum(clipped_BT.float(), mask_BT, kind=measured, max_new_tokens=most)
            change_BT = logprobs_BT - policy.old_BT
            changed = aggregate_sum(change_BT.abs(), mask_BT, kind=measured, max_new_tokens=most)
        return loss, clipped, changed

    def weight(rows: Rows, indices: Sequence[int]) -> float:
        tokens = int(rows.trained_tokens[np.asarray(indices)].sum())
        return float(weight_of(stage.aggregation, num_tokens=tokens, num_sequences=len(indices)))

    return Objective(terms=terms, weight=weight, measures=("clip_share", "logprob_change"))
