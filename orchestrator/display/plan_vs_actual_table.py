"""Formats plan and measurement next to each other. Must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.planning.plan_vs_actual import MOST_TIMES, Comparison
from orchestrator.run_state.goodput import TimeSpent
from orchestrator.text.durations import duration_words, seconds_words

SHOWN_PARTS = (
    "training", "rollout", "startup", "evaluation", "saving", "replayed", "proof", "gaps", "other",
)  # fmt: skip


def measurement_view(found: Sequence[Comparison]) -> RenderableType:
    """Measurements, with the plan's forecast in brackets if there is one, and the breakdown of time."""
    table = Table(box=None, pad_edge=False, title="measured (and planned)", title_justify="left", title_style="bold")
    for name in ("run", "stage", "tokens/s", "a step", "memory, GiB", "of the peak FLOP/s"):
        if name != "of the peak FLOP/s" or any(one.measured.executed_mfu is not None for one in found):
            table.add_column(name, overflow="fold")
    for one in found:
        real = one.measured
        cells = [
            one.run,
            one.stage,
            _with_plan(f"{real.tokens_per_second:,.0f}", one.planned_tokens_per_second, lambda plan: f"{plan:,.0f}"),
            _with_plan(seconds_words(real.step_seconds), one.planned_step_seconds, seconds_words),
            _with_plan(f"{real.peak_memory_gib:.2f}", one.planned_memory_gib, lambda plan: f"{plan:.2f}"),
        ]
        if len(table.columns) > len(cells):
            cells.append("" if real.executed_mfu is None else f"{real.executed_mfu:.1%}")
        table.add_row(*map(Text, cells))
    times = [Text(f"time of {one.run} {one.stage}: {spent_words(one.spent)}") for one in found if one.spent is not None]
    times = times if len(found) <= MOST_TIMES else []
    return Group(table, *times)


def _with_plan(measured: str, planned: float | None, words: Callable[[float], str]) -> str:
    return measured if planned is None else f"{measured} ({words(planned)})"


def spent_words(spent: TimeSpent) -> str:
    """The parts of at least one percent of the wall-clock time, largest first."""
    wall = spent.wall_seconds
    parts = sorted(((getattr(spent, name), name) for name in SHOWN_PARTS), reverse=True)
    shares = [f"{name} {seconds / wall:.0%}" for seconds, name in parts if wall and seconds / wall >= 0.01]
    return f"{duration_words(wall / 3600)}: {', '.join(shares)}"
