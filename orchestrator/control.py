"""Follows, reads and ends a run from its folder: status --watch, logs -f, cancel. Must not import torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from orchestrator.errors import EXIT_DONE, ConfigError, LaunchFailed
from orchestrator.rundir import RunFolder, StageFolder, write_text
from orchestrator.status import StageStatus, find_runs, pipeline_of, stage_statuses, table_of
from orchestrator.submission import live_job
from slurm.client import ask_to_stop
from slurm.client import cancel as cancel_jobs

WATCH_SECONDS = 2.0
LOG_LINES = 40
GENTLE_SECONDS = 60.0
ENDED = ("finished", "stopped", "failed", "lost")


def show_status(folder: Path, *, watch: bool) -> int:
    """The table of a run or of every run in a folder; with `watch` a live one, until all have ended."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"{folder} holds no run: neither run.json nor NAME/run.json is there")
    console = Console()
    statuses = stage_statuses(runs)
    if not watch:
        console.print(table_of(statuses))
        return EXIT_DONE
    with Live(table_of(statuses), console=console, auto_refresh=False) as live:
        while not all(status.state in ENDED for status in statuses):
            time.sleep(WATCH_SECONDS)
            statuses = stage_statuses(runs)
            live.update(table_of(statuses), refresh=True)
    return EXIT_DONE


def show_logs(run: RunFolder, *, stage: str | None, node: int | None, follow: bool) -> int:
    """The end of the newest log of each stage (of `node`, 0 by default); with `follow` what is added, until it ends."""
    files = [file for name in _stages(run, stage) if (file := _newest_log(run.stage(name), node or 0)) is not None]
    if not files:
        raise ConfigError(f"{run.root}: no log of {stage or 'any stage'} on node {node or 0} yet")
    for file in files:
        print(f"==> {file}")
        print("\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]), flush=True)
    if follow:
        _follow(run, files[-1])
    return EXIT_DONE


def cancel(run: RunFolder) -> int:
    """Asks every unfinished stage to save and end; after a minute Slurm ends what is left, and that is checked."""
    unfinished = [run.stage(name) for name in pipeline_of(run) if not run.stage(name).result.exists()]
    jobs = [job for files in unfinished if (job := live_job(files)) is not None]
    for files in unfinished:
        if files.root.is_dir():
            write_text(files.stop, "cancel\n")
            print(f"{files.root.name}: asked to save and end at its next step")
    if not jobs:
        return EXIT_DONE
    cancel_jobs(_waiting_jobs(run))
    ask_to_stop(jobs)
    if not _all_ended(run, GENTLE_SECONDS):
        print("it goes on after a minute: ending it at once")
        cancel_jobs(jobs)
    if not _all_ended(run, GENTLE_SECONDS):
        raise LaunchFailed(f"Slurm still has {', '.join(jobs)}; see squeue")
    print(f"ended: {', '.join(jobs)}")
    return EXIT_DONE


def _stages(run: RunFolder, stage: str | None) -> Sequence[str]:
    pipeline = pipeline_of(run)
    if stage is not None and stage not in pipeline:
        raise ConfigError(f"--stage {stage}: the run has {', '.join(pipeline)}")
    return pipeline if stage is None else (stage,)


def _newest_log(files: StageFolder, node: int) -> Path | None:
    logs = sorted(files.logs.glob(f"node-{node}.attempt-*.log"), key=lambda file: int(file.stem.rsplit("-", 1)[1]))
    return logs[-1] if logs else None


def _follow(run: RunFolder, file: Path) -> None:
    with open(file, encoding="utf-8", errors="replace") as log:
        log.seek(0, 2)
        while True:
            text = log.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not text and all(status.state in ENDED for status in stage_statuses([run])):
                return
            time.sleep(0.0 if text else WATCH_SECONDS)


def _waiting_jobs(run: RunFolder) -> list[str]:
    """Jobs that have not begun: nothing of theirs has to be saved."""
    return [status.job for status in stage_statuses([run]) if status.job is not None and status.state == "waiting"]


def _all_ended(run: RunFolder, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_has_live_job(status) for status in stage_statuses([run])):
            return True
        time.sleep(WATCH_SECONDS)
    return False


def _has_live_job(status: StageStatus) -> bool:
    return status.job is not None and status.state in ("waiting", "running", "unknown")
