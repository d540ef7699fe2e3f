"""The one line in which a command in the foreground shows what it is doing; must not import torch."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Generator
from typing import TextIO

from orchestrator.metrics.phases import Phase, Phases, is_due

SHOWN_AFTER_SECONDS = 1.5
"""Shorter work says nothing: a line that comes and goes at once only unsettles."""
MARK = "... "
"""Begins every plain line, so that readers of stderr can tell them from faults."""
_CLEAR = "\r\x1b[2K"
_BAR_CHARACTERS = 20


class Screen:
    """Owns one line of a stream: rewritten in place on a terminal, a few plain lines elsewhere.

    It is written to stderr, so that what a command answers stays clean in a pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._is_drawn = False
        self._said: tuple[str, float] | None = None

    def draw(self, phase: Phase, now: float) -> None:
        """Show a phase that has been going on for a while."""
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
        """Take the line away, before anything else is printed."""
        if self._is_drawn:
            self._write(_CLEAR)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a reader that went away is no reason to stop the work
            self._stream.write(text)
            self._stream.flush()


@contextlib.contextmanager
def busy(name: str, *, unit: str = "") -> Generator[Phases]:
    """Show on stderr, for as long as the block runs, that this is being done."""
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
