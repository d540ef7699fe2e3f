"""Formats time, cost and checkpoints of a plan as text. Must not import torch."""

from __future__ import annotations

from datetime import datetime, timedelta

from orchestrator.estimate.cost import CostPlan
from orchestrator.estimate.stage_time import CheckpointPlan, TimePlan
from orchestrator.planning.records import Plan, StagePlan
from orchestrator.text.durations import duration_words, seconds_words


def forecast_rows(stage: StagePlan) -> list[tuple[str, str]]:
    """Lines of a stage: tokens, time, cost, checkpoints; nothing for a stage that trains nothing."""
    if stage.time is None:
        return []
    rows = [("tokens", _tokens(stage)), ("time", time_words(stage.time))]
    if stage.cost is not None:
        rows.append(("cost", cost_words(stage.cost)))
    if stage.checkpointing is not None:
        rows.append(("checkpoints", checkpoint_words(stage.checkpointing)))
    return [*rows, ("estimate from", stage.time.basis)]


def finish_line(plan: Plan, now: datetime) -> str | None:
    """When the whole pipeline would finish; None if a stage's time is unknown."""
    times = [stage.time for stage in plan.stages if stage.global_size is not None]
    hours = [time.hours for time in times if time is not None and time.hours is not None]
    if not hours or len(hours) < len(times):
        return None
    done = now + timedelta(hours=sum(hours))
    return (
        f"about {duration_words(sum(hours))} of training in all: if started now, done {done:%a %d %b %H:%M} (estimate)"
    )


def time_sentence(time: TimePlan) -> str:
    """`10 min: start-up 8 min, then about 2 steps of 3.67 s at 559,262 tokens/s`; guesses are marked."""
    if time.step_seconds is None:
        return "no forecast"
    speed = f"{seconds_words(time.step_seconds)} a step, {time.tokens_per_second:,.0f} tokens/s"
    if time.hours is None:
        return speed
    parts = [f"start {duration_words(time.startup_seconds / 3600)}"] if time.startup_seconds >= 1 else []
    if time.evaluation_seconds and time.evaluation_seconds >= 1:
        parts.append(f"evaluations {duration_words(time.evaluation_seconds / 3600)}")
    details = f", with {' and '.join(parts)}" if parts else ""
    guess = (
        f" for about {time.steps:,} steps (the number is guessed from the size of the files)"
        if time.steps_are_guessed
        else ""
    )
    return f"{duration_words(time.hours)}{guess}{details}; {speed}"


def time_words(time: TimePlan) -> str:
    """Step time with its parts, rate, hours."""
    if time.step_seconds is None:
        return "no forecast"
    named = [
        ("computing", time.compute_seconds),
        ("waiting for the network", time.communication_seconds),
        ("updating", time.optimizer_seconds),
        ("rollouts", time.rollout_seconds),
    ]
    parts = [f"{name} {share:.0%}" for name, seconds in named if (share := (seconds or 0) / time.step_seconds) >= 0.01]
    split = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    rate = f"{time.tokens_per_second_per_device:,.0f} tokens/s a device, {time.tokens_per_second:,.0f} in all"
    if time.hours is None:
        return f"{seconds_words(time.step_seconds)} a step{split}; {rate}"
    guess = f", some {time.steps:,} steps" if time.steps_are_guessed else ""
    return f"{seconds_words(time.step_seconds)} a step{split}; {rate}; {duration_words(time.hours)}{guess}"


def cost_words(cost: CostPlan) -> str:
    """Device hours, energy, money."""
    energy = "" if cost.energy_kwh is None else f", {cost.energy_kwh:,.3g} kWh"
    money = "" if cost.dollars is None else f", ${cost.dollars:,.2f}"
    return f"{cost.device_hours:,.3g} device hours{energy}{money}"


def checkpoint_words(plan: CheckpointPlan) -> str:
    """The configured interval, the best one, and the cost of a failure."""
    every = "at the end only" if plan.every_steps is None else f"every {plan.every_steps} steps"
    size = f"{plan.bytes / 2**20:,.1f} MiB in {seconds_words(plan.save_seconds)}"
    if plan.recommended_every_steps is None or plan.lost_seconds_per_failure is None:
        return f"{every}, {size}; {plan.goodput:.2%} of the time is spent training"
    assert plan.hours_between_failures is not None
    return (
        f"{every}, {size}; goodput {plan.goodput:.2%}, best {plan.best_goodput:.2%} with every_steps="
        f"{plan.recommended_every_steps}; a failure, one in {duration_words(plan.hours_between_failures)}, costs "
        f"{seconds_words(plan.lost_seconds_per_failure)}"
    )


def _tokens(stage: StagePlan) -> str:
    if stage.tokens is None or stage.trained_tokens is None:
        return "known after prepare"
    share = stage.trained_tokens / stage.tokens if stage.tokens else 0.0
    return f"{stage.tokens:,} an epoch, {stage.trained_tokens:,} of them trained ({share:.1%})"
