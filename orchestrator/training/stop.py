"""Requests to stop: a signal or a STOP file sets a flag; the ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Owns the signal handlers of the process. A second signal changes nothing."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def reason(self) -> str | None:
        """Why this rank wants to stop; None while it does not."""
        if self._reason is None and self._stop_file.exists():
            self._reason = "STOP file"
        return self._reason
