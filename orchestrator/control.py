"""Follows, reads and ends a run from its folder: status --watch, logs -f, cancel. Must not import torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from launchers.cancellation import cancel_jobs
from orchestrator.comparing import comparison_table, comparisons
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.jobs import job_spec
from orchestrator.rundir import PREPARATION, RunFolder, StageFolder, write_text
from orchestrator.status import find_runs, pipeline_of, stage_statuses, table_of
from orchestrator.submission import jobs_of

WATCH_SECONDS = 2.0
LOG_LINES = 40
GENTLE_SECONDS = 60.0
PIPED_WIDTH = 200
"""Characters of a line that goes to a file or another program."""
ENDED = ("finished", "stopped", "failed", "lost")


def show_status(folder: Path, *, watch: bool) -> int:
    """The table of a run or of every run in a folder; with `watch` a live one, until all have ended."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"{folder} holds no run: neither run.json nor NAME/run.json is there")
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    statuses = stage_statuses(runs)
    if not watch:
        console.print(table_of(statuses))
        found = comparisons(runs)
        if found:
            console.print("")
            console.print(comparison_table(found))
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


def cancel(run: RunFolder, config: RunConfig) -> int:
    """Asks every unfinished stage to save and end; after a minute Slurm ends what is left, and that is checked."""
    unfinished = [name for name in config.pipeline if not run.stage(name).result.exists()]
    for name in unfinished:
        if run.stage(name).root.is_dir():
            write_text(run.stage(name).stop, "cancel\n")
            print(f"{name}: asked to save and end at its next step")
    jobs = [job for name in (PREPARATION, *unfinished) for job in jobs_of(run.stage(name))]
    if jobs:
        specs = [job_spec(config, name) for name in unfinished]
        for job, facts in cancel_jobs(specs, also=jobs, gentle_seconds=GENTLE_SECONDS).items():
            print(f"job {job} {facts.sentence}")
    return EXIT_DONE


def _stages(run: RunFolder, stage: str | None) -> Sequence[str]:
    pipeline = pipeline_of(run)
    if stage == PREPARATION and run.stage(PREPARATION).logs.is_dir():
        return (PREPARATION,)
    if stage is not None and stage not in pipeline:
        raise ConfigError(f"--stage {stage}: the run has {', '.join(pipeline)}")
    return pipeline if stage is None else (stage,)


def _newest_log(files: StageFolder, node: int) -> Path | None:
    """The newest attempt's log; the job's own, where it has begun no attempt."""
    logs = sorted(files.logs.glob(f"node-{node}.attempt-*.log"), key=lambda file: int(file.stem.rsplit("-", 1)[1]))
    logs = logs or sorted(files.logs.glob("slurm-*.log"), key=lambda file: file.stat().st_mtime)
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
