"""Loss on held-out rows, with the same number of forward passes on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from orchestrator.dataloader.passes import passes
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import DataError
from orchestrator.training.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    loss: float
    """Mean over the units of all rows (trained tokens, in nats; pairs)."""
    trained_tokens: int
    rows: int
    measures: dict[str, float] = field(default_factory=dict[str, float])
    """The objective's other measures, as means over the units."""
    first: Evaluation | None = None
    """Evaluation of the first rows alone, if requested."""


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
    first: int | None = None,
) -> Evaluation:
    """Loss over the first `limit` rows (None: all); `first` also scores that many rows separately in the same pass."""
    count = rows.rows if limit is None else min(limit, rows.rows)
    head = count if first is None else min(first, count)
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, 1 + len(objective.measures), dtype=torch.float64, device=runtime.device)
    for part, chosen in enumerate((range(head), range(head, count))):
        for indices, done in passes(runtime, rows, chosen, micro_size=micro_size):
            terms = objective.terms(model, rows.batch(indices).to(runtime.device))
            sums[part] += torch.stack([term.double() for term in terms])
            runtime.phases.advance(chosen.start + done, count)
    model.train(was_training)
    shared = torch.tensor(runtime.sum_over_ranks(sums.flatten().tolist()), dtype=torch.float64).view_as(sums)
    whole = _mean(objective, rows, shared.sum(0).tolist(), count)
    return whole if first is None else replace(whole, first=_mean(objective, rows, shared[0].tolist(), head))


def _mean(objective: Objective, rows: PreparedRows, sums: Sequence[float], count: int) -> Evaluation:
    """Means over the units of the first `count` rows."""
    weight = objective.weight(rows, range(count))
    if weight == 0:
        raise DataError(
            f"the first {count} of {rows.rows} rows to score (format {rows.meta.format}, packing {rows.meta.packing}) have no trained "
            "token; see `orchestrator check`, or use packing=none"
        )
    loss, *measures = (total / weight for total in sums)
    return Evaluation(
        loss=loss,
        trained_tokens=int(rows.trained_tokens[:count].sum()),
        rows=count,
        measures=dict(zip(objective.measures, measures, strict=True)),
    )
