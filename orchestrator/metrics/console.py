"""Formats the rows of a run as log lines. Must not import torch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median

from orchestrator.metrics.jsonl import Row, number_of, step_of

_NUM_TIMED_STEPS = 50
_KERNELS = {"attention": "attention", "head": "loss head"}
"""Events whose only fact is a sentence."""
_SHOWN_ELSEWHERE = ("event", "time", "step", "attempt", "message", "began")
"""Keys of events that are shown in another form, or are for programs: `began` is a time since 1970."""


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
    # A policy is measured by its reward; the record has minus the reward as its loss, which would not help a reader.
    left_out = ("eval_loss",) if "eval_reward" in row else ()
    numbers_shown = [shown(key, number_of(row, key), form, unit) for key, form, unit in numbers if key not in left_out]
    return "  ".join([where, *filter(None, numbers_shown)])


@dataclass
class Progressed:
    """State of the progress bar, gathered from the rows so far."""

    total_steps: int = 0
    """As planned; the stage itself knows better if rows are packed or dropped."""
    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=_NUM_TIMED_STEPS))

    def take(self, row: Row) -> None:
        """Take in one row. A replayed step moves the bar back, because that work is repeated."""
        if "loss" in row and "step" in row:
            self.step = step_of(row)
        steps = number_of(row, "steps")
        if row.get("event") == "train" and steps is not None:
            self.total_steps = int(steps)
        self.loss = _newer(row, "loss", self.loss)
        if "eval_reward" not in row:  # the loss of a policy's evaluation is minus its reward
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


def _event_line(row: Row) -> str:
    when = number_of(row, "time")
    clock = f"{row.get('time', '')} " if when is None else datetime.fromtimestamp(when).strftime("%H:%M:%S ")
    where = f" at step {row['step']}" if "step" in row else ""
    message = f": {row['message']}" if "message" in row else ""
    if row["event"] in _KERNELS:
        return f"{clock}{_KERNELS[str(row['event'])]}: {row[str(row['event'])]}"
    rest = [_fact(key, value) for key, value in row.items() if key not in _SHOWN_ELSEWHERE]
    return "  ".join([f"{clock}{row['event']}{where}{message}".lstrip(), *rest])


def _fact(key: str, value: object) -> str:
    """`save_seconds=0.23`, `checkpoint=55.9 MiB`; whole numbers with commas."""
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')}={value / 2**20:,.1f} MiB"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{key}={value}"
    return f"{key}={value:,}" if isinstance(value, int) else f"{key}={value:.3g}"


def shown(key: str, value: float | None, form: str, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if unit else f"{key} {value:{form}}"


def _newer(row: Row, key: str, old: float | None) -> float | None:
    new = number_of(row, key)
    return old if new is None else new
