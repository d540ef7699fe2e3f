"""Ten SIGKILLs between the last step and result.json, on two ranks and in one run: it ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import Bench

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import RunFolder, StageFolder

SETTINGS = (
    "tuning=full",
    "sharding=zero3",
    "launcher=torchrun",
    "cluster.processes_per_node=2",
    "stages.sft.max_steps=2",
    "stages.sft.checkpoint.every_steps=1",
)
NAME = "killed_at_end"
RANK_PROCESSES = 5
"""torchrun, and a guard with its child for each rank."""
INTO_THE_PROOF = (0.0, 0.03, 0.06, 0.1)
"""Seconds from the beginning of a proof to the kill."""


def test_killed_ten_times_it_trains_once_and_proves_again(bench: Bench) -> None:
    straight = bench.run("untouched", *SETTINGS)
    wanted = straight.result()
    run = RunFolder(bench.runs / NAME)
    files = run.stage("sft")
    states: list[str] = []
    for moment in _moments(run):
        states.append(_killed_when(bench, run, moment, before=states))
    assert len(states) == 10 and {"no artifact", "written"} <= set(states), states
    last = bench.run(NAME, *SETTINGS)
    found = last.result()
    assert found["attempt"] == 11
    for key in ("steps", "tokens", "eval_loss_before", "eval_loss_after", "proof"):
        assert found[key] == wanted[key], key
    trained = [(row["step"], row["attempt"]) for row in read_rows(files.metrics) if "loss" in row]
    assert trained == [(1, 1), (2, 1)], "training is not repeated"
    assert len(_events(files, "prove")) >= 1 + len(INTO_THE_PROOF), "a proof that was cut off is made again"
    for path in straight.sft.artifact.glob("*.safetensors"):
        assert path.read_bytes() == (files.artifact / path.name).read_bytes()
    assert not list(files.root.glob(".*.partial")), "nothing is left half-named"


def _moments(run: RunFolder) -> list[Callable[[], bool]]:
    """Conditions, each of a later moment than the one before; an attempt that is past its moment is killed at once."""
    files = run.stage("sft")
    partial = files.artifact.with_name(f".{files.artifact.name}.partial")
    writing: list[Callable[[], bool]] = [
        lambda: True,
        partial.exists,
        lambda: any(path.stat().st_size for path in partial.glob("*.safetensors")),
        files.artifact.exists,
        files.proof.exists,
    ]
    return [
        *(_after_event(files, condition) for condition in writing),
        lambda: len(_processes_of(run.root)) >= RANK_PROCESSES,
        *(_after_event(files, lambda: True, delay=delay) for delay in INTO_THE_PROOF),
    ]


def _after_event(files: StageFolder, condition: Callable[[], bool], *, delay: float = 0.0) -> Callable[[], bool]:
    """Hold once this attempt's last step or its proof's beginning is on record, and the condition or a later one holds."""
    known: list[int] = []

    def holds() -> bool:
        known.append(len(_events(files, "trained")) + len(_events(files, "prove")))
        if known[-1] == known[0] or not (files.proof.exists() or condition()):
            return False
        time.sleep(delay)
        return True

    return holds


def _killed_when(bench: Bench, run: RunFolder, condition: Callable[[], bool], *, before: Sequence[str]) -> str:
    """Start the run, kill the command and all its processes once the condition holds; what was written by then."""
    argv = [sys.executable, "-m", "orchestrator", "run", *bench.words(NAME, *SETTINGS)]
    files = run.stage("sft")
    with subprocess.Popen(
        argv, cwd=bench.root, env=bench.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as command:
        while not _holds(condition):
            assert command.poll() is None, (before, command.stderr and command.stderr.read())
            time.sleep(0.002)
        for process in (*_processes_of(run.root), command.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert not files.result.exists(), "it was killed too late"
    if not files.proof.exists():
        return "artifact without a note" if files.artifact.exists() else "no artifact"
    return str(read_json(files.proof)["state"])


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except FileNotFoundError:  # renamed while it was looked at
        return False


def _processes_of(folder: Path) -> list[int]:
    """Ranks, then guards and launchers: processes with this run.json in their command line."""
    ranks: list[int] = []
    others: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if str(folder / "run.json").encode() in words:
                (others if b"launchers.guard" in words else ranks).append(int(process.name))
    return [*ranks, *others]


def _events(files: StageFolder, kind: str) -> list[object]:
    return [row for row in read_rows(files.events) if row["event"] == kind] if files.events.exists() else []
