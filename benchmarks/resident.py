"""Resident memory of every process below a command, sampled by the phase that its run folder reports."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.metrics.phases import read_report

TICK_SECONDS, TREE_SECONDS = 0.02, 0.5
FIELDS = {"VmRSS:": "resident", "RssAnon:": "anonymous"}
LAUNCHING = ("launchers.guard", "torch.distributed.run", "torchrun")
"""In the command lines of processes that start the ranks."""
COMMAND = "the command"
STARTING = "starting"


@dataclass
class Peak:
    """The most that one process had in a phase, in bytes."""

    resident: int = 0
    anonymous: int = 0
    processes: set[int] = field(default_factory=set)
    """Process ids that were seen in it."""

    def include(self, pid: int, sample: Mapping[str, int]) -> None:
        self.resident = max(self.resident, sample["resident"])
        self.anonymous = max(self.anonymous, sample["anonymous"])
        self.processes.add(pid)

    def record(self) -> dict[str, int]:
        return {**asdict(self), "processes": len(self.processes)}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """How a watched command ended."""

    code: int
    seconds: float
    peaks: dict[str, dict[str, int]]
    """Phase -> peaks over the processes that work in it; the login-side command has a line of its own."""


def watch(
    argv: Sequence[str],
    *,
    run: Path,
    environment: Mapping[str, str],
    log: Path,
    kill_when: Callable[[], bool] | None = None,
    only_phase: str | None = None,
) -> Watched:
    """Run a command to its end, or SIGKILL all its processes once `kill_when` holds; `only_phase`: it reports none."""
    start, began = time.monotonic(), time.time()
    peaks: dict[str, Peak] = {}
    tree: dict[int, str] = {}
    looked = 0.0
    with log.open("ab") as output:
        process = subprocess.Popen(argv, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if time.monotonic() - looked > TREE_SECONDS:
                looked, tree = time.monotonic(), processes_below(process.pid)
                if kill_when is not None and kill_when():
                    _kill(processes_below(process.pid))
                    break
            _sample(tree, process.pid, only_phase or phase_of(run, began), peaks)
            time.sleep(TICK_SECONDS)
        code = process.wait()
    found = {name: peak.record() for name, peak in peaks.items()}
    return Watched(code=code, seconds=round(time.monotonic() - start, 1), peaks=found)


def resident_of(pid: int | str) -> dict[str, int] | None:
    """Bytes of a process now; None if it is gone or has no memory left."""
    try:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found = {FIELDS[line[0]]: int(line[1]) << 10 for line in lines if line and line[0] in FIELDS}
    except (OSError, ValueError):
        return None
    return found if len(found) == len(FIELDS) else None


def phase_of(run: Path, since: float) -> str:
    """The phase of the stage that wrote last; STARTING if none has, in an attempt that began after `since`."""
    files = list(run.glob("*/phases.json"))
    if not files:
        return STARTING
    try:
        report = read_report(max(files, key=lambda file: file.stat().st_mtime))
    except OSError:
        return STARTING
    # An attempt that was killed leaves the file as it was.
    return STARTING if report is None or report.now is None or report.began < since else report.now.name


def processes_below(root: int) -> dict[int, str]:
    """Process id -> command line of a process and all its descendants."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: line for pid in found if (line := _command_line(pid)) is not None}


def _command_line(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None


def _sample(tree: Mapping[int, str], root: int, phase: str, peaks: dict[str, Peak]) -> None:
    for pid, name in _of_interest(tree, root):
        sample = resident_of(pid)
        if sample is not None:
            peaks.setdefault(name or phase, Peak()).include(pid, sample)


def _of_interest(tree: Mapping[int, str], root: int) -> Iterator[tuple[int, str | None]]:
    """The command itself, by its name, and the Python processes below it that are no launchers."""
    for pid, line in tree.items():
        if pid == root:
            yield pid, COMMAND
        elif "python" in line and not any(name in line for name in LAUNCHING):
            yield pid, None


def _kill(tree: Mapping[int, str]) -> None:
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def planned_bytes(phases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Plan's phase -> bytes of a rank on device and host together, without those of a bare process."""
    return {
        phase["name"]: round(
            sum(gib for part in ("device", "host") for name, gib in phase[part].items() if name != "process")
            * (1 << 30)
        )
        for phase in phases
    }
