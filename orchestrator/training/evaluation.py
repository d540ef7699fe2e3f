"""Loss on held-out rows: the same number of forward passes on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from orchestrator.training.data.rows import PreparedRows
from orchestrator.training.objectives import Objective
from orchestrator.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    loss: float
    """Mean over the units of all rows (trained tokens, in nats; pairs)."""
    trained_tokens: int
    rows: int
    measures: dict[str, float] = field(default_factory=dict[str, float])
    """What else the objective tells, as means over the units."""


def values_of(scored: Evaluation) -> dict[str, float]:
    """Loss and measures by their names in metrics.jsonl."""
    return {"eval_loss": scored.loss} | {f"eval_{name}": value for name, value in scored.measures.items()}


@torch.no_grad()
def evaluate(
    runtime: Runtime,
    model: torch.nn.Module,
    objective: Objective,
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
    sums = torch.zeros(1 + len(objective.measures), dtype=torch.float64, device=runtime.device)
    for start in range(0, count, per_pass):
        first = start + runtime.rank * micro_size
        indices = [index if index < count else -1 for index in range(first, first + micro_size)]
        sums += torch.stack([term.double() for term in objective.terms(model, rows.batch(indices).to(runtime.device))])
        runtime.phases.advance(min(start + per_pass, count), count)
    model.train(was_training)
    weight = objective.weight(rows, range(count))
    loss, *measures = (total / weight for total in runtime.sum_over_ranks(sums.tolist()))
    return Evaluation(
        loss=loss,
        trained_tokens=int(rows.trained_tokens[:count].sum()),
        rows=count,
        measures=dict(zip(objective.measures, measures, strict=True)),
    )
