"""The single training loop of all stages. Must not know stages, files or launchers: side effects are callables."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.errors import TrainingFailed
from orchestrator.schedule import learning_rate_at
from orchestrator.training.faults import FaultState, after_step, find_fault, must_go_back, reason_to_give_up
from orchestrator.training.loop_state import LoopCallbacks, LoopInputs, Progress, StepResult
from orchestrator.training.optimizer import set_learning_rate
from orchestrator.training.profiler import begin_step, span
from orchestrator.training.step_metrics import metrics_row, micro_batches_of, real_indices, row_ids_of


def train(job: LoopInputs, progress: Progress, hooks: LoopCallbacks) -> Progress:
    """Continue from `progress` to the last step, or to the step at which the ranks agree to stop (and save there)."""
    job.model.train()
    window: list[StepResult] = []
    save_is_owed = False
    stop = _agree_to_stop(job, hooks) or pauses(job, progress)
    while not is_over(job, progress) and not stop:
        step = progress.step + 1
        begin_step(job.profiler)
        start = time.perf_counter()
        extra_metrics = hooks.before_step(step)
        seconds = time.perf_counter() - start
        result = optimizer_step(job, step, progress.health, votes_to_stop=hooks.stop_reason() is not None)
        result = replace(result, extra_metrics=extra_metrics, rollout_seconds=seconds)
        hooks.rows_consumed(step, [int(row) for indices in micro_batches_of(job, step) for row in indices])
        progress = _advanced(job, progress, result)
        window.append(result)
        stop = result.stop or pauses(job, progress)
        if step % job.stage.log_every_steps == 0 or step == job.steps or stop:
            hooks.record(metrics_row(job, progress, window))
            window = []
        if result.fault is not None:
            hooks.fault(step, result.fault, row_ids_of(job, step))
            if must_go_back(progress.health, job.stage.faults):
                progress, window, save_is_owed = _gone_back(job, progress, hooks, result.fault), [], False
                continue
        # Optimizer states do not exist before the first step: only now has a trial checkpoint its real size.
        if step == 1 and result.fault is None and not _is_due(job.stage.checkpoint.every_steps, step):
            hooks.rehearse(progress)
        if _evaluates(job, step):
            # Before the save, so that the checkpoint carries the held-out loss of its own step.
            progress = hooks.evaluate(progress)
            save_is_owed |= progress.stopping.best_step == step
            stop = _agree_to_stop(job, hooks) or stop
        save_is_owed |= _is_due(job.stage.checkpoint.every_steps, step)
        # During a streak of faults the weights are in doubt, so a save that is due waits.
        if stop or is_over(job, progress) or (save_is_owed and not progress.health.streak):
            hooks.save(progress)
            save_is_owed = False
    return progress


def is_over(job: LoopInputs, progress: Progress) -> bool:
    """Whether nothing is left to train: the last step is done, or early stopping ran out of patience."""
    return progress.step >= job.steps or progress.stopping.is_over


def pauses(job: LoopInputs, progress: Progress) -> bool:
    """Whether the stage was asked to pause at this step."""
    return job.stage.pause_at_step is not None and progress.step >= job.stage.pause_at_step


def optimizer_step(job: LoopInputs, step: int, health: FaultState, *, votes_to_stop: bool) -> StepResult:
    """Forward, backward and update over the global batch of `step` (from 1); a fault suppresses the update."""
    start = time.perf_counter()
    # A function of the step number alone: a resumed run needs no scheduler state.
    lr = learning_rate_at(job.stage, step, job.steps)
    set_learning_rate(job.optimizer, lr)
    if job.unfreezing is not None:
        job.unfreezing.go_to(step)
    real = real_indices(job, step)
    # Every rank knows the whole global batch, so all divide by the same number without communicating.
    weight = job.objective.weight(job.rows, real.tolist())
    if weight == 0:
        raise TrainingFailed(
            f"step {step}: the batch has no trained token; rows {row_ids_of(job, step)}; see `orchestrator check`"
        )
    sums = accumulate_gradients(job, step, health, weight, votes_to_stop=votes_to_stop)
    with span(job.profiler, "optimizer"):
        grad_norm = update(job, step, fault=sums.fault)
    fault = sums.fault or (None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}")
    return StepResult(
        sums=sums.totals,
        weight=weight,
        extra_metrics={},
        grad_norm=grad_norm,
        tokens=int(job.rows.lengths[real].sum()),
        trained_tokens=int(job.rows.trained_tokens[real].sum()),
        data_seconds=sums.data_seconds,
        seconds=time.perf_counter() - start,
        rollout_seconds=0.0,
        stop=sums.stop,
        fault=fault,
    )


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the ranks agreed on over the micro-batches of a step."""

    totals: tuple[float, ...]
    stop: bool
    fault: str | None
    data_seconds: float


def accumulate_gradients(job: LoopInputs, step: int, health: FaultState, weight: float, *, votes_to_stop: bool) -> Sums:
    """Gradient of sum(losses) / `weight`, the units (such as trained tokens) of the global batch.

    Accelerate and DeepSpeed divide by accumulation steps, and DDP and ZeRO average over ranks: both are undone here,
    so that the gradient does not depend on how the global batch is split. Before the last backward, which under
    DeepSpeed also updates, the ranks agree on whether the loss is at fault and on whether to stop. A fault makes the
    last backward NaN on every rank: DeepSpeed detects it and skips its update; otherwise `update` does.
    """
    accelerator = job.runtime.accelerator
    micro_batches = micro_batches_of(job, step)
    scale = job.runtime.world_size * len(micro_batches) / weight
    summed = torch.zeros(1 + len(job.objective.measures), device=job.runtime.device, dtype=torch.float64)
    sums = Sums(totals=(), stop=False, fault=None, data_seconds=0.0)
    for position, (batch, seconds) in enumerate(_timed_batches(job, step, micro_batches)):
        with accelerator.accumulate(job.model):
            with span(job.profiler, "forward"):
                loss, *measures = job.objective.terms(job.model, batch)
            summed += torch.stack([term.detach().double() for term in (loss, *measures)])
            sums = replace(sums, data_seconds=sums.data_seconds + seconds)
            # Before the last backward, not after it: under DeepSpeed that backward already updates the weights.
            if position == len(micro_batches) - 1:
                with span(job.profiler, "communication"):
                    # One all-reduce carries losses and votes to stop: stopping costs no communication of its own.
                    stop_votes, *totals = job.runtime.sum_over_ranks([float(votes_to_stop), *summed.tolist()])
                fault = _fault(job, step, health, totals[0] / weight)
                sums = replace(sums, totals=tuple(totals), stop=stop_votes > 0, fault=fault)
            with span(job.profiler, "backward"):
                # NaN instead of a skipped backward: its hooks communicate, so every rank must run it.
                accelerator.backward(loss * (scale if sums.fault is None else math.nan))
    return sums


def update(job: LoopInputs, step: int, *, fault: str | None) -> float:
    """Clip and step, unless there is a fault; return the gradient norm before clipping.

    DeepSpeed has already stepped in its backward pass, or skipped the step if the norm was not finite.
    """
    limit = job.stage.optimizer.max_grad_norm
    if job.allocation is not None:
        job.allocation.add_penalty()
    clipped = job.runtime.accelerator.clip_grad_norm_(job.model.parameters(), math.inf if limit is None else limit)
    assert clipped is not None
    norm = float(clipped)
    if fault is None and math.isfinite(norm):
        job.optimizer.step()
        if job.allocation is not None:
            job.allocation.allocate(step)
    job.optimizer.zero_grad()
    return norm


def _fault(job: LoopInputs, step: int, health: FaultState, loss: float) -> str | None:
    if step in health.omitted:
        return "a rollback skipped its data"
    return find_fault(health, loss, job.stage.faults)


def _gone_back(job: LoopInputs, progress: Progress, hooks: LoopCallbacks, fault: str) -> Progress:
    """Progress of the checkpoint rolled back to; TrainingFailed if a limit is exceeded."""
    step = progress.step
    why = reason_to_give_up(progress.health, job.stage.faults)
    earlier = None if why is not None else hooks.roll_back(progress)
    if earlier is None:
        raise TrainingFailed(
            f"step {step}: {fault}; {why or 'there is no earlier checkpoint to roll back to'}. Rows of the batch: {row_ids_of(job, step)}. "
            "Usual causes: a learning rate that is too high, damaged weights, a corrupt row"
        )
    return earlier


def _agree_to_stop(job: LoopInputs, hooks: LoopCallbacks) -> bool:
    (stop_votes,) = job.runtime.sum_over_ranks([float(hooks.stop_reason() is not None)])
    return stop_votes > 0


def _timed_batches(job: LoopInputs, step: int, micro_batches: Sequence[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch and how long it was waited for; the next one is made meanwhile, in the end that of the next step."""
    upcoming = [*micro_batches[1:], micro_batches_of(job, step + 1)[0] if step < job.steps else None]
    for indices, then in zip(micro_batches, upcoming, strict=True):
        start = time.perf_counter()
        with span(job.profiler, "data"):
            batch = job.batches.take(indices, then=then)
        yield batch, time.perf_counter() - start


def _advanced(job: LoopInputs, progress: Progress, result: StepResult) -> Progress:
    step = progress.step + 1
    mean = result.sums[0] / result.weight
    health = after_step(progress.health, step, loss=mean, fault=result.fault, settings=job.stage.faults)
    return replace(
        progress,
        step=step,
        tokens=progress.tokens + result.tokens,
        trained_tokens=progress.trained_tokens + result.trained_tokens,
        health=health,
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _evaluates(job: LoopInputs, step: int) -> bool:
    """Early stopping needs the last step's evaluation before the last save; else the stage evaluates at its end."""
    if step == job.steps:
        return job.stage.early_stopping is not None
    return step == job.stage.pause_at_step or _is_due(job.stage.evaluate_every_steps, step)
