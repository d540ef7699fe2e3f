"""How far a merged model is from the trained one: row by row on the ranks, so that no table of logits is ever whole.

B rows of T tokens in a batch, K predicted tokens, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from orchestrator.dataloader.batch import Batch
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Way:
    """A merge method and its measured effect."""

    name: str
    kl: float
    """Mean KL(trained || merged), in nats per token."""
    agreement: float
    """Share of the tokens for which both predict the same next token."""
    loss: float
    """Loss of the merged model on the trained tokens (on all, if none is trained)."""


@torch.no_grad()
def compare(
    name: str,
    runtime: Runtime,
    trained: torch.nn.Module,
    merged: torch.nn.Module,
    batches: list[Batch],
) -> Way:
    """Measure a merged model on these batches; every rank must call it and compares a share of them.

    Both models' logits of one batch are on the device at a time.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for turn in runtime.turns(len(batches)):
        batch = batches[turn or 0].to(runtime.device)
        with runtime.forward_context():
            one_BTV, other_BTV = (model(**batch.model_inputs()).logits.float() for model in (trained, merged))
        if turn is not None:
            sums += batch_sums(one_BTV, other_BTV, batch)
            runtime.phases.advance(min(turn + runtime.world_size, len(batches)), len(batches))
    kl, same, loss, tokens = runtime.sum_over_ranks(sums.tolist())
    divergence = kl / tokens
    # Rounding may make it negative; NaN stays NaN, which no limit accepts.
    return Way(name=name, kl=0.0 if divergence < 0 else divergence, agreement=same / tokens, loss=loss / tokens)


def batch_sums(one_BTV: torch.Tensor, other_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """fp64 sums over a batch's tokens, on the host: KL(one || other), equal predictions, loss of `other`, number."""
    sums = torch.zeros(4, dtype=torch.float64)
    for document in batch.documents:
        span = slice(document.start, document.stop - 1)
        one_KV = one_BTV[document.sequence, span].log_softmax(-1)
        other_KV = other_BTV[document.sequence, span].log_softmax(-1)
        next_K = batch.input_ids_BT[document.sequence, span.start + 1 : span.stop + 1]
        sums[0] += float(functional.kl_div(other_KV, one_KV, log_target=True, reduction="sum"))
        sums[1] += float((one_KV.argmax(-1) == other_KV.argmax(-1)).sum())
        sums[2] += float(functional.nll_loss(other_KV, next_K, reduction="sum"))
        sums[3] += len(next_K)
    return sums


def batches_of(rows: PreparedRows, *, limit: int, micro_size: int) -> list[Batch]:
    """The first `limit` rows in batches, on the host."""
    count = min(limit, rows.rows)
    return [rows.batch(list(range(first, min(first + micro_size, count)))) for first in range(0, count, micro_size)]
