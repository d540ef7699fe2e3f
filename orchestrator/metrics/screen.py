"""The live status line of a foreground command. Must not import torch."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Generator
from typing import TextIO

from orchestrator.metrics.phases import Phase, Phases, is_due

SHOWN_AFTER_SECONDS = 1.5
"""Shorter work shows nothing: a line that flashes up is only distracting."""
MARK = "... "
"""Prefix of every plain line, so that readers of stderr can distinguish them from errors."""
_CLEAR = "\r\x1b[2K"
_BAR_CHARACTERS = 20


class Screen:
    """Owns one line of a stream: rewritten in place on a terminal, a few plain lines elsewhere.

    It is written to stderr, so that a command's output stays clean in a pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._is_drawn = False
        self._said: tuple[str, float] | None = None

    def draw(self, phase: Phase, now: float) -> None:
        """Show a phase that has lasted for a while."""
        age = now - phase.began
        if age < SHOWN_AFTER_SECONDS:
            return
        if self._is_terminal:
            text = f"{phase.sentence(now)} {_bar(phase)}".rstrip()
            self._write(_CLEAR + text[: shutil.get_terminal_size().columns - 1])
            self._is_drawn = True
        elif self._said is None or self._said[0] != phase.name or is_due(now - self._said[1], age):
            self._write(f"{MARK}{phase.sentence(now)}\n")
            self._said = (phase.name, now)

    def clear(self) -> None:
        """Clear the line, before anything else is printed."""
        if self._is_drawn:
            self._write(_CLEAR)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed reader is no reason to stop the work
            self._stream.write(text)
            self._stream.flush()


@contextlib.contextmanager
def busy(name: str, *, unit: str = "") -> Generator[Phases]:
    """Show this activity on stderr while the block runs."""
    phases = Phases(screen=Screen(sys.stderr))
    try:
        with phases.during(name, unit=unit):
            yield phases
    finally:
        phases.close()


def _bar(phase: Phase) -> str:
    if not phase.total:
        return ""
    full = round(_BAR_CHARACTERS * min(1.0, (phase.done or 0) / phase.total))
    return f"[{'=' * full}{' ' * (_BAR_CHARACTERS - full)}]"
