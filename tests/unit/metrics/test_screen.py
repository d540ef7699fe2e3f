"""The line of a command in the foreground, as a terminal gets it, and as a pipe does."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from orchestrator.metrics.phases import LOADING, ROWS, Phase, Phases
from orchestrator.metrics.screen import MARK, Screen

WORK = """
import sys, time
from orchestrator.metrics import screen
from orchestrator.metrics.screen import busy
screen.SHOWN_AFTER_SECONDS = 0.2
with busy("loading the model", unit="rows") as phases:
    phases.advance(3, 9)
    time.sleep(1.6)
    phases.above(print)("an answer")
    time.sleep(0.8)
print("done")
"""


def test_on_a_terminal_one_line_is_rewritten_and_taken_away() -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=follower, stderr=follower) as child:
        os.close(follower)
        read = b""
        while chunk := _read(leader):
            read += chunk
    os.close(leader)
    assert child.returncode == 0
    seen = read.decode().replace("\r\n", "\n")
    assert seen.count("loading the model, 3 of 9 rows") >= 3, "a clock that stands still is a frozen bar"
    assert "\x1b[2Kan answer\n" in seen and seen.endswith("\x1b[2Kdone\n")


def test_in_a_pipe_there_are_a_few_plain_lines_on_stderr_and_none_on_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == "an answer\ndone\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{MARK}loading the model, 3 of 9 rows")


def test_short_work_says_nothing_and_long_work_is_heard_of_again() -> None:
    stream = io.StringIO()
    screen, phase = Screen(stream), Phase(name=LOADING, began=0.0)
    for second in (0.5, 1.0, 2.0, 3.0, 6.0, 8.0, 20.0):
        screen.draw(phase, second)
    screen.draw(replace(phase, name="proof", began=20.0), 22.0)
    assert stream.getvalue().splitlines() == [
        f"{MARK}{LOADING}, 2 s", f"{MARK}{LOADING}, 8 s", f"{MARK}{LOADING}, 20 s", f"{MARK}proof, 2 s",
    ]  # fmt: skip


def test_a_stream_that_was_closed_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.metrics.screen.SHOWN_AFTER_SECONDS", 0.0)
    stream = io.StringIO()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.write("")
    screen = Screen(io.StringIO())
    screen._stream = stream
    phases = Phases(screen=screen)
    phases.begin(LOADING, unit=ROWS)
    time.sleep(0.1)
    phases.close()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's answer where the other end is closed
        return b""
