"""The current phase of a process and its progress, for waiting users. Must not import torch.

A rank keeps a small file up to date, which any display on any machine can follow, and writes lines into its log. A
command that works in the foreground shows one live line on a terminal, or a few plain lines elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

STARTING = "starting the processes"
PREPARING = "preparing data"
IMPORTING = "importing the libraries"
LOADING = "loading the model"
LOOKING = "checking configuration, base and data"
ANSWERING = "answering"
FETCHING = "fetching the base"
CHECKING = "checking the rows"
GRADIENTS = "trying one backward pass"
AUDITING = "comparing the ledgers with the rows"
READING = "reading every row"
FIRST_EVALUATION = "first evaluation"
FIRST_STEP = "first step"
TRAINING = "training"
TRIAL = "checkpoint trial"
SAVING = "saving a checkpoint"
EVALUATION = "evaluation"
METRICS = "answering held-out rows for metrics"
ROLLOUTS = "rollouts"
SCORING = "scoring"
MERGING = "merging"
LAST_EVALUATION = "last evaluation"
WRITING = "writing the artifact"
PROOF = "proof"
TRACKING = "closing W&B"

ROWS = "rows"
STEPS = "steps"
COMPLETIONS = "completions"
BLENDS = "blends"

FIRST_BEAT_SECONDS = 5.0
LONGEST_SILENCE_SECONDS = 60.0
_TICK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A piece of work that takes time."""

    name: str
    began: float
    done: int | None = None
    total: int | None = None
    unit: str = ""
    """Unit of `done` and `total`; empty if only a clock can be shown."""

    def sentence(self, now: float) -> str:
        """`first evaluation, 32 of 58 rows, 12 s`."""
        count = f", {self.done or 0:,} of {self.total:,} {self.unit}" if self.total else ""
        if self.done and not self.total:
            count = f", {self.done:,} {self.unit}"
        return f"{self.name}{count}, {max(0.0, now - self.began):.0f} s"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of the file: the phase at work, and the seconds of those that have ended."""

    attempt: int
    began: float
    now: Phase | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by name, in the order in which the phases first began; a nested phase's time counts only for itself."""


def read_report(path: Path) -> Report | None:
    """The content of the file; None if no process has written one yet."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        now = None if raw["now"] is None else Phase(**raw["now"])
        return Report(attempt=raw["attempt"], began=raw["began"], now=now, seconds=raw["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a display shows what it can; it is not the record of the run


def is_due(silent_seconds: float, phase_seconds: float) -> bool:
    """Whether to repeat a phase in a plain log: after 5, 10, 20, 40 seconds, then once a minute."""
    # A share of the phase's own age doubles the pauses, so a phase of an hour costs a log some 65 lines.
    return silent_seconds >= min(LONGEST_SILENCE_SECONDS, max(FIRST_BEAT_SECONDS, phase_seconds / 2))


class Drawn(Protocol):
    """Where a phase is shown while it lasts."""

    def draw(self, phase: Phase, now: float) -> None: ...
    def clear(self) -> None: ...


class Phases:
    """Owns the phases of one process. On ranks other than the first it writes and prints nothing.

    A thread writes and prints: loops over rows only set a number, and a phase that never calls back still has its
    clock.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        attempt: int = 0,
        began: float | None = None,
        known: Report | None = None,
        say: Callable[[str], None] | None = None,
        screen: Drawn | None = None,
    ) -> None:
        """`known`: what an earlier process of the same attempt left; its last phase goes on."""
        self._file, self._say, self._screen = file, say, screen
        self._report = known or Report(attempt=attempt, began=time.time() if began is None else began)
        self._outer: list[Phase] = []
        self._since = self._report.began if self._report.now is None else self._report.now.began
        self._spoke = time.time()
        self._is_dirty = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if known is not None:
            self._start()

    @property
    def began(self) -> float:
        """When the process began."""
        return self._report.began

    def begin(self, name: str, *, total: int | None = None, unit: str = "") -> None:
        """End the current phase and all enclosing ones, and begin another."""
        with self._lock:
            self._close()
            self._outer.clear()
            self._open(Phase(name=name, began=time.time(), total=total, unit=unit))

    @contextlib.contextmanager
    def during(self, name: str, *, total: int | None = None, unit: str = "") -> Generator[None]:
        """A phase nested in the current one, which continues afterwards; its seconds are not counted twice."""
        with self._lock:
            outer = self._report.now
            self._close()
            if outer is not None:
                self._outer.append(outer)
            self._open(Phase(name=name, began=time.time(), total=total, unit=unit))
        try:
            yield
        finally:
            with self._lock:
                self._close()
                if self._outer:
                    self._now(self._outer.pop())
                self._write()

    def is_at(self, name: str) -> bool:
        """Whether this is the current phase."""
        return self._report.now is not None and self._report.now.name == name

    def advance(self, done: int, total: int | None = None, *, unit: str = ROWS) -> None:
        """Set the current phase's progress. Cheap; no effect if that phase counts something else."""
        with self._lock:
            now = self._report.now
            if now is None or now.unit != unit:
                return
            self._report = replace(
                self._report, now=replace(now, done=done, total=now.total if total is None else total)
            )
            self._is_dirty = True

    def end(self) -> dict[str, float]:
        """End the current phase; return the seconds of all phases."""
        with self._lock:
            self._close()
            self._outer.clear()
            self._write()
        return self.seconds()

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase, including the current one."""
        now, known = self._report.now, dict(self._report.seconds)
        if now is not None:
            known[now.name] = known.get(now.name, 0.0) + time.time() - self._since
        return {name: round(value, 2) for name, value in known.items()}

    def above(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """The same output, clearing the live line first."""

        def said(sentence: str) -> None:
            with self._lock:
                if self._screen is not None:
                    self._screen.clear()
                say(sentence)

        return said

    def spoken(self) -> None:
        """Note that the log has just printed something else, which delays the next sign of life."""
        self._spoke = time.time()

    def close(self) -> None:
        """Stop the thread; the file stays."""
        self.end()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _open(self, phase: Phase) -> None:
        is_new = phase.name not in self._report.seconds
        self._now(phase)
        self._report.seconds.setdefault(phase.name, 0.0)
        self._write()
        if self._say is not None and is_new:  # rollouts and saves recur; their own rows report them
            self._say(phase.name)
        self.spoken()
        self._start()

    def _now(self, phase: Phase | None) -> None:
        self._report = replace(self._report, now=phase)
        self._since = time.time()

    def _close(self) -> None:
        now, seconds = self._report.now, self._report.seconds
        if self._screen is not None:
            self._screen.clear()
        if now is not None:
            seconds[now.name] = seconds.get(now.name, 0.0) + time.time() - self._since
            self._now(None)

    def _start(self) -> None:
        voices = (self._file, self._say, self._screen)
        if self._thread is None and any(voice is not None for voice in voices):
            self._thread = threading.Thread(target=self._tick, name="phases", daemon=True)
            self._thread.start()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            with self._lock:
                if self._screen is not None and self._report.now is not None:
                    self._screen.draw(self._report.now, time.time())
                if self._is_dirty:
                    self._write()
                now, time_now = self._report.now, time.time()
                if self._say is None or now is None or not is_due(time_now - self._spoke, time_now - now.began):
                    continue
            self._say(now.sentence(time_now))
            self.spoken()

    def _write(self) -> None:
        """Replace the file, without fsync and ignoring failures: a display must not slow or stop a job."""
        self._is_dirty = False
        if self._file is None:
            return
        temporary = self._file.with_name(f".{self._file.name}.tmp")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._report)), encoding="utf-8")
            temporary.replace(self._file)
