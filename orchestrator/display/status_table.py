"""The text of `status`: a table that fits the terminal, reasons below it, plan and measurement.

Must not import torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchestrator.config.base import JsonValue, flatten
from orchestrator.display.plan_vs_actual_table import measurement_view
from orchestrator.errors import EXIT_DONE, ConfigError, nearest
from orchestrator.metrics.console import duration
from orchestrator.monitoring.run_comparison import value_text
from orchestrator.monitoring.stage_status import StageStatus, find_runs, stage_statuses, warn_damaged
from orchestrator.planning.plan_vs_actual import comparisons
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import read_config, warn_newer

WATCH_SECONDS = 2.0
ENDED = ("finished", "stopped", "failed", "lost")
KEY = "key="
ALIASES = {"memory": "memory_gib"}
NOT_SHOWN = ("attempt", "time", "step")
LABELS = ("run", "stage")
"""Columns that every table repeats."""
GAP = 2

Cell = Callable[[StageStatus], str]


def show_status(folder: Path, *, watch: bool, extra: Sequence[str] = (), as_json: bool = False) -> int:
    """A run, or every run of a folder; with `watch`, a live table until all have ended. `extra` are further columns."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"{folder} holds no run: neither run.json nor NAME/run.json exists")
    for run in runs:
        warn_newer(run)
    statuses = stage_statuses(runs)
    warn_damaged(statuses)
    columns = _extra_columns(extra, runs, statuses)
    if as_json:
        print(json.dumps([_plain(status, columns) for status in statuses], indent=2, ensure_ascii=False))
        return EXIT_DONE
    console = Console()
    if not watch:
        console.print(status_view(statuses, columns, width=console.width))
        found = comparisons(runs)
        if found:
            console.print("", measurement_view(found), sep="\n")
        return EXIT_DONE
    with Live(status_view(statuses, columns, width=console.width), console=console, auto_refresh=False) as live:
        while not all(status.state in ENDED for status in statuses):
            time.sleep(WATCH_SECONDS)
            statuses = stage_statuses(runs)
            live.update(status_view(statuses, columns, width=console.width), refresh=True)
    return EXIT_DONE


def status_view(
    statuses: Sequence[StageStatus], extra: Mapping[str, Cell] | None = None, *, width: int = 80
) -> RenderableType:
    """The table, with further columns in a second one if they do not fit; a state's reason goes below, where it has
    room.
    """
    cells = {name: [make(status) for status in statuses] for name, make in {**_columns(), **(extra or {})}.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    fits = sum(GAP + max(map(len, [name, *column])) for name, column in shown.items()) - GAP <= width
    usual = {name: column for name, column in shown.items() if fits or name not in (extra or {})}
    rest = {name: column for name, column in shown.items() if name not in usual or name in LABELS}
    tables = [_table(usual), *([] if fits else [Text(""), _table(rest)])]
    reasons = [
        Group(Text(f"{status.run} {status.stage}, {status.state}:"), Padding(Text(status.why), (0, 0, 0, 2)))
        for status in statuses
        if status.why
    ]
    return Group(*tables, *([Text("")] if reasons else []), *reasons)


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in (*LABELS, "state", "job") else "right", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _columns() -> dict[str, Cell]:
    """The usual columns without those that are empty in every row."""
    return {
        "run": lambda status: status.run,
        "stage": lambda status: status.stage,
        "state": lambda status: status.state,
        "step": lambda status: f"{status.step}/{status.steps}" if status.steps is not None else str(status.step),
        "loss": lambda status: _number(status.loss, ".4f"),
        # A policy's held-out loss is its negative reward: the reward itself is shown.
        "eval": lambda status: "" if "eval_reward" in status.newest else _number(status.eval_loss, ".4f"),
        "reward": lambda status: (
            f"{reward:.4f}" if isinstance(reward := status.newest.get("eval_reward"), float) else ""
        ),
        "tokens/s": lambda status: _number(status.tokens_per_second, ",.0f"),
        "ETA": lambda status: (
            "" if status.eta_seconds is None or status.state != "running" else duration(status.eta_seconds)
        ),
        "tries": lambda status: str(status.attempts) if status.attempts > 1 else "",
        "job": lambda status: status.job or "",
    }


def _extra_columns(
    wanted: Sequence[str], runs: Sequence[RunFolder], statuses: Sequence[StageStatus]
) -> dict[str, Cell]:
    """A column of metrics.jsonl, or a key of the configuration (whole, or from its stage on); ConfigError if no run has
    it.
    """
    keys = {run.root: flatten(cast("JsonValue", read_config(run))) for run in runs} if wanted else {}
    columns: dict[str, Cell] = {}
    problems: list[str] = []
    for given in wanted:
        name = given.removeprefix(KEY)
        cell = _extra_cell(name, keys, only_keys=given.startswith(KEY))
        if not any(cell(status) for status in statuses):
            problems.append(_unknown(name, keys, statuses))
        columns[name] = cell
    if problems:
        raise ConfigError(problems)
    return columns


def _extra_cell(name: str, keys: Mapping[Path, Mapping[str, JsonValue]], *, only_keys: bool) -> Cell:
    def cell(status: StageStatus) -> str:
        metric = None if only_keys else status.newest.get(ALIASES.get(name, name))
        if isinstance(metric, int | float):
            return f"{metric:.4g}"
        own = keys[status.folder]
        found = next((key for key in (name, f"stages.{status.stage}.{name}") if key in own), None)
        return "" if found is None else value_text(own[found])

    return cell


def _unknown(name: str, keys: Mapping[Path, Mapping[str, JsonValue]], statuses: Sequence[StageStatus]) -> str:
    metrics = {key for status in statuses for key, value in status.newest.items() if isinstance(value, int | float)}
    known = {key for own in keys.values() for key in own} | metrics
    guess = nearest(name, known) or nearest(name, {key.rpartition(".")[2] for key in known})
    columns = ", ".join(sorted(metrics - set(NOT_SHOWN))) or "none yet"
    hint = f"did you mean {guess}?" if guess else f"columns of metrics are {columns}; keys are those of `config`"
    return f"--show {name}: no run has such a column or key; {hint}"


def _plain(status: StageStatus, extra: Mapping[str, Cell]) -> dict[str, Any]:
    fields = asdict(status) | {"folder": str(status.folder)}
    del fields["newest"]
    return fields | ({"show": {name: cell(status) for name, cell in extra.items()}} if extra else {})


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
