"""The rows of a run for a person: plain lines, and a live display for a run in the foreground; must not import torch.

The display belongs to the launcher's process. It only reads the files that the job writes, so it can neither slow nor stop
the job, and it works the same for a job on another machine with a shared disk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.metrics.jsonl import Row, Tail, number_of, step_of

_POLL_SECONDS = 0.25
_NUM_TIMED_STEPS = 50
_SHOWN_ELSEWHERE = ("event", "time", "step", "attempt", "message")


@dataclass(frozen=True, kw_only=True)
class StageView:
    """What to follow of one stage. Rows before the offsets are the past: they move the bar, and are not told again."""

    stage: str
    metrics_file: Path
    events_file: Path
    total_steps: int
    metrics_offset: int
    events_offset: int


def view_of_stage(stage: str, *, metrics_file: Path, events_file: Path, total_steps: int) -> StageView:
    """The view of a stage that is about to start (again): call it before the launch."""
    return StageView(
        stage=stage,
        metrics_file=metrics_file,
        events_file=events_file,
        total_steps=total_steps,
        metrics_offset=_size(metrics_file),
        events_offset=_size(events_file),
    )


def show_progress(view: StageView, is_running: Callable[[], bool], *, console: Console | None = None) -> None:
    """Show a stage until `is_running()` is false: a live bar on a terminal, plain lines elsewhere."""
    console = console or Console()
    if console.is_terminal:
        _show_live(view, is_running, console)
    else:
        seen = Progressed(total_steps=view.total_steps)
        _follow(view, is_running, lambda row: _print(console, line(row, seen.total_steps)), seen=seen)


def line(row: Row, total_steps: int) -> str:
    """One row as one line of a log: training, evaluation or event."""
    if "event" in row:
        return _event_line(row)
    where = f"step {step_of(row)}/{total_steps}" if "step" in row else "step -"
    numbers = [
        ("epoch", ".2f", ""),
        ("loss", ".4f", ""),
        ("eval_loss", ".4f", ""),
        ("accuracy", ".3f", ""),
        ("eval_accuracy", ".3f", ""),
        ("eval_f1_macro", ".3f", ""),
        ("eval_pearson", ".3f", ""),
        ("reward", ".4f", ""),
        ("eval_reward", ".4f", ""),
        ("kl", ".3g", ""),
        ("completion_tokens", ".0f", ""),
        ("grad_norm", ".3g", ""),
        ("lr", ".2e", ""),
        ("tokens_per_second", ",.0f", " tokens/s"),
        ("memory_gib", ".1f", " GiB"),
    ]
    shown = [_shown(key, number_of(row, key), form, unit) for key, form, unit in numbers]
    return "  ".join([where, *filter(None, shown)])


@dataclass
class Progressed:
    """What the bar shows, gathered from the rows so far."""

    total_steps: int = 0
    """As the plan has it; the stage itself knows better where rows are packed or left out."""
    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=_NUM_TIMED_STEPS))

    def take(self, row: Row) -> None:
        """Take in one row. A replayed step moves the bar back, because that work is done again."""
        if "loss" in row and "step" in row:
            self.step = step_of(row)
        steps = number_of(row, "steps")
        if row.get("event") == "train" and steps is not None:
            self.total_steps = int(steps)
        self.loss = _newer(row, "loss", self.loss)
        self.eval_loss = _newer(row, "eval_loss", self.eval_loss)
        self.lr = _newer(row, "lr", self.lr)
        self.tokens_per_second = _newer(row, "tokens_per_second", self.tokens_per_second)
        seconds = number_of(row, "step_seconds")
        if seconds is not None:
            self.step_seconds.append(seconds)

    def eta_seconds(self, total_steps: int | None = None) -> float | None:
        """Steps left times the median of the last step times; None before the first step."""
        total = self.total_steps if total_steps is None else total_steps
        return max(0, total - self.step) * median(self.step_seconds) if self.step_seconds else None


def duration(seconds: float) -> str:
    """`1:02:03`, or `02:03` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def _show_live(view: StageView, is_running: Callable[[], bool], console: Console) -> None:
    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    ]
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(view.stage, total=view.total_steps, numbers="", eta="")
        seen = Progressed(total_steps=view.total_steps)
        _draw(progress, task, seen)

        def tell(row: Row) -> None:
            if "event" in row or "eval_loss" in row:
                _print(progress.console, line(row, seen.total_steps))

        _follow(view, is_running, tell, seen=seen, draw=lambda: _draw(progress, task, seen))


def _draw(progress: Progress, task: TaskID, seen: Progressed) -> None:
    numbers = [
        _shown("loss", seen.loss, ".4f", ""),
        _shown("eval_loss", seen.eval_loss, ".4f", ""),
        _shown("lr", seen.lr, ".2e", ""),
        _shown("tokens_per_second", seen.tokens_per_second, ",.0f", " tokens/s"),
    ]
    left = seen.eta_seconds()
    eta = "" if left is None else f"ETA {duration(left)}"
    progress.update(
        task, total=seen.total_steps, completed=seen.step, numbers="  ".join(filter(None, numbers)), eta=eta
    )


def _follow(
    view: StageView,
    is_running: Callable[[], bool],
    tell: Callable[[Row], None],
    *,
    seen: Progressed,
    draw: Callable[[], None] = lambda: None,
) -> None:
    """Read both files until the job has ended and all its rows are read."""
    metrics, events = Tail(view.metrics_file), Tail(view.events_file)
    for row in [*events.poll(until=view.events_offset), *metrics.poll(until=view.metrics_offset)]:
        seen.take(row)
    while True:
        running = is_running()
        for row in [*events.poll(), *metrics.poll()]:
            seen.take(row)
            tell(row)
        draw()
        if not running:
            return
        time.sleep(_POLL_SECONDS)


def _event_line(row: Row) -> str:
    when = number_of(row, "time")
    clock = f"{row.get('time', '')} " if when is None else datetime.fromtimestamp(when).strftime("%H:%M:%S ")
    where = f" at step {row['step']}" if "step" in row else ""
    message = f": {row['message']}" if "message" in row else ""
    rest = [_fact(key, value) for key, value in row.items() if key not in _SHOWN_ELSEWHERE]
    return "  ".join([f"{clock}{row['event']}{where}{message}".lstrip(), *rest])


def _fact(key: str, value: object) -> str:
    """`save_seconds=0.23`, `checkpoint=55.9 MiB`; whole numbers with commas."""
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')}={value / 2**20:,.1f} MiB"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{key}={value}"
    return f"{key}={value:,}" if isinstance(value, int) else f"{key}={value:.3g}"


def _shown(key: str, value: float | None, form: str, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if unit else f"{key} {value:{form}}"


def _newer(row: Row, key: str, old: float | None) -> float | None:
    new = number_of(row, key)
    return old if new is None else new


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
