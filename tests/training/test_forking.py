"""A program of the tests that runs as a fork is the program itself: what it sees, how it ends, what it computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forking
import pytest
from bench import make_bench
from launching import wait_until

from orchestrator.files.manifest import file_digest
from orchestrator.metrics.jsonl import last_attempt_rows, read_rows

PROBE = Path(forking.__file__).with_name("probe.py")
MEASURED = ("seconds", "per_second", "memory", "mfu", "time")
"""Parts of the names of columns that no two runs share."""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """One of its own: that of the session may serve as many kinds of process already as it can."""
    shared = os.environ.get(forking.ADDRESS)
    if shared is None:
        pytest.skip("--no-forks")
    stop = forking.start()
    yield
    stop()
    os.environ[forking.ADDRESS] = shared


def start(*words: str, forked: bool, **options: Any) -> subprocess.Popen[str]:
    """The same variables for both; a fork server that is not there is none."""
    here = forking.environment() | ({} if forked else forking.FRESH) | options.pop("more", {})
    argv = [sys.executable, str(PROBE), *words]
    return subprocess.Popen(argv, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_it_sees_what_a_fresh_interpreter_sees(unbuffered: str, tmp_path: Path) -> None:
    def surroundings() -> None:
        os.umask(0o027)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    reader, writer = os.pipe()
    seen: list[dict[str, Any]] = []
    for forked in (True, False):
        running = start(
            *("facts", "a b", "ü"),
            forked=forked,
            stdin=subprocess.PIPE,
            cwd=tmp_path,
            preexec_fn=surroundings,
            pass_fds=[writer],
            more={"PYTHONUNBUFFERED": unbuffered},
        )
        out, error = running.communicate("from stdin", timeout=120)
        assert running.returncode == 0, error
        seen.append(json.loads(out))
    os.close(reader)
    os.close(writer)
    for one in seen:
        del one["environment"][forking.ADDRESS]
    assert seen[0] == seen[1]
    assert seen[0]["read"] == "from stdin" and signal.SIGTERM in seen[0]["ignored"] and writer in seen[0]["inherited"]


@pytest.mark.parametrize("way", ["0", "7", "a sentence", "raise", "interrupt", "signal9", "signal15", "signal11"])
def test_it_ends_as_a_fresh_interpreter_ends(way: str) -> None:
    ends: list[tuple[int, str]] = []
    for forked in (True, False):
        running = start(way, forked=forked, stdin=subprocess.DEVNULL)
        _, error = running.communicate(timeout=120)
        ends.append((running.returncode, error.splitlines()[-1] if error else ""))
    assert ends[0] == ends[1]


def test_signals_reach_it_and_nothing_outlives_its_caller(tmp_path: Path) -> None:
    note = tmp_path / "process"
    running = start("wait", str(note), forked=True, stdin=subprocess.DEVNULL)
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"), seconds=60, what="its start")
    fork = int(note.read_text())
    assert fork != running.pid, "it is no fork"
    running.send_signal(signal.SIGUSR1)
    assert running.stdout is not None and running.stdout.readline() == "USR1\n"
    running.kill()
    wait_until(lambda: not Path(f"/proc/{fork}").exists(), seconds=20, what="the end of the fork")
    running.communicate(timeout=20)


def test_another_kind_of_process_runs_by_itself(tmp_path: Path) -> None:
    """Limits of its own are a reason; the program is then its caller."""
    import resource

    note = tmp_path / "process"
    running = start(
        *("wait", str(note)),
        forked=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"), seconds=60, what="its start")
    assert int(note.read_text()) == running.pid
    running.kill()
    running.communicate(timeout=20)


def test_a_run_has_the_same_bits(tmp_path: Path) -> None:
    """Every number of every step, and the artifact: as users run it, and as the tests do."""
    bench = make_bench(tmp_path)
    done = {
        "fork": bench.run("fork", "stages.sft.max_steps=3"),
        "fresh": bench.run("fresh", "stages.sft.max_steps=3", environment=forking.FRESH),
    }
    rows = {
        name: [
            {key: value for key, value in row.items() if not any(part in key for part in MEASURED)}
            for row in last_attempt_rows(read_rows(run.sft.metrics))
        ]
        for name, run in done.items()
        if run.result()
    }
    assert rows["fork"] and rows["fork"] == rows["fresh"]
    weights = {file_digest(run.sft.artifact / "adapter_model.safetensors") for run in done.values()}
    assert len(weights) == 1
