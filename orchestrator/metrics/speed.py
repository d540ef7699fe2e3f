"""The speed of a run, defined once: for its result, its status, comparisons and the forecasts that learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from orchestrator.metrics.jsonl import Row, attempt_of, number_of

SPEED = "tokens_per_second"
WARM_UP_ROWS = 2
"""The first rows of an attempt include allocations, caches and compilations."""


def timed_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the newest attempt that has a speed, after its warm-up; the last row of a shorter attempt.

    Earlier attempts may have run on another machine.
    """
    timed = [row for row in rows if number_of(row, SPEED) is not None]
    newest = max((attempt_of(row) for row in timed), default=0)
    own = [row for row in timed if attempt_of(row) == newest]
    return own[WARM_UP_ROWS:] or own[-1:]


def run_speed(rows: Sequence[Row]) -> float | None:
    """Tokens per second of all ranks: the median of the timed rows; None before there are any."""
    speeds = [speed for row in timed_rows(rows) if (speed := number_of(row, SPEED)) is not None]
    return median(speeds) if speeds else None
