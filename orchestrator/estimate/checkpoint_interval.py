"""How often to save, and what share of the time is work, when machines fail: closed forms; must not import torch.

A period is the work between two saves and the pause of a save (Ts). Failures come at random with mean time Tf for the whole job; each
costs the work since the last finished save, and a restart (Tr). A save that is written in the background pauses training for Ts only,
but counts no earlier than after its writing time (Tw).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What a save costs and what a failure costs, in seconds."""

    pause: float
    """Ts: how long a save pauses training."""
    writing: float
    """Tw: how long after the pause the save counts; 0 where training waits for it."""
    restart: float
    """Tr."""
    between: float | None
    """Tf of the whole job; None where no failure is reckoned with."""


def job_seconds_between_failures(device_hours: float | None, devices: int) -> float | None:
    """Mean time to failure of a job of so many devices: one failure stops all."""
    return None if device_hours is None else device_hours * 3600 / devices


def best_period(failures: Failures) -> float | None:
    """The period that leaves the most work: Ts + sqrt(2 (Tf + Tr) Ts + Ts^2); None without failures.

    It maximises (P - Ts) / (P (1 + Tr / Tf) + P^2 / (2 Tf)). Writing in the background bounds it from below: one write at a time.
    """
    if failures.between is None:
        return None
    pause = failures.pause
    free = pause + math.sqrt(2 * (failures.between + failures.restart) * pause + pause**2)
    return max(free, pause + failures.writing)


def best_every_steps(failures: Failures, *, step_seconds: float, steps: int | None) -> int | None:
    """Optimizer steps between saves, at most all of them; None without failures."""
    period = best_period(failures)
    if period is None:
        return None
    every = max(1, round((period - failures.pause) / step_seconds))
    return every if steps is None else min(every, max(1, steps))


def expected_goodput(failures: Failures, *, work: float) -> float:
    """Share of the time that is work which counts, when a save follows every `work` seconds of it.

    With failures at exponential times a period P = work + Ts takes (Tf + Tr + Tw) (e^(P / Tf) - 1) on average (Daly 2006, equation 20
    with restarts that do not fail; Tw is what a failure loses beyond the period).
    """
    period = work + failures.pause
    if failures.between is None:
        return work / period
    lost = failures.between + failures.restart + failures.writing
    exponent = period / failures.between
    return 0.0 if exponent > 500 else work / (lost * math.expm1(exponent))


def lost_seconds_per_failure(failures: Failures, *, work: float) -> float:
    """Half a period of work, what was still being written, and the restart."""
    return (work + failures.pause) / 2 + failures.writing + failures.restart
