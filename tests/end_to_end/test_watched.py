"""What a person sees of a run from the command to its end: on a terminal, through a pty."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
from bench import Bench

from orchestrator.files.atomic import read_json
from orchestrator.metrics.phases import FIRST_EVALUATION, IMPORTING, LAST_EVALUATION, LOADING, PREPARING, PROOF, WRITING
from orchestrator.run_folder.folder import RunFolder

PHASES = (PREPARING, IMPORTING, LOADING, FIRST_EVALUATION, LAST_EVALUATION, WRITING, PROOF)
SLEEP_SECONDS = 4
CALLBACK = f"""
import time

def slow(event, values):
    if event == "evaluation" and values["step"] == 0:
        time.sleep({SLEEP_SECONDS})
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SLOWEST_REDRAW = 8
"""A display that draws four times a second stood still where this many drawings of the whole run are missing in one piece."""


@dataclass(frozen=True)
class Watched:
    """What came out of a terminal, with the second at which it came."""

    pieces: list[tuple[float, str]]
    folder: RunFolder

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    def first(self, words: str) -> float:
        """When these words were first there."""
        seen = ""
        for second, text in self.pieces:
            seen += text
            if words in seen:
                return second
        raise AssertionError(f"{words!r} was never shown:\n{seen}")


@pytest.fixture(scope="module")
def watched(bench: Bench) -> Watched:
    """A run whose first evaluation takes long, on a terminal of 120 columns."""
    (bench.root / "callbacks.py").write_text(CALLBACK)
    source = f"stages.sft.callbacks=[{{source: {bench.root / 'callbacks.py'}:slow}}]"
    words = bench.words("watched", "stages.sft.max_steps=2", "launcher=local", source)
    leader, follower = pty.openpty()
    environment = {**bench.environment(), "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}
    argv = [sys.executable, "-m", "orchestrator", "run", *words]
    pieces: list[tuple[float, str]] = []
    began = time.monotonic()
    with subprocess.Popen(argv, cwd=bench.root, env=environment, stdout=follower, stderr=follower) as child:
        os.close(follower)
        # No end of file is waited for: a process of the tests that outlives the run may hold the terminal open.
        while True:
            is_over = child.poll() is not None  # asked first: what it wrote before its end is still read
            if select.select([leader], [], [], 0.05)[0]:
                chunk = _read(leader)
                pieces.append((time.monotonic() - began, CONTROL.sub("", chunk.decode(errors="replace"))))
                is_over = is_over and not chunk
            if is_over:
                break
    os.close(leader)
    found = Watched(pieces, RunFolder(bench.runs / "watched"))
    assert child.returncode == 0, found.text
    return found


def test_every_phase_that_lasts_is_named_in_its_order(watched: Watched) -> None:
    """A phase shorter than a second may begin and end between two drawings."""
    by_phase = read_json(watched.folder.stage("sft").result)["phase_seconds"]
    lasting = [name for name in PHASES if by_phase[name] >= 1]
    assert FIRST_EVALUATION in lasting, "it sleeps for longer"
    seconds = [watched.first(f"sft: {name}") for name in lasting]
    assert seconds == sorted(seconds), dict(zip(lasting, seconds, strict=True))


def test_the_display_never_stands_still(watched: Watched) -> None:
    """Against the run's own rhythm, so that a slow machine changes nothing."""
    start, end = watched.first("sft: starting"), watched.first("is done and proven")
    drawn = [second for second, _ in watched.pieces if start <= second <= end]
    longest = max(later - one for one, later in pairwise(drawn))
    usual = (end - start) / len(drawn)
    assert longest <= max(2.0, SLOWEST_REDRAW * usual), (longest, usual)


def test_a_long_phase_has_a_clock_that_goes_on(watched: Watched) -> None:
    start = watched.first(f"sft: {FIRST_EVALUATION}")
    during = "".join(text for second, text in watched.pieces if start <= second <= start + SLEEP_SECONDS)
    assert "9/9 rows" in during, "rows done of rows to do"
    assert len(set(re.findall(r"\b\d\d:\d\d\b", during))) >= SLEEP_SECONDS - 1, during


def test_no_time_left_of_zero_while_work_remains(watched: Watched) -> None:
    """A fast machine shows no estimate at all here; tests/unit/metrics/test_console.py holds that there is one otherwise."""
    assert "ETA 00:00" not in watched.text


def test_the_time_of_the_command_is_that_on_the_wall_and_in_the_result(watched: Watched) -> None:
    (minutes, seconds) = re.findall(r"time +(?:(\d+) min )?([\d.]+) s in all: start ", watched.text)[-1]
    told = int(minutes or 0) * 60 + float(seconds)
    wall, first_words = watched.pieces[-1][0], watched.pieces[0][0]
    assert wall - first_words - 2 <= told <= wall + 1, "from the command to its end"
    result = read_json(watched.folder.stage("sft").result)
    by_phase = result["phase_seconds"]
    assert set(PHASES) <= by_phase.keys() and by_phase[FIRST_EVALUATION] >= SLEEP_SECONDS
    assert sum(by_phase.values()) == pytest.approx(result["attempt_seconds"], rel=0.1)
    assert result["seconds"] < result["attempt_seconds"] < told + 1


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux's answer where the other end is closed
        return b""
