"""Optimizer steps of one pass over prepared rows: the one definition for plan, `check` and training.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.config.alignment import PolicyStage
from orchestrator.config.training import TrainingStage
from orchestrator.schedule import rollout_steps_per_epoch, steps_per_epoch

if TYPE_CHECKING:
    from orchestrator.data.order import Indices


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over all rows of a stage."""

    steps: int
    """Optimizer steps."""
    fillers: int
    """Rows, or batches of a token budget, that fill up the last step; they train nothing."""


def epoch_of(stage: TrainingStage, rows: int, lengths: Callable[[], Indices], *, seed: int) -> Epoch:
    """The epoch of a stage over `rows` trainable rows; `lengths` are read only if a token budget decides."""
    size = stage.batch.global_size
    if isinstance(stage, PolicyStage):  # rows are prompts; the last rollout is filled up from the next epoch
        return Epoch(steps=rollout_steps_per_epoch(stage, rows), fillers=0)
    if stage.data.tokens_per_batch is None:
        return Epoch(steps=steps_per_epoch(rows, size), fillers=-rows % size)
    from orchestrator.data.order import TokenBudgetOrder  # imports numpy, which a plan avoids if possible

    order = TokenBudgetOrder(lengths(), size, seed, tokens_per_batch=stage.data.tokens_per_batch)
    return Epoch(steps=order.steps_per_epoch, fillers=order.fillers)
