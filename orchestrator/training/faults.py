"""Assesses losses: which update to skip, when to roll back, when to give up. Pure; must not import torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config.training import FaultConfig


@dataclass(frozen=True, kw_only=True)
class FaultState:
    """State that the next assessment depends on; part of every checkpoint."""

    streak: tuple[int, ...] = ()
    """Steps without an update since the last good one."""
    skipped: int = 0
    """Updates skipped so far in this branch of the run."""
    omitted: tuple[int, ...] = ()
    """Steps whose data was removed by a rollback."""
    rollbacks: int = 0
    losses: tuple[float, ...] = ()
    """Mean losses of the most recent good steps, kept if a spike threshold needs them."""


HEALTHY = FaultState()


def find_fault(health: FaultState, loss: float, settings: FaultConfig) -> str | None:
    """The reason why a step with this mean loss must not update the weights, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if settings.spike_sigma is None or len(health.losses) < settings.spike_window:
        return None
    mean, deviation = statistics.fmean(health.losses), statistics.stdev(health.losses)
    limit = mean + settings.spike_sigma * deviation
    if loss <= limit:
        return None
    return f"the loss spiked to {loss:.4g}, over {mean:.4g} + {settings.spike_sigma:g} x {deviation:.2g} = {limit:.4g}"


def after_step(health: FaultState, step: int, *, loss: float, fault: str | None, settings: FaultConfig) -> FaultState:
    """The health after a step that was updated (no fault) or skipped."""
    if step in health.omitted:
        return health
    if fault is not None:
        return replace(health, streak=(*health.streak, step), skipped=health.skipped + 1)
    losses = (*health.losses, loss)[-settings.spike_window :] if settings.spike_sigma is not None else ()
    return replace(health, streak=(), losses=losses)


def must_go_back(health: FaultState, settings: FaultConfig) -> bool:
    """Whether so many consecutive steps were skipped that the weights themselves are in doubt."""
    return len(health.streak) >= settings.skips_before_rollback


def reason_to_give_up(health: FaultState, settings: FaultConfig) -> str | None:
    """The limit that was exceeded, or None."""
    if health.skipped + len(health.omitted) > settings.max_skips:
        return f"{health.skipped + len(health.omitted)} updates were skipped, faults.max_skips is {settings.max_skips}"
    if must_go_back(health, settings) and health.rollbacks >= settings.max_rollbacks:
        return f"{len(health.streak)} faults in a row after {health.rollbacks} rollbacks, faults.max_rollbacks is {settings.max_rollbacks}"
    return None


def health_from_json(values: Mapping[str, Any]) -> FaultState:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return FaultState(**fields)
