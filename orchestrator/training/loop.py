"""The one visible training loop. Must not know stages, files or launchers: effects come in as callables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.config.stages import SftStage
from orchestrator.dataset.order import BatchOrder
from orchestrator.errors import TrainingFailed
from orchestrator.schedule import learning_rate_factor
from orchestrator.training.data.rows import Batch, PreparedRows
from orchestrator.training.losses import Loss
from orchestrator.training.optimizers import set_learning_rate
from orchestrator.training.runtime import Runtime

@dataclass(frozen=True, kw_only=True)
class Job:
    """What the loop trains, and on what. The model and the optimizer are Accelerate's prepared ones."""

    runtime: Runtime
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    stage: SftStage
    rows: PreparedRows
    order: BatchOrder
    steps: int
    flops_per_token: float | None
    peak_flops: float | None
    """Of all ranks together, per second."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after `step` optimizer steps."""

    step: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The effects of the loop."""

    record: Callable[[Mapping[str, Any]], None]
    """Takes a row of metrics; called on every rank, acts on rank 0."""
    evaluate: Callable[[Progress], None]
    save: Callable[[Progress], None]
    stop_reason: Callable[[], str | None]
    """This rank's own wish to stop."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over the global batch."""

    loss_sum: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    data_seconds: float
    seconds: float
    stop: bool


def train(job: Job, progress: Progress, hooks: Hooks) -> Progress:
    """Goes on from `progress` to the last step, or to the step at which the ranks agree to stop (and saves there)."""
    window: list[StepResult] = []
    for step in range(progress.step + 1, job.steps + 1):
        result = optimizer_step(job, step, stop_wish=hooks.stop_reason() is not None)
        progress = _advanced(progress, result)
        window.append(result)
        if step % job.stage.log_every_steps == 0 or step == job.steps or result.stop:
            hooks.record(_metrics_row(job, step, window))
            window = []
        if _is_due(job.stage.evaluate_every_steps, step) and step < job.steps:
            hooks.evaluate(progress)
        if result.stop and step < job.steps:
            hooks.save(progress)
            return progress
        if _is_due(job.stage.checkpoint.every_steps, step) or step == job.steps:
            hooks.save(progress)
    return progress


def optimizer_step(job: Job, step: int, *, stop_wish: bool) -> StepResult:
    """Forward, backward and update over the global batch of `step` (from 1)."""
    start = time.perf_counter()
    lr = job.stage.optimizer.lr * learning_rate_factor(job.stage.schedule, step, job.steps)
    set_learning_rate(job.optimizer, lr)
    indices = job.order.global_batch(step - 1)
    real = indices[indices >= 0]
    trained = int(job.rows.trained_tokens[real].sum())
    if trained == 0:
        raise TrainingFailed(f"step {step}: the batch has no trained token; rows {_row_ids(job, real)}; see `orchestrator check`")
    loss_sum, data_seconds, stop = accumulate_gradients(job, step, trained, stop_wish=stop_wish)
    grad_norm = update(job)
    if not math.isfinite(grad_norm):
        raise TrainingFailed(f"step {step}: the gradient norm is {grad_norm}; rows {_row_ids(job, real)}")
    return StepResult(
        loss_sum=loss_sum,
        grad_norm=grad_norm,
        tokens=int(job.rows.lengths[real].sum()),
        trained_tokens=trained,
        data_seconds=data_seconds,
        seconds=time.perf_counter() - start,
        stop=stop,
    )


def accumulate_gradients(job: Job, step: int, trained: int, *, stop_wish: bool) -> tuple[float, float, bool]:
    """Gradient of sum(token losses) / `trained`, the trained tokens of the global batch; (loss sum, data seconds, stop).

    Accelerate and DeepSpeed divide by accumulation steps, and DDP and ZeRO average over ranks: both are undone here,
    so that the gradient does not depend on how the global batch is split. Before the last backward, which under
    DeepSpeed also updates, the ranks agree that the loss is finite and on whether to stop.
    """
    accelerator = job.runtime.accelerator
    micro_batches = job.order.micro_batches(
        step - 1, rank=job.runtime.rank, world_size=job.runtime.world_size, micro_size=job.stage.batch.micro_size
    )
    scale = job.runtime.world_size * len(micro_batches) / trained
    loss_sum = torch.zeros((), device=job.runtime.device, dtype=torch.float64)
    total, data_seconds, stop = 0.0, 0.0, False
    for position, (batch, seconds) in enumerate(_timed_batches(job, micro_batches)):
        data_seconds += seconds
        with accelerator.accumulate(job.model):
            loss = job.loss(job.model, batch)
            loss_sum += loss.detach()
            if position == len(micro_batches) - 1:
                total, stop = _agree(job, step, float(loss_sum), stop_wish=stop_wish)
            accelerator.backward(loss * scale)
    return total, data_seconds, stop


def update(job: Job) -> float:
    """Clips and steps; returns the norm of the gradient before clipping. DeepSpeed has stepped in its backward."""
    limit = job.stage.optimizer.max_grad_norm
    norm = job.runtime.accelerator.clip_grad_norm_(job.model.parameters(), math.inf if limit is None else limit)
    job.optimizer.step()
    job.optimizer.zero_grad()
    assert norm is not None
    return float(norm)


def _agree(job: Job, step: int, loss_sum: float, *, stop_wish: bool) -> tuple[float, bool]:
    total, wishes = job.runtime.sum_over_ranks([loss_sum, float(stop_wish)])
    if not math.isfinite(total):
        indices = job.order.global_batch(step - 1)
        raise TrainingFailed(
            f"step {step}: the loss is {total}; nothing was updated. Rows of the batch: {_row_ids(job, indices[indices >= 0])}. "
            "Usual causes: a learning rate that is too high, damaged weights, a corrupt row"
        )
    return total, wishes > 0


def _timed_batches(job: Job, micro_batches: Sequence[Any]) -> Iterator[tuple[Batch, float]]:
    for indices in micro_batches:
        start = time.perf_counter()
        batch = job.rows.batch(indices).to(job.runtime.device)
        yield batch, time.perf_counter() - start


def _metrics_row(job: Job, step: int, window: Sequence[StepResult]) -> dict[str, Any]:
    """A row of metrics.jsonl over the steps since the last row; tokens are those of these steps."""
    tokens = sum(result.tokens for result in window)
    trained = sum(result.trained_tokens for result in window)
    seconds = sum(result.seconds for result in window)
    known = job.flops_per_token is not None and job.peak_flops is not None
    return {
        "step": step,
        "epoch": step / job.order.steps_per_epoch,
        "loss": sum(result.loss_sum for result in window) / trained,
        "grad_norm": window[-1].grad_norm,
        "lr": job.stage.optimizer.lr * learning_rate_factor(job.stage.schedule, step, job.steps),
        "tokens": tokens,
        "trained_tokens": trained,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / len(window),
        "data_seconds": sum(result.data_seconds for result in window) / len(window),
        "memory_gib": job.runtime.peak_memory_gib(),
        "mfu": (job.flops_per_token or 0.0) * tokens / seconds / (job.peak_flops or 1.0) if known else None,
    }


def _advanced(progress: Progress, result: StepResult) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + result.tokens,
        trained_tokens=progress.trained_tokens + result.trained_tokens,
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _row_ids(job: Job, indices: Any) -> list[int]:
    return [int(row) for index in indices.tolist() for row in job.rows.row_ids(index)]
