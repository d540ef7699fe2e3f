"""Steps and learning rates as pure functions of the step; must not import torch."""

from __future__ import annotations

import math

from orchestrator.config.alignment import PolicyStage
from orchestrator.config.training import ScheduleConfig, TrainingStage

ROUNDING = 1e-9
"""Epochs need not be whole steps."""


def total_steps(*, max_steps: int | None, epochs: float | None, steps_per_epoch: int) -> int:
    """Optimizer steps of a stage: `max_steps`, as in other trainers even if `epochs` is given; else the epochs' steps,
    rounded up.
    """
    if max_steps is not None:
        return max_steps
    assert epochs is not None, "the configuration's rules ask for one of them"
    return math.ceil(epochs * steps_per_epoch)


def steps_per_epoch(rows: int, global_size: int) -> int:
    """Optimizer steps of one pass: the last batch is filled up, no row is dropped."""
    return -(-rows // global_size)


def rollout_steps(stage: PolicyStage) -> int:
    """Optimizer steps on one rollout: its completions, `passes` times, in global batches."""
    return stage.rollout.prompts * stage.rollout.group_size * stage.rollout.passes // stage.batch.global_size


def rollout_steps_per_epoch(stage: PolicyStage, rows: int) -> int:
    """Optimizer steps in which every prompt is used once; the last rollout is filled up from the next epoch."""
    return math.ceil(rows / stage.rollout.prompts) * rollout_steps(stage)


def open_levels(step: int, *, every_steps: float, levels: int) -> int:
    """Levels of gradual unfreezing that are trained at optimizer step `step` (from 1): level k from step 1 + ceil(k x every) on."""
    return sum(step >= level_opens_at(level, every_steps=every_steps) for level in range(levels))


def level_opens_at(level: int, *, every_steps: float) -> int:
    """The first step of a level."""
    return 1 + math.ceil(level * every_steps - ROUNDING)


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps with a rising learning rate, rounded up (slanted_triangular: down)."""
    if schedule.name == "slanted_triangular":
        return math.floor(schedule.warmup_ratio * steps)
    return math.ceil(schedule.warmup_ratio * steps)


def stable_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps at the peak rate between rise and fall."""
    if schedule.decay_ratio is None:
        return 0
    return max(0, steps - warmup_steps(schedule, steps) - math.ceil(schedule.decay_ratio * steps))


def learning_rate_at(stage: TrainingStage, step: int, steps: int) -> float:
    """The learning rate at optimizer step `step` (from 1) of `steps`."""
    return stage.optimizer.lr * learning_rate_factor(stage.schedule, step, steps)


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak rate at optimizer step `step` (from 1) of `steps`.

    Warm-up: step / warmup. After it and the steps at the peak, with t = (step - start) / (steps - start) in (0, 1]: linear
    falls as 1 - t, cosine as (1 + cos(pi t)) / 2 (1608.03983, equation 5, one cycle), both down to `final_ratio`.
    Slanted triangle (1801.06146, equation 3): (1 + p (ratio - 1)) / ratio with p rising to 1 and falling to 0.
    """
    warmup = warmup_steps(schedule, steps)
    start = warmup + stable_steps(schedule, steps)
    progress = min(1.0, (step - start) / max(1, steps - start))
    if step <= warmup:
        rising = step / warmup
        lowest = schedule.final_ratio if schedule.name == "slanted_triangular" else 0.0
        return lowest + (1.0 - lowest) * rising
    if step <= start:
        return 1.0
    match schedule.name:
        case "constant":
            return 1.0
        case "linear" | "slanted_triangular":
            falling = 1.0 - progress
        case "cosine":
            falling = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * falling
