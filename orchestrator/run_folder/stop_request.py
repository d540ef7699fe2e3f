"""Requests to stop: a signal, a STOP file or the job's approaching end sets a flag; the ranks agree on it at a step
boundary. Must not import torch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
JOB_END = "SLURM_JOB_END_TIME"
"""Seconds since 1970 at which Slurm ends the job."""


class StopRequest:
    """Owns the signal handlers of the process. A second signal changes nothing."""

    def __init__(self, stop_file: Path, *, deadline: float | None = None) -> None:
        """`deadline`: seconds since 1970 after which this rank requests a stop."""
        self._stop_file = stop_file
        self._deadline = deadline
        self._reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def ask(self, reason: str) -> None:
        """Stop at the next step boundary, for a reason of this process itself; the first reason counts."""
        self._reason = self._reason or reason

    def reason(self) -> str | None:
        """Why this rank requests a stop; None while it does not."""
        if self._reason is None and self._stop_file.exists():
            self._reason = "STOP file"
        if self._reason is None and self._deadline is not None and time.time() >= self._deadline:
            self._reason = "the job's time limit is near"
        return self._reason


def job_deadline(environment: Mapping[str, str], *, lead_seconds: float) -> float | None:
    """When to stop so that `lead_seconds` remain to save; None if the job's end is unknown."""
    end = environment.get(JOB_END, "")
    return float(end) - lead_seconds if end.isdigit() else None
