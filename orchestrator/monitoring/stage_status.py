"""Status of runs, from their folders and one query to Slurm; UNKNOWN is not FAILED. Must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launchers.claims import open_claim
from orchestrator.metrics.console import duration
from orchestrator.monitoring.stage_progress import stage_progress
from orchestrator.run_folder.folder import PREPARATION, RunFolder, StageFolder
from orchestrator.run_folder.slurm_jobs import jobs_of
from orchestrator.run_state.attempts import Attempt
from orchestrator.run_state.frozen import read_config
from orchestrator.run_state.location import locate
from orchestrator.run_state.moved import away, bring_back, is_left_behind
from slurm.query import JobFacts, query

SILENT_SECONDS = 120.0
"""Without an answer from Slurm or a process of this machine, a stage whose record is older than this counts as not
running."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage according to its files and Slurm."""

    run: str
    folder: Path
    """Of the run."""
    stage: str
    state: str
    """finished, stopped, failed, running, waiting, not started, lost, unknown."""
    why: str
    step: int
    steps: int | None
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    attempts: int
    job: str | None
    newest: Mapping[str, object]
    """The newest value of every column of metrics.jsonl."""
    damaged: tuple[str, ...]
    """Unreadable parts of the stage's record, a sentence each."""


def stage_statuses(folders: Sequence[RunFolder]) -> list[StageStatus]:
    """Every stage of every run, with one squeue call for all of them."""
    stages = [(run, name, run.stage(name)) for run in folders for name in _rows_of(run)]
    copies = {run.root for run in folders if locate(run).is_copy}  # the jobs on record belong to the original
    jobs = {
        files.root: jobs_of(files)[-1:]
        for run, _, files in stages
        if not files.result.exists() and run.root not in copies
    }
    facts = query([job for newest in jobs.values() for job in newest])
    return [_status(run, name, files, _facts_of(jobs.get(files.root, ()), facts)) for run, name, files in stages]


def warn_damaged(statuses: Sequence[StageStatus]) -> None:
    """Report on stderr the records that could only be read in part."""
    for sentence in dict.fromkeys(sentence for status in statuses for sentence in status.damaged):
        print(f"warning: {sentence}; skipped", file=sys.stderr)


def pipeline_of(run: RunFolder) -> tuple[str, ...]:
    """The stages of a run, from its frozen configuration."""
    stages = read_config(run).get("pipeline")
    return tuple(str(stage) for stage in stages) if isinstance(stages, list) else ()


def _rows_of(run: RunFolder) -> tuple[str, ...]:
    """The stages, preceded by the job that prepares their data if there is one."""
    stages = pipeline_of(run)
    return (PREPARATION, *stages) if run.stage(PREPARATION).submission.exists() else stages


def find_runs(folder: Path) -> list[RunFolder]:
    """The run itself, or every run directly below an output folder."""
    if RunFolder(folder).is_run:
        return [RunFolder(folder)]
    return [RunFolder(file.parent) for file in sorted(folder.glob("*/run.json"))]


def _status(run: RunFolder, name: str, files: StageFolder, facts: JobFacts | None) -> StageStatus:
    progress = stage_progress(files)
    state, why = _state(run, files, progress.attempts, facts)
    return StageStatus(
        run=run.root.name,
        folder=run.root,
        stage=name,
        state=state,
        why=why,
        step=progress.step,
        steps=progress.steps,
        loss=progress.loss,
        eval_loss=progress.eval_loss,
        tokens_per_second=progress.tokens_per_second,
        eta_seconds=progress.eta_seconds,
        attempts=len(progress.attempts),
        job=None if facts is None else facts.job_id,
        newest=progress.newest,
        damaged=progress.damaged,
    )


def _state(run: RunFolder, files: StageFolder, attempts: Sequence[Attempt], facts: JobFacts | None) -> tuple[str, str]:
    """State and reason, from the run's own files, then its process, then Slurm; no guess if none of them knows."""
    if files.result.exists():
        return "finished", ""
    claimed = _claimed(run, files)
    if claimed is not None and claimed[0] == "running":
        return claimed
    if facts is not None and facts.state.phase in ("waiting", "running"):
        return facts.state.phase, "" if facts.state.name == "RUNNING" else facts.sentence
    if facts is not None and facts.state.phase == "unknown":
        return "unknown", facts.sentence
    if attempts and not _is_newer_than(files, attempts[-1]):
        return attempts[-1].state, attempts[-1].why
    if claimed is not None:
        return claimed
    closed = _closed_attempt(files)
    if closed is not None and not files.open_attempts():  # its record exists but cannot be read
        return "lost", f"attempt {closed} ended, but its record cannot be read: {files.attempt(closed)}"
    if facts is not None:
        return "failed", f"job {facts.job_id} {facts.sentence}"
    age = _seconds_since_last_sign(files)
    if age is None:
        return "not started", ""
    location = locate(run)
    if location.is_copy:  # recent files may come from the copying
        return "lost", f"copied from {location.recorded}; nothing runs here; `resume` continues it"
    if age < SILENT_SECONDS:
        return "running", ""
    return "lost", f"no heartbeat for {duration(age)} and no record of its end; the same command continues it"


def _claimed(run: RunFolder, files: StageFolder) -> tuple[str, str] | None:
    """State and reason from the process that began the newest attempt; None if it is not on this machine.

    Files alone mislead in both directions: a killed run was writing a moment ago, and a long save writes nothing for
    minutes.
    """
    found = away(run, files.root.name)
    if found is not None:
        return "running", (
            f"process {found.claim.process} runs in {found.root}, from where the run folder was moved; `cancel` makes it "
            "save and end there"
        )
    claim, location = open_claim(files.logs, files.attempts), locate(run)
    if location.is_copy and files.open_attempts():  # a process that works on them works on the original
        return (
            "lost",
            f"copied from {location.recorded} while attempt {files.open_attempts()[-1]} ran there; nothing runs here; `resume` "
            "continues it",
        )
    if claim is None or not claim.is_of_this_machine:
        return None
    if claim.is_alive:
        return "running", ""
    old = is_left_behind(run, files.root.name)
    if old is not None:
        return "lost", (
            f"process {claim.process} ended; what it wrote after the run folder was moved is in {old}: type "
            f"`{bring_back(old, run)}` and resume"
        )
    return "lost", f"process {claim.process} ended without a record of how; the same command continues it"


def _is_newer_than(files: StageFolder, attempt: Attempt) -> bool:
    """Whether an attempt after this one has begun."""
    return any(folder.name == f"attempt-{attempt.number + 1}" for folder in files.logs.glob("attempt-*"))


def _closed_attempt(files: StageFolder) -> int | None:
    """The newest attempt that has a record of its end."""
    return max((int(file.stem) for file in files.attempts.glob("*.json") if file.stem.isdigit()), default=None)


def _seconds_since_last_sign(files: StageFolder) -> float | None:
    signs = [file.stat().st_mtime for file in (files.metrics, files.events, *files.logs.glob("*.log")) if file.exists()]
    return max(0.0, datetime.now().timestamp() - max(signs)) if signs else None


def _facts_of(jobs: Sequence[str], facts: Mapping[str, JobFacts]) -> JobFacts | None:
    return facts[jobs[0]] if jobs else None
