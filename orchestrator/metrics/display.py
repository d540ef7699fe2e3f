"""A running stage on a screen: a live line on a terminal, plain lines elsewhere; from the run's files alone; no torch.

The display belongs to the user's own process. It only reads what the job writes, so it can neither slow nor stop the
job, and it works equally for a job on another machine with a shared disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestrator.metrics.console import Progressed, duration, line, shown
from orchestrator.metrics.jsonl import Row, Tail
from orchestrator.metrics.phases import (
    FIRST_EVALUATION,
    FIRST_STEP,
    IMPORTING,
    LAST_EVALUATION,
    LOADING,
    PROOF,
    STARTING,
    STEPS,
    TRAINING,
    Phase,
    Report,
    is_due,
    read_report,
)

_POLL_SECONDS = 0.25
_WIDE = 110
"""Terminal width from which the bar is long; below it, the numbers need the space."""


@dataclass(frozen=True, kw_only=True)
class StageView:
    """What to follow of one stage. Rows before the offsets only move the bar and are not shown again."""

    stage: str
    metrics_file: Path
    events_file: Path
    phases_file: Path
    total_steps: int
    metrics_offset: int
    events_offset: int
    since: float
    """Phases of processes that began before this belong to a finished attempt; 0 if a running one is joined."""
    began: float
    """Start time of the command, from which its clock counts."""


def view_of_stage(
    stage: str,
    *,
    metrics_file: Path,
    events_file: Path,
    phases_file: Path,
    total_steps: int,
    since: float,
    began: float | None = None,
) -> StageView:
    """The view of a stage that is about to start (again): call it before the launch."""
    return StageView(
        stage=stage,
        metrics_file=metrics_file,
        events_file=events_file,
        phases_file=phases_file,
        total_steps=total_steps,
        metrics_offset=_size(metrics_file),
        events_offset=_size(events_file),
        since=since,
        began=time.time() if began is None else began,
    )


def show_progress(view: StageView, is_running: Callable[[], bool], *, console: Console | None = None) -> None:
    """Show a stage until `is_running()` is false: a live bar on a terminal, plain lines elsewhere."""
    console = console or Console()
    seen = Progressed(total_steps=view.total_steps)
    if console.is_terminal:
        _show_live(view, is_running, console, seen)
        return
    lines = PhaseLines(view)

    def draw() -> None:
        for sentence in lines.new(time.time()):
            _print(console, sentence)

    def say(row: Row) -> None:
        draw()  # a phase is announced before its results
        lines.spoken()
        _print(console, line(row, seen.total_steps))

    _follow(view, is_running, say, seen=seen, draw=draw)


class PhaseLines:
    """The phases of a stage as plain lines: each when it begins, and again if it is long and nothing else is
    printed.
    """

    def __init__(self, view: StageView) -> None:
        self._view = view
        self._attempt: int | None = None
        self._named: set[str] = set()
        self._spoke = time.time()

    def spoken(self) -> None:
        """Something else was printed."""
        self._spoke = time.time()

    def new(self, now: float) -> list[str]:
        """The lines that are due."""
        report = current_report(self._view)
        attempt = None if report is None else report.attempt
        if attempt != self._attempt:  # the launcher has started another attempt of the same stage
            self._attempt, self._named = attempt, set()
        names = [STARTING] if report is None else list(report.seconds)
        lines = [f"{self._view.stage}: {name}" for name in names if name not in self._named]
        self._named.update(names)
        phase = phase_at_work(self._view, report)
        if not lines and phase is not None and is_due(now - self._spoke, now - phase.began):
            lines = [f"{self._view.stage}: {phase.sentence(now)}"]
        if lines:
            self._spoke = now
        return lines


def current_report(view: StageView) -> Report | None:
    """The phases file of the followed attempt; None before it exists."""
    report = read_report(view.phases_file)
    return None if report is None or report.began < view.since else report


def phase_at_work(view: StageView, report: Report | None) -> Phase | None:
    """The current phase; None between phases. Before a rank has written anything, its processes are starting."""
    return Phase(name=STARTING, began=view.since or view.began) if report is None else report.now


def left_seconds(seen: Progressed, report: Report | None, now: float) -> float | None:
    """Estimate of the remaining time, including evaluation and proof; None if the speed is unknown.

    The last evaluation should take as long as the first one, and the proof imports and loads once more.
    """
    if report is None:
        return None
    known, phase = report.seconds, report.now
    if not seen.step_seconds:
        if phase is None or not phase.total or not phase.done:
            return None
        return (now - phase.began) / phase.done * (phase.total - phase.done)
    left = seen.eta_seconds() or 0.0
    if LAST_EVALUATION not in known:
        left += known.get(FIRST_EVALUATION, 0.0)
    elif phase is not None and phase.name == LAST_EVALUATION:
        left += max(0.0, known.get(FIRST_EVALUATION, 0.0) - (now - phase.began))
    proof = known.get(IMPORTING, 0.0) + known.get(LOADING, 0.0)
    if phase is not None and phase.name == PROOF:
        proof = max(0.0, proof - (now - phase.began))
    return left + proof


def _show_live(view: StageView, is_running: Callable[[], bool], console: Console, seen: Progressed) -> None:
    columns = [
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24 if console.width >= _WIDE else 10),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[clock]}", style="cyan", markup=False),
    ]
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task(view.stage, total=None, count="", numbers="", clock="")
        is_over = False

        def draw() -> None:
            _draw(progress, task, view, seen, is_over=is_over)

        def say(row: Row) -> None:
            if "event" in row or "eval_loss" in row:
                _print(progress.console, line(row, seen.total_steps))

        draw()
        _follow(view, is_running, say, seen=seen, draw=draw)
        is_over = True  # the screen keeps the stage's progress, not the phase that happened to be last
        draw()


def _draw(progress: Progress, task: TaskID, view: StageView, seen: Progressed, *, is_over: bool) -> None:
    now, report = time.time(), current_report(view)
    phase = None if is_over else phase_at_work(view, report)
    counts_steps = phase is None or phase.name in (TRAINING, FIRST_STEP) or (phase.unit == STEPS)
    if counts_steps:
        done, total, unit = max(seen.step, (phase.done if phase else None) or 0), seen.total_steps or None, STEPS
    else:
        assert phase is not None
        done, total, unit = phase.done or 0, phase.total, phase.unit
    left = None if is_over else left_seconds(seen, report, now)
    clock = duration(now - view.began)
    # An expired estimate is omitted: "ETA 00:00" during ongoing work would be wrong.
    clock += f"  ETA {duration(left)}" if left is not None and left >= 1 else ""
    progress.update(
        task,
        description=view.stage if phase is None else f"{view.stage}: {phase.name}",
        total=total if total or not is_over else 1,
        completed=done if total or not is_over else 1,
        count=f"{done:,}/{total:,} {unit}" if total else "" if phase is None else f"{now - phase.began:.0f} s",
        numbers=_numbers(seen, progress.console.width) if counts_steps else "",
        clock=clock,
        refresh=True,
    )


def _numbers(seen: Progressed, width: int) -> str:
    """The newest numbers, the most informative first; as many as a narrow terminal has room for."""
    numbers = [
        shown("loss", seen.loss, ".4f", ""),
        shown("tokens_per_second", seen.tokens_per_second, ",.0f", " tokens/s"),
        shown("eval_loss", seen.eval_loss, ".4f", ""),
        shown("lr", seen.lr, ".2e", ""),
    ]
    given = [number for number in numbers if number]
    return "  ".join(given if width >= _WIDE else given[:1])


def _follow(
    view: StageView,
    is_running: Callable[[], bool],
    say: Callable[[Row], None],
    *,
    seen: Progressed,
    draw: Callable[[], None],
) -> None:
    """Read all files until the job has ended and its rows are read."""
    metrics, events = Tail(view.metrics_file), Tail(view.events_file)
    for row in [*events.poll(until=view.events_offset), *metrics.poll(until=view.metrics_offset)]:
        seen.take(row)
    while True:
        running = is_running()
        for row in [*events.poll(), *metrics.poll()]:
            seen.take(row)
            say(row)
        draw()
        if not running:
            return
        time.sleep(_POLL_SECONDS)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
