"""What the training loop works on: the job, its progress, its side effects, and one step's result. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.config.training import TrainingStage
from orchestrator.data.order import Order
from orchestrator.dataloader.prefetch import Batches
from orchestrator.dataloader.protocols import Rows
from orchestrator.distributed.runtime import Runtime
from orchestrator.training.adalora_ranks import RankAllocation
from orchestrator.training.early_stopping import NOT_STOPPING, Stopping
from orchestrator.training.faults import HEALTHY, FaultState
from orchestrator.training.gradual_unfreezing import Unfreezing
from orchestrator.training.objectives import Objective
from orchestrator.training.profiler import Profiler


@dataclass(frozen=True, kw_only=True)
class LoopInputs:
    """What the loop trains, and on which rows. Model and optimizer are the ones prepared by Accelerate."""

    runtime: Runtime
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    stage: TrainingStage
    rows: Rows
    batches: Batches
    """Of `rows`."""
    order: Order
    steps: int
    flops_per_token: float | None
    peak_flops: float | None
    """Of all ranks together, per second."""
    allocation: RankAllocation | None = None
    """Reallocates AdaLoRA's ranks after every update."""
    unfreezing: Unfreezing | None = None
    """Opens trained parameters level by level; None trains all from the first step."""
    profiler: Profiler | None = None
    """Step profiler; None when profiling is off."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of the run after `step` optimizer steps."""

    step: int
    tokens: int
    trained_tokens: int
    health: FaultState = HEALTHY
    stopping: Stopping = NOT_STOPPING


@dataclass(frozen=True, kw_only=True)
class LoopCallbacks:
    """Side effects of the loop. Every rank calls them at the same step."""

    record: Callable[[Mapping[str, Any]], None]
    """Record a row of metrics; called on every rank, acts on rank 0."""
    evaluate: Callable[[Progress], Progress]
    """Score the model and decide whether training continues."""
    save: Callable[[Progress], None]
    rehearse: Callable[[Progress], None]
    """Try a save after the very first step, so that what would fail later fails now."""
    roll_back: Callable[[Progress], Progress | None]
    """Roll the model back to the last proven checkpoint before the streak of faults; None if there is none."""
    fault: Callable[[int, str, list[int]], None]
    """Report that the update of a step was skipped, why, and which rows the step contained."""
    stop_reason: Callable[[], str | None]
    """This rank's reason to stop, if it has one."""
    before_step: Callable[[int], Mapping[str, Any]]
    """Prepare the rows of a step (from 1); return their part of its row of metrics."""
    rows_consumed: Callable[[int, Sequence[int]], None]
    """Report the rows (including padding rows) that this rank computed at a step."""


def profiled_callbacks(hooks: LoopCallbacks, profiler: Profiler) -> LoopCallbacks:
    """The same side effects, each as a span of the profile."""
    return replace(
        hooks,
        before_step=profiler.watch(hooks.before_step, "rollout"),
        record=profiler.watch(hooks.record, "logging"),
        evaluate=profiler.watch(hooks.evaluate, "evaluation"),
        save=profiler.watch(hooks.save, "saving"),
        rehearse=profiler.watch(hooks.rehearse, "saving"),
    )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over the global batch."""

    sums: tuple[float, ...]
    """Of the loss and of the objective's measures."""
    weight: float
    """Units of the global batch, by which the sums are divided."""
    extra_metrics: Mapping[str, Any]
    grad_norm: float
    tokens: int
    trained_tokens: int
    data_seconds: float
    seconds: float
    rollout_seconds: float
    """Time to generate or load the step's rows, before `seconds`; negligible for prepared rows."""
    stop: bool
    fault: str | None
    """Why the update was skipped."""
