"""Progress of a stage, from the readable parts of its record. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.metrics.console import Progressed
from orchestrator.metrics.jsonl import Row, attempt_of, last_attempt_rows, number_of, readable_rows, step_of
from orchestrator.metrics.speed import run_speed
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.attempts import Attempt, readable_attempts


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """The newest attempt's progress."""

    step: int
    steps: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    """Of a finished stage its speed, as in its result; of a running one the newest row's."""
    eta_seconds: float | None
    attempts: tuple[Attempt, ...]
    """Attempts whose end is on record."""
    newest: Mapping[str, object]
    """The newest value of every column of metrics.jsonl."""
    damaged: tuple[str, ...]
    """Unreadable parts of the record, a sentence each."""


def stage_progress(files: StageFolder) -> StageProgress:
    """Read the record; skip and name damaged parts, because the rest is still valid."""
    rows, bad_rows = readable_rows(files.metrics)
    events, bad_events = readable_rows(files.events)
    attempts, bad_attempts = readable_attempts(files)
    newest = _newest_attempt(files, rows)
    counted = last_attempt_rows(rows)
    if not files.result.exists():
        reached = _reached(files, newest, rows, events)
        counted = [row for row in counted if step_of(row) <= reached]
    seen = _progressed(counted)
    # Speeds are per attempt: an earlier one may have run on another machine.
    own = _progressed([row for row in counted if attempt_of(row) >= newest])
    own.step = seen.step
    steps = _total_steps(events)
    return StageProgress(
        step=seen.step,
        steps=steps,
        loss=seen.loss,
        eval_loss=seen.eval_loss,
        tokens_per_second=run_speed(counted) if files.result.exists() else own.tokens_per_second,
        eta_seconds=None if steps is None else own.eta_seconds(steps),
        attempts=tuple(attempts),
        newest={key: value for row in counted for key, value in row.items()},
        damaged=(*bad_rows, *bad_events, *bad_attempts),
    )


def _newest_attempt(files: StageFolder, rows: Sequence[Row]) -> int:
    """The newest attempt that began, even without a row yet; of a finished stage, the last that trained."""
    trained = max((attempt_of(row) for row in rows), default=0)
    return trained if files.result.exists() else max([trained, *files.open_attempts()])


def _reached(files: StageFolder, attempt: int, rows: Sequence[Row], events: Sequence[Row]) -> int:
    """The step of the newest attempt: its last row's; before its first row, the one that it resumes from.

    Rows of earlier attempts beyond it belong to lost steps that will be repeated.
    """
    own = [row for row in rows if attempt_of(row) == attempt and "step" in row]
    trained = [row for row in own if "loss" in row]
    if trained:
        return step_of(trained[-1])
    resumed = [row for row in events if row.get("event") == "resume" and attempt_of(row) == attempt and "step" in row]
    if resumed:
        return step_of(resumed[-1])
    if own:  # evaluations only: it started from scratch
        return step_of(own[-1])
    return max(saved_steps(files), default=0)  # it has not inspected its checkpoints yet


def _progressed(rows: Sequence[Row]) -> Progressed:
    seen = Progressed()
    for row in rows:
        seen.take(row)
    return seen


def _total_steps(events: Sequence[Row]) -> int | None:
    steps = [number for row in events if (number := number_of(row, "steps")) is not None]
    return int(steps[-1]) if steps else None
