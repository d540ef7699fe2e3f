"""What each kind of stage minimises: sums over micro-batches, the same for any split. Must not know files or loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orchestrator.config.alignment import RewardStage
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.merging import MergeStage
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.meta import Kind
from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.protocols import Rows
from orchestrator.distributed.runtime import Runtime
from orchestrator.losses import preference as losses
from orchestrator.losses.token_logprobs import IGNORED, labelled_positions, sums_by_document
from orchestrator.models.causal_lm import Query


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a stage: sum over the units of the global batch / number of units."""

    terms: Callable[[torch.nn.Module, Any], tuple[torch.Tensor, ...]]
    """For a micro-batch: the sum of its units' losses, then the sums of the `measures`; fp32 scalars."""
    weight: Callable[[Rows, Sequence[int]], float]
    """Units of the rows of a global batch: trained tokens, pairs, or whatever the loss is a mean over."""
    measures: tuple[str, ...] = ()
    """Names of the values reported alongside the loss, also as means over the units."""


def sft_objective(runtime: Runtime) -> Objective:
    """Next-token cross-entropy of the trained tokens."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        return (-token_scores_BT(runtime, model, batch, is_summed=True)[0].sum(),)

    return Objective(terms=terms, weight=trained_tokens)


def prompt_objective(runtime: Runtime) -> Objective:
    """Next-token cross-entropy of every token of unlabelled rows: enough to tell two policies apart."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        labels_BT = batch.input_ids_BT
        if batch.attention_mask_BT is not None:
            labels_BT = labels_BT.masked_fill(batch.attention_mask_BT == 0, IGNORED)
        whole = replace(batch, labels_BT=labels_BT, positions_K=labelled_positions(labels_BT))
        return (-token_scores_BT(runtime, model, whole, is_summed=True)[0].sum(),)

    def weight(rows: Rows, indices: Sequence[int]) -> float:
        # The first token of a row has no prediction.
        return float((rows.lengths[np.asarray(indices)] - 1).sum())

    return Objective(terms=terms, weight=weight)


def proof_objective(runtime: Runtime, stage: TrainingStage | ScoringStage | MergeStage, rows_kind: Kind) -> Objective:
    """The objective that scores a reopened artifact from its files alone, hence without a reference policy."""
    if isinstance(stage, RewardStage):
        return reward_objective(runtime, stage)
    takes_all = rows_kind == "prompt" or stage.makes == "merged model"
    return prompt_objective(runtime) if takes_all else sft_objective(runtime)


def reward_objective(runtime: Runtime, stage: RewardStage) -> Objective:
    """Bradley-Terry over pairs, each answer scored at its last token."""

    def terms(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        scores_D = document_scores(runtime, model, batch)
        # Documents of a pair are neighbours: chosen, then rejected.
        chosen_N, rejected_N = scores_D[0::2], scores_D[1::2]
        margin_N = torch.nan_to_num(batch.values_D[0::2]) if stage.use_margin else None
        loss_N = losses.bradley_terry_N(chosen_N, rejected_N, margin_N=margin_N)
        loss_N = loss_N + stage.centring * losses.centring_N(chosen_N, rejected_N)
        correct = (chosen_N > rejected_N).sum().float()
        # The second term keeps a batch of padding rows in the graph: every rank must run its backward pass.
        return loss_N.sum() + 0.0 * scores_D.sum(), correct, (chosen_N - rejected_N).detach().sum()

    return Objective(terms=terms, weight=pairs, measures=("accuracy", "score_difference"))


def token_scores_BT(
    runtime: Runtime,
    model: torch.nn.Module,
    batch: Batch,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    is_summed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probability of each labelled token in nats, entropy if requested), fp32; 0 at unlabelled positions.

    Computed by the model's loss head, in its own forward pass; entropies carry no gradient. Set `is_summed` if only
    the sum of the log-probabilities matters: a trained head then computes its logits once, not twice.
    """
    query = Query(
        labels_BT=batch.labels_BT,
        positions_K=batch.positions_K,
        temperature=temperature,
        entropies=entropies,
        is_summed=is_summed,
        prompts=batch.prompts,
    )
    with runtime.forward_context():
        return model(**batch.model_inputs(), query=query)


def document_scores(runtime: Runtime, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """A reward model's score of each document, D of them: read at its last token, wherever the padding is."""
    with runtime.forward_context():
        scores_BT = model(**batch.model_inputs())[..., 0].float()
    if not batch.documents:
        return scores_BT.reshape(-1)[:0]
    return torch.stack([scores_BT[span.sequence, span.stop - 1] for span in batch.documents])


def document_logprobs(runtime: Runtime, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed log-probability of each document's trained tokens, number of these tokens), D each."""
    logprobs_BT, _ = token_scores_BT(runtime, model, batch)
    logprobs_D = sums_by_document(logprobs_BT, batch.documents)
    return logprobs_D, sums_by_document((batch.labels_BT != IGNORED).float(), batch.documents)


def trained_tokens(rows: Rows, indices: Sequence[int]) -> float:
    return float(rows.trained_tokens[np.asarray(indices, dtype=np.int64)].sum())


def documents(rows: Rows, indices: Sequence[int]) -> float:
    return float(rows.documents_in(indices))


def pairs(rows: Rows, indices: Sequence[int]) -> float:
    return rows.documents_in(indices) / 2
