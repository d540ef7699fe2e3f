"""The forecast of a training stage: time, cost, checkpoints; an estimate with its basis. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.config.base import Section
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.checkpoint_interval import (
    Failures,
    best_every_steps,
    expected_goodput,
    job_seconds_between_failures,
    lost_seconds_per_failure,
)
from orchestrator.estimate.checkpoint_size import bytes_of_one
from orchestrator.estimate.cost import CostPlan, cost_of
from orchestrator.estimate.flops import forward_flops_per_token
from orchestrator.estimate.model_states import trainable_parameters
from orchestrator.estimate.row_lengths import RowShape
from orchestrator.estimate.step_time import Rate, StepTime, step_time


class TimePlan(Section):
    """Estimated duration of a stage; None if its inputs are unknown."""

    steps: int | None
    """Assumed steps: those of the plan, or a guess from the size of the files if packing decides."""
    steps_are_guessed: bool
    step_seconds: float | None
    compute_seconds: float | None
    """Of a step, like the next three."""
    communication_seconds: float | None
    """Communication that does not overlap with computation."""
    optimizer_seconds: float | None
    rollout_seconds: float | None
    tokens_per_second_per_device: float | None
    tokens_per_second: float | None
    startup_seconds: float
    """From the start of the job to the first step."""
    evaluation_seconds: float | None
    """All evaluations, and scoring under a reference policy."""
    hours: float | None
    """Of the whole stage: start-up, steps, evaluations, pauses for saves, expected failures."""
    basis: str


class CheckpointPlan(Section):
    """How often to save, and the share of productive time given failures and saves."""

    every_steps: int | None
    """As set; None saves at the end only."""
    recommended_every_steps: int | None
    """The interval with the highest goodput; None if no failures are assumed."""
    bytes: int
    """Of one checkpoint, all ranks."""
    save_seconds: float
    pause_seconds: float
    """How long a save pauses training."""
    hours_between_failures: float | None
    """Of the whole job."""
    lost_seconds_per_failure: float | None
    goodput: float
    """Productive share of the time after start-up, at the configured interval."""
    best_goodput: float
    """The same at the recommended interval."""


@dataclass(frozen=True, kw_only=True)
class ForecastInputs:
    """Inputs of a stage's forecast."""

    model: Architecture
    shape: RowShape
    rate: Rate | None
    why_no_rate: str
    steps: int | None
    steps_are_guessed: bool
    evaluation_rows: int
    train_rows: int
    """Trainable rows of an epoch; 0 where unknown."""
    startup_seconds: float
    save_seconds: float | None
    """Measured; None takes bytes over bandwidth."""
    pause_seconds: float | None


def forecast(
    config: RunConfig, stage: TrainingStage, known: ForecastInputs
) -> tuple[TimePlan, CheckpointPlan | None, CostPlan | None]:
    """Time, checkpoints and cost of a stage; no checkpoints without a step time, no cost without hours."""
    shape = with_completions(known.shape, stage)
    step = None if known.rate is None else step_time(known.model, config, stage, shape=shape, rate=known.rate)
    if known.rate is None or step is None:
        why = known.why_no_rate if known.rate is None else "a bandwidth of the cluster is null: set it for a forecast"
        return _unknown_time(known, why), None, None
    saving = checkpoint_plan(config, stage, known, step_seconds=step.total)
    scoring = _scoring_seconds(config, stage, known, shape)
    hours = None
    if known.steps is not None:
        hours = (known.startup_seconds + scoring + known.steps * step.total / saving.goodput) / 3600
    time = _time_plan(config, stage, known, step=step, scoring=scoring, hours=hours)
    cost = None if hours is None else cost_of(config.cluster.hardware, hours=hours, devices=config.world_size)
    return time, saving, cost


def checkpoint_plan(
    config: RunConfig, stage: TrainingStage, known: ForecastInputs, *, step_seconds: float
) -> CheckpointPlan:
    """The configured interval, next to the best one."""
    size = bytes_of_one(trainable_parameters(known.model, config), stage.optimizer)
    failures = _failures(config, stage, known, size)
    every = stage.checkpoint.every_steps
    best = best_every_steps(failures, step_seconds=step_seconds, steps=known.steps)
    set_steps = min(every or known.steps or 1, known.steps or every or 1)
    work = set_steps * step_seconds
    return CheckpointPlan(
        every_steps=every,
        recommended_every_steps=best,
        bytes=size,
        save_seconds=failures.pause + failures.writing,
        pause_seconds=failures.pause,
        hours_between_failures=None if failures.between is None else failures.between / 3600,
        lost_seconds_per_failure=None if failures.between is None else lost_seconds_per_failure(failures, work=work),
        goodput=expected_goodput(failures, work=work),
        best_goodput=expected_goodput(failures, work=(best or set_steps) * step_seconds),
    )


def _failures(config: RunConfig, stage: TrainingStage, known: ForecastInputs, size: int) -> Failures:
    """A save in the background pauses training for the probe and a copy to host memory, else for its writing too."""
    cluster = config.cluster
    written = size / (cluster.disk_gbytes_per_second * 1e9) if known.save_seconds is None else known.save_seconds
    host = cluster.hardware.host_gbytes_per_second
    copied = 0.0 if host is None else size / config.world_size / (host * 1e9)
    probe = stage.checkpoint.probe_rows * _row_seconds(config, known, with_completions(known.shape, stage))
    pause = probe + (copied if stage.checkpoint.background else written)
    return Failures(
        pause=pause if known.pause_seconds is None else known.pause_seconds,
        writing=written if stage.checkpoint.background else 0.0,
        restart=cluster.restart_seconds,
        between=job_seconds_between_failures(cluster.mean_time_to_failure_hours, config.world_size),
    )


def with_completions(shape: RowShape, stage: TrainingStage) -> RowShape:
    """A policy stage trains on prompts with completions; each is assumed to have its maximum length."""
    if stage.generation is None:
        return shape
    new = stage.generation.max_new_tokens
    return replace(
        shape, tokens=shape.tokens + new, computed_tokens=shape.computed_tokens + new, attended=shape.attended + new
    )


def _scoring_seconds(config: RunConfig, stage: TrainingStage, known: ForecastInputs, shape: RowShape) -> float:
    """Evaluations before, after and on the way, and the one scoring of all rows under a reference policy."""
    every, steps = stage.evaluate_every_steps, known.steps or 0
    evaluations = 2 + (max(0, steps - 1) // every if every else 0)
    rows = known.evaluation_rows * evaluations
    if stage.scores_reference_first:
        rows += known.train_rows + known.evaluation_rows
    return rows * _row_seconds(config, known, shape)


def _row_seconds(config: RunConfig, known: ForecastInputs, shape: RowShape) -> float:
    """Time of scoring a row, with all ranks at work."""
    assert known.rate is not None
    forward = forward_flops_per_token(known.model, config, length=shape.attended)
    return shape.computed_tokens * forward / known.rate.flops_per_second / config.world_size


def _time_plan(
    config: RunConfig,
    stage: TrainingStage,
    known: ForecastInputs,
    *,
    step: StepTime,
    scoring: float,
    hours: float | None,
) -> TimePlan:
    assert known.rate is not None
    tokens = stage.batch.global_size * with_completions(known.shape, stage).tokens / step.total
    return TimePlan(
        steps=known.steps,
        steps_are_guessed=known.steps_are_guessed,
        step_seconds=step.total,
        compute_seconds=step.compute,
        communication_seconds=step.exposed_communication,
        optimizer_seconds=step.optimizer,
        rollout_seconds=step.rollout,
        tokens_per_second_per_device=tokens / config.world_size,
        tokens_per_second=tokens,
        startup_seconds=known.startup_seconds,
        evaluation_seconds=scoring,
        hours=hours,
        basis=f"{known.rate.basis}; {_row_words(known.shape)}",
    )


def _unknown_time(known: ForecastInputs, why: str) -> TimePlan:
    names = ("step", "compute", "communication", "optimizer", "rollout", "evaluation")
    return TimePlan(
        steps=known.steps,
        steps_are_guessed=known.steps_are_guessed,
        **dict.fromkeys([f"{name}_seconds" for name in names]),
        tokens_per_second_per_device=None,
        tokens_per_second=None,
        startup_seconds=known.startup_seconds,
        hours=None,
        basis=why,
    )


def _row_words(shape: RowShape) -> str:
    sentences = {
        "prepared": f"rows of {shape.tokens:,.0f} tokens, counted in the prepared data",
        "guessed": f"rows of {shape.tokens:,.0f} tokens, guessed from the size of the files",
        "longest": f"rows of {shape.tokens:,.0f} tokens, the longest that are allowed",
    }
    return sentences[shape.source]
