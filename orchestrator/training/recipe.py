"""What a kind of stage supplies to the shared training loop."""

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
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext
from orchestrator.training.evaluation import Evaluation
from orchestrator.training.gradual_unfreezing import Unfreezing
from orchestrator.training.objectives import Objective

PROOF_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Session:
    """A stage after Accelerate has prepared its model and optimizer, before the first step."""

    context: StageContext
    runtime: Runtime
    record: Recorder
    model: torch.nn.Module
    optimizer: Any
    rows: PreparedRows
    held: PreparedRows | None
    """Held-out rows."""
    unfreezing: Unfreezing | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the loop trains on, and how the model is evaluated."""

    objective: Objective
    rows: Rows
    order: Order
    score: Callable[[], Evaluation | None]
    """Scores the model on held-out rows; every rank calls it."""
    probe: Callable[[], float] | None
    """The model's loss on a fixed set of rows; every rank calls it."""
    proof: Callable[[], Evaluation]
    """The score that the reopened artifact must reproduce."""
    is_proof_scored: bool = False
    """Whether `score` uses the proof's objective: the proof then reuses its first rows, without another pass."""
    before_step: Callable[[int], Mapping[str, Any]] = lambda _step: {}
    answers: Answers | None = None
    """Model answers to held-out rows, for the user's own metrics; None for stages without answers."""
    summary: Callable[[], Mapping[str, Any]] = dict
    """Extra fields for result.json; rank 0 calls it after the last step."""


BuildModel = Callable[[StageContext, torch.dtype, bool], torch.nn.Module]
"""(context, dtype of the weights, whether rows are packed) -> the module to train, with its tuning applied."""


MakeRecipe = Callable[[Session], Recipe]
"""Called on every rank before a checkpoint is restored: the model is still the one the stage starts from."""
