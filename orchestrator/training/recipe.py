"""What a kind of stage gives to the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.order import Order
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.dataloader.protocols import Rows
from orchestrator.distributed.runtime import Runtime
from orchestrator.generation.greedy_answers import Answers
from orchestrator.run_state.recorder import Record
from orchestrator.run_state.stage_context import Context
from orchestrator.training.evaluation import Evaluation
from orchestrator.training.gradual_unfreezing import Unfreezing
from orchestrator.training.objectives import Objective

PROOF_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Session:
    """A stage whose model and optimizer are with Accelerate, before its first step."""

    context: Context
    runtime: Runtime
    record: Record
    model: torch.nn.Module
    optimizer: Any
    rows: PreparedRows
    held: PreparedRows | None
    """Held-out rows."""
    unfreezing: Unfreezing | None


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the loop trains on, and how it is judged."""

    objective: Objective
    rows: Rows
    order: Order
    score: Callable[[], Evaluation | None]
    """The model on held-out rows; every rank calls it."""
    probe: Callable[[], float] | None
    """The model's loss on rows that never change; every rank calls it."""
    proof: Callable[[], Evaluation]
    """What the re-opened artifact must score again."""
    is_proof_scored: bool = False
    """Whether `score` has the objective of the proof: then its first rows are what must come out again, without another pass."""
    begin: Callable[[int], Mapping[str, Any]] = lambda _step: {}
    answers: Answers | None = None
    """What the model answers to held-out rows, for the user's own metrics; None for stages that answer nothing."""
    summary: Callable[[], Mapping[str, Any]] = dict
    """What result.json tells beside the usual; rank 0 calls it after the last step."""


BuildModel = Callable[[Context, torch.dtype, bool], torch.nn.Module]
"""(context, dtype of the weights, whether rows are packed) -> the module to train, its tuning applied."""


PlanCourse = Callable[[Session], Course]
"""Every rank calls it, before a checkpoint is put back: the model is the one that the stage starts from."""
