"""The record that a stage keeps: metrics, events, W&B, attempts."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.config.tracking import WandbTracking
from orchestrator.config.training import TrainingStage
from orchestrator.metrics.console import line
from orchestrator.metrics.jsonl import RecordFile, Row
from orchestrator.metrics.phases import TRACKING
from orchestrator.metrics.wandb import process as wandb
from orchestrator.run_state.attempts import Attempt, State, write_attempt
from orchestrator.run_state.stage_context import StageContext
from orchestrator.run_state.user_callbacks import Callbacks


class Recorder:
    """Owns the record of an attempt on rank 0; discards rows on other ranks."""

    def __init__(self, context: StageContext, *, rank: int) -> None:
        self._context = context
        self._is_main = rank == 0
        self.last_step = 0
        self.total_steps = 0
        self.rollbacks = 0
        """Number of rollbacks, written to rows because steps are replayed after one."""
        self._wandb: wandb.WandbProcess | None = None
        self._lock = threading.Lock()
        self._unwritten: list[tuple[RecordFile, dict[str, Any]]] = []
        self._callbacks: Callbacks | None = None
        if not self._is_main:
            return
        if isinstance(context.stage, TrainingStage) and context.stage.callbacks:
            self._callbacks = Callbacks(context.stage.callbacks, ask_to_stop=context.stop.ask, warn=warn)
        context.folder.root.mkdir(parents=True, exist_ok=True)
        self._metrics = RecordFile(context.folder.metrics)
        self._events = RecordFile(context.folder.events)
        settings = _wandb_settings(context)
        self._wandb = wandb.start(settings) if settings is not None else None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the record."""
        return self._is_main

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl and print it."""
        self.last_step = int(row["step"])
        if self._is_main:
            full: Row = {"step": row["step"], "attempt": self._context.attempt, "time": time.time(), **row}
            if self.rollbacks:
                full["rollbacks"] = self.rollbacks
            self._append(self._metrics, full)
            self._context.phases.spoken()
            _print(line(full, self.total_steps))
            if self._callbacks is not None:
                self._callbacks.call("step" if "loss" in row else "evaluation", full)

    def event(self, event: str, **facts: Any) -> None:
        """Append to events.jsonl: start, train, save, stop, resume, skip, fault, trained, finish."""
        if self._is_main:
            full = {"event": event, "attempt": self._context.attempt, "time": time.time(), **facts}
            self._append(self._events, full)
            if self._callbacks is not None:
                self._callbacks.call(event, full)

    def _append(self, file: RecordFile, row: dict[str, Any]) -> None:
        """Keep rows that a full disk refuses, and write them before the next one: the record never stops training."""
        with self._lock:  # checkpoints report their end from a separate thread
            # First in memory, so that rows stay in order when the disk is full for a while.
            self._unwritten.append((file, row))
            try:
                while self._unwritten:
                    target, oldest = self._unwritten[0]
                    target.append(oldest)
                    del self._unwritten[0]
            except OSError as error:
                if len(self._unwritten) == 1:
                    warn(f"the record cannot be written ({error.strerror}); its rows are kept in memory")

    def skipped_update(self, step: int, why: str, rows: list[int]) -> None:
        """Record that a step left the weights unchanged."""
        self.event("skip", step=step, why=why, rows=rows)
        self.log(f"warning: step {step} updated nothing: {why}; rows {rows}")

    def log(self, sentence: str) -> None:
        """Print to the log."""
        if self._is_main:
            self._context.phases.spoken()
            _print(sentence)

    def finish(self, summary: Mapping[str, Any], *, outcome: wandb.Outcome) -> str | None:
        """End W&B in bounded time; return the sentence that says how to see its run."""
        if self._wandb is None:
            return None
        tracking = self._context.config.tracking
        assert isinstance(tracking, WandbTracking)
        timeout = tracking.finish_timeout_seconds
        with self._context.phases.during(TRACKING):
            wandb_state = wandb.finish(self._wandb, summary, outcome=outcome, timeout_seconds=timeout)
        self._wandb = None
        return wandb_state

    def close_attempt(self, state: State, why: str, *, exit_code: int) -> None:
        """Write attempts/K.json."""
        if self._is_main:
            attempt = Attempt(
                number=self._context.attempt,
                state=state,
                why=why,
                host=socket.gethostname(),
                rank=0,
                exit_code=exit_code,
                step=self.last_step,
            )
            write_attempt(self._context.folder, attempt)


def _wandb_settings(context: StageContext) -> wandb.WandbSettings | None:
    tracking = context.config.tracking
    if not isinstance(tracking, WandbTracking):
        return None
    return wandb.WandbSettings(
        project=tracking.project,
        entity=tracking.entity,
        mode=tracking.mode,
        name=f"{context.config.name}-{context.name}",
        group=context.config.name,
        job_type=context.name,
        config=context.config.model_dump(mode="json"),
        metrics_file=str(context.folder.metrics),
        samples_file=str(context.folder.generated),
        profile_folder=str(context.folder.profile),
        directory=str(context.folder.wandb),
        init_timeout_seconds=tracking.init_timeout_seconds,
        finish_timeout_seconds=tracking.finish_timeout_seconds,
    )


def _print(text: str) -> None:
    """Print to the log; a log on a full disk never stops training."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)
