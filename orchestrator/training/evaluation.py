"""Loss on held-out rows: the same number of forward passes on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orchestrator.training.data.rows import PreparedRows
from orchestrator.training.losses import Loss
from orchestrator.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    loss: float
    """Mean over the trained tokens of all rows, in nats."""
    trained_tokens: int
    rows: int


@torch.no_grad()
def evaluate(
    runtime: Runtime,
    model: torch.nn.Module,
    loss: Loss,
    rows: PreparedRows,
    *,
    micro_size: int,
    limit: int | None = None,
) -> Evaluation:
    """Loss over the first `limit` rows (all where None); ranks that run out of rows take filler rows."""
    count = rows.rows if limit is None else min(limit, rows.rows)
    per_pass = micro_size * runtime.world_size
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for start in range(0, count, per_pass):
        first = start + runtime.rank * micro_size
        indices = [index if index < count else -1 for index in range(first, first + micro_size)]
        loss_sum += loss(model, rows.batch(indices).to(runtime.device))
    model.train(was_training)
    trained = int(rows.trained_tokens[:count].sum())
    (total,) = runtime.sum_over_ranks([float(loss_sum)])
    return Evaluation(loss=total / trained, trained_tokens=trained, rows=count)
