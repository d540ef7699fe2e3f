"""Early stopping: the decision after each evaluation; its state is part of every checkpoint. Must not know the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.config.training import EarlyStoppingConfig
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import ConfigError
from orchestrator.run_state.recorder import Recorder
from orchestrator.training.evaluation import Evaluation, values_of


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """State that the next decision depends on."""

    best_step: int | None = None
    """Step of the best evaluation so far; its checkpoint is retained."""
    best_value: float | None = None
    without_gain: int = 0
    """Consecutive evaluations that did not beat the best by more than `min_delta`."""
    is_over: bool = False
    """Patience is exhausted."""


NOT_STOPPING = Stopping()


def after_evaluation(state: Stopping, step: int, value: float, settings: EarlyStoppingConfig) -> Stopping:
    """The state after an evaluation; a value that is not finite counts as no improvement."""
    best = state.best_value
    gain = math.inf if best is None else (best - value if settings.mode == "min" else value - best)
    if math.isfinite(value) and gain > settings.min_delta:
        return Stopping(best_step=step, best_value=value)
    without = state.without_gain + 1
    return replace(state, without_gain=without, is_over=without >= settings.patience)


def judged(
    state: Stopping, step: int, value: float, settings: EarlyStoppingConfig, runtime: Runtime, record: Recorder
) -> Stopping:
    """`after_evaluation` with rank 0's value, recorded if training is to end; every rank must call it."""
    (agreed,) = runtime.sum_over_ranks([value if runtime.is_main else 0.0])
    after = after_evaluation(state, step, agreed, settings)
    if after.is_over:
        facts = {"metric": settings.metric, "best_step": after.best_step, "best_value": after.best_value}
        record.event("early_stop", step=step, **facts)
        record.log(
            f"stopped early: {settings.metric} has not improved in {after.without_gain} evaluations; the best was "
            f"{after.best_value} at step {after.best_step}"
        )
    return after


def metric_of(scored: Evaluation | None, settings: EarlyStoppingConfig, *, stage: str) -> float:
    """The metric of an evaluation; an unknown name raises ConfigError that lists the available ones."""
    if scored is None:
        raise ConfigError(
            f"stages.{stage}.early_stopping: the stage has no held-out rows; set stages.{stage}.data.eval.path"
        )
    values = values_of(scored)
    if settings.metric not in values:
        raise ConfigError(
            f"stages.{stage}.early_stopping.metric: {settings.metric} is not a result of this stage's evaluation; there are "
            f"{', '.join(values)}"
        )
    return values[settings.metric]
