"""The data results of `check` as text: coloured on a terminal, with brackets elsewhere; must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.preflight.data_check import DataReport, ShownRow

TRAINED_START, TRAINED_END = "⟦", "⟧"


def print_report(report: DataReport, console: Console) -> None:
    """Print three rows as the loss sees them, the table, and the lengths. `faults.told` reports faults, as errors."""
    from rich.table import Table

    for row in report.shown:
        console.rule(row.where, align="left", style="dim")
        _print_row(row, console)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in table_rows(report):
        table.add_row(name, value)
    console.print(table)
    for line in histogram_lines(report):
        console.print(line, highlight=False, markup=False)


def _print_row(row: ShownRow, console: Console) -> None:
    from rich.text import Text

    text = Text()
    for piece in row.pieces:
        if console.is_terminal:
            text.append(piece.text, style="bold green" if piece.trained else "dim")
        else:
            text.append(f"{TRAINED_START}{piece.text}{TRAINED_END}" if piece.trained else piece.text)
    console.print(text, soft_wrap=True)


def table_rows(report: DataReport) -> list[tuple[str, str]]:
    """(name, value) of the table."""
    counted = report.statistics
    rows = [
        ("rows in the files", f"{counted.source_rows:,}"),
        ("rows to train (packed rows where packing is on)", f"{counted.rows:,}"),
        ("tokens", f"{counted.tokens:,}"),
        ("trained tokens", f"{counted.trained_tokens:,} ({counted.trained_tokens / max(1, counted.tokens):.1%})"),
        ("truncated rows, tokens", f"{counted.truncated_rows:,}, {counted.truncated_tokens:,}"),
        ("rows that lose trained tokens", f"{counted.rows_losing_trained_tokens:,}"),
        ("duplicates", f"{counted.duplicates:,}"),
        ("longest row, tokens", f"{counted.longest_tokens:,}"),
        ("packing efficiency", f"{counted.packing_efficiency:.4f}"),
    ]
    if report.epoch is not None:
        rows += [
            ("steps per epoch", f"{report.epoch.steps:,}"),
            ("padding rows in the last step of an epoch", f"{report.epoch.fillers:,}"),
        ]
    rows.append(("rows checked", f"{report.checked_rows:,}"))
    rows += [
        (f"not used: {name.removeprefix('dropped_').replace('_', ' ')}", f"{count:,}")
        for name, count in counted.dropped.items()
    ]
    if report.evaluation_statistics is not None:
        held_out = report.evaluation_statistics
        rows.append(("held-out rows, trained tokens", f"{held_out.units:,}, {held_out.trained_tokens:,}"))
    return rows


def histogram_lines(report: DataReport) -> list[str]:
    """A bar per range of document lengths."""
    most = max((count for _, _, count in report.histogram), default=0)
    return [
        f"{low:>7,} to {high:>7,} tokens {count:>9,} {'█' * round(40 * count / most) if most else ''}"
        for low, high, count in report.histogram
    ]
