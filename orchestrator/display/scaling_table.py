"""Formats plans for several numbers of nodes as a table. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from orchestrator.planning.scaling import ScalingRow
from orchestrator.text.durations import duration_words, seconds_words


def scaling_table(rows: Sequence[ScalingRow], title: str) -> Table:
    """The table of one stage."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    names = ("nodes", "devices", "batch", "step", "tokens/s", "efficiency", "time", "device h", "$", "goodput")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.nodes), str(row.devices), *_cells(row))
    return table


def _cells(row: ScalingRow) -> list[str]:
    if row.micro_size is None:
        return [f"{row.global_size} cannot be shared", *[""] * 7]
    batch = f"{row.global_size} = {row.micro_size} x {row.devices} x {row.accumulation_steps}"
    time, saving, cost = row.time, row.checkpointing, row.cost
    if time is None or time.step_seconds is None or saving is None:
        return [batch, "no forecast", *[""] * 6]
    return [
        batch,
        seconds_words(time.step_seconds),
        f"{time.tokens_per_second:,.0f}",
        "" if row.efficiency is None else f"{row.efficiency:.0%}",
        "" if time.hours is None else duration_words(time.hours),
        "" if cost is None else f"{cost.device_hours:,.4g}",
        "" if cost is None or cost.dollars is None else f"{cost.dollars:,.0f}",
        f"{saving.best_goodput:.2%}",
    ]
