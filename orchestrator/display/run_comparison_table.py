"""Formats the comparison of runs as tables that fit the terminal. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.errors import EXIT_DONE
from orchestrator.monitoring.run_comparison import (
    MISSING,
    ComparedRun,
    RunComparison,
    compare_runs,
    runs_to_compare,
    value_text,
)
from orchestrator.monitoring.run_facts import StageFacts
from orchestrator.run_state.frozen import warn_newer
from orchestrator.text.durations import seconds_words

SHOWN_KEYS = 30
WIDEST_VALUE = 28
MOST_COLUMNS = 3
"""Upper limit of runs shown as columns; more become rows, if that fits."""
GAP = 2

Rows = dict[str, list[str]]
"""A fact -> its text for every run."""


def show_comparison(folders: Sequence[Path], *, as_json: bool) -> int:
    """Print the comparison of the runs in the given folders."""
    runs = runs_to_compare(folders)
    for run in runs:
        warn_newer(run)
    found = compare_runs(runs)
    if as_json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return EXIT_DONE
    console = Console()
    console.print(comparison_view(found, console))
    return EXIT_DONE


def comparison_view(found: RunComparison, console: Console) -> RenderableType:
    """Keys that differ, then each stage's results, then why losses are not comparable."""
    labels = [run.label for run in found.runs]
    parts: list[RenderableType] = []
    keys = _key_rows(found)
    if keys:
        parts += _tables("configuration (only what differs)", labels, keys, console.width)
        left = len(found.differing) - SHOWN_KEYS
        if left > 0:
            parts.append(Text(f"and {left} more keys; format=json has them all", style="dim"))
    else:
        parts.append(Text("the configurations are the same"))
    for name in dict.fromkeys(name for run in found.runs for name in run.stages):
        own = [run for run in found.runs if name in run.stages]
        rows = _fact_rows([run.stages[name] for run in own])
        parts += [Text(""), *_tables(f"stage {name}", [run.label for run in own], rows, console.width)]
        parts += _reasons(name, own)
    if found.warnings:
        parts += [Text(""), *(Text(f"warning: {warning}", style="yellow") for warning in found.warnings)]
    return Group(*parts)


def _key_rows(found: RunComparison) -> Rows:
    return {
        key: [_short(value_text(run.keys[key]) if key in run.keys else MISSING) for run in found.runs]
        for key in found.differing[:SHOWN_KEYS]
    }


def _fact_rows(facts: Sequence[StageFacts]) -> Rows:
    """The rows with a value in at least one run."""
    measures = list(dict.fromkeys(name for one in facts for name in (*one.before, *one.after, *one.best)))
    makers: Mapping[str, Callable[[StageFacts], str]] = {
        "state": lambda one: one.state,
        "makes": lambda one: (one.artifact or "").replace("_", " "),
        **{f"{name} {when}": _measure(name, when) for name in measures for when in ("before", "after", "best")},
        "training loss": lambda one: "" if one.train_loss is None else f"{one.train_loss:.4f}",
        "steps": lambda one: f"{one.steps:,}",
        "tokens": lambda one: "" if one.tokens is None else f"{one.tokens:,}",
        "tokens/s": lambda one: "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
        "peak memory": lambda one: "" if one.peak_memory_gib is None else f"{one.peak_memory_gib:.2f} GiB",
        "wall time": lambda one: "" if one.wall_seconds is None else seconds_words(one.wall_seconds),
        "cost": lambda one: "" if one.dollars is None else f"${one.dollars:,.2f}",
    }
    rows = {name: [make(one) for one in facts] for name, make in makers.items()}
    return {name: cells for name, cells in rows.items() if any(cells)}


def _measure(name: str, when: str) -> Callable[[StageFacts], str]:
    def cell(facts: StageFacts) -> str:
        if when == "best":
            found = facts.best.get(name)
            return "" if found is None else f"{found[0]:.4f} (step {found[1]})"
        value = (facts.before if when == "before" else facts.after).get(name)
        return "" if value is None else f"{value:.4f}"

    return cell


def _reasons(name: str, runs: Sequence[ComparedRun]) -> list[RenderableType]:
    """Why a stage failed, wrapped, because a reason is too long for a cell."""
    return [
        Text(f"{run.label}: {run.stages[name].state}: {run.stages[name].why}", style="dim")
        for run in runs
        if run.stages[name].why
    ]


def _tables(title: str, labels: Sequence[str], rows: Rows, width: int) -> list[RenderableType]:
    """One column per run, in blocks as wide as the terminal; one row per run if there are many and they fit."""
    facts = list(rows)
    if len(labels) > MOST_COLUMNS and _natural_width([["run", *facts], *_transposed(labels, rows)]) <= width:
        return [_table(title, ["run", *facts], _transposed(labels, rows))]
    tables: list[RenderableType] = []
    borders = _blocks(labels, rows, width)
    for start, stop in pairwise(borders):
        block = [[fact, *rows[fact][start:stop]] for fact in facts]
        tables.append(_table(title if start == 0 else "", ["", *labels[start:stop]], block))
    return tables


def _blocks(labels: Sequence[str], rows: Rows, width: int) -> list[int]:
    """Start indices of blocks of runs, and the end of the last: as many side by side as the terminal has room for."""
    first = max(map(len, rows))
    borders, used = [0], first
    for number, label in enumerate(labels):
        need = GAP + max([len(label), *(len(cells[number]) for cells in rows.values())])
        if used + need > width and borders[-1] != number:
            borders.append(number)
            used = first
        used += need
    return [*borders, len(labels)]


def _transposed(labels: Sequence[str], rows: Rows) -> list[list[str]]:
    return [[label, *(cells[number] for cells in rows.values())] for number, label in enumerate(labels)]


def _natural_width(lines: Sequence[Sequence[str]]) -> int:
    columns = zip(*lines, strict=True)
    return sum(GAP + max(map(len, column)) for column in columns) - GAP


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.padding = (0, GAP, 0, 0)
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def _short(text: str) -> str:
    """The end of a long value, because paths differ at the end."""
    return text if len(text) <= WIDEST_VALUE else f"…{text[1 - WIDEST_VALUE :]}"
