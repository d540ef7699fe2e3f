"""The interval between saves and the expected goodput, against closed forms and a seeded simulation of failures."""

from __future__ import annotations

import math
import random

import pytest

from orchestrator.estimate.checkpoint_interval import (
    Failures,
    best_every_steps,
    best_period,
    expected_goodput,
    job_seconds_between_failures,
    lost_seconds_per_failure,
)

CASES = [
    Failures(pause=30, writing=0, restart=600, between=8 * 3600),
    Failures(pause=120, writing=0, restart=900, between=1.8 * 3600),
    Failures(pause=5, writing=60, restart=600, between=8 * 3600),
    Failures(pause=1, writing=300, restart=300, between=2 * 3600),
    Failures(pause=10, writing=0, restart=60, between=47 * 86400),
]


def simulated(failures: Failures, work: float, *, seed: int, seconds: float) -> float:
    """Share of a long time that is saved work: exponential failures, saves that count only when they are written."""
    assert failures.between is not None
    draw = random.Random(seed)
    now, saved, failure = 0.0, 0.0, draw.expovariate(1 / failures.between)
    done, written_at, waiting = 0.0, math.inf, 0.0
    while now < seconds:
        end_of_period = now + work + failures.pause
        if written_at <= min(end_of_period, failure):
            saved, written_at = waiting, math.inf
        if failure < end_of_period:
            now = failure + failures.restart
            failure = now + draw.expovariate(1 / failures.between)
            done, written_at = saved, math.inf
            continue
        if written_at <= end_of_period:
            saved, written_at = waiting, math.inf
        now, done = end_of_period, done + work
        waiting, written_at = done, now + failures.writing
    return saved / now


@pytest.mark.parametrize("failures", CASES)
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_forecast_is_within_two_points_of_a_simulation(failures: Failures, factor: float) -> None:
    best = best_period(failures)
    assert best is not None and failures.between is not None
    work = max(failures.writing, factor * (best - failures.pause))
    real = simulated(failures, work, seed=7, seconds=3000 * failures.between)
    assert abs(expected_goodput(failures, work=work) - real) < 0.02


@pytest.mark.parametrize("failures", CASES)
def test_no_other_interval_is_better(failures: Failures) -> None:
    best = best_period(failures)
    assert best is not None
    work = best - failures.pause
    others = [work * factor for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)]
    allowed = [other for other in others if other >= failures.writing]
    assert len(allowed) >= 3
    assert all(
        expected_goodput(failures, work=other) <= expected_goodput(failures, work=work) + 1e-3 for other in allowed
    )


def test_the_best_period_by_hand() -> None:
    failures = Failures(pause=30, writing=0, restart=600, between=28_800)
    assert best_period(failures) == pytest.approx(30 + math.sqrt(2 * 29_400 * 30 + 900))
    assert best_every_steps(failures, step_seconds=10, steps=None) == 133
    assert best_every_steps(failures, step_seconds=10, steps=60) == 60
    assert lost_seconds_per_failure(failures, work=970) == 500 + 600


def test_a_save_in_the_background_is_never_overtaken_by_the_next() -> None:
    failures = Failures(pause=0.1, writing=2000, restart=60, between=3600)
    assert best_period(failures) == 2000.1


def test_without_failures_only_the_pauses_cost() -> None:
    failures = Failures(pause=1, writing=0, restart=600, between=None)
    assert best_period(failures) is None and best_every_steps(failures, step_seconds=1, steps=10) is None
    assert expected_goodput(failures, work=99) == 0.99


def test_a_job_fails_as_often_as_all_its_devices() -> None:
    assert job_seconds_between_failures(8090, 1024) == pytest.approx(7.9 * 3600, rel=1e-3)
    assert job_seconds_between_failures(None, 8) is None
    nearly_always_down = Failures(pause=10, writing=0, restart=600, between=0.001)
    assert expected_goodput(nearly_always_down, work=100) == 0.0
