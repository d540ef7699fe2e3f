"""Follows the stages of a run that Slurm already has: queue, progress, end. Must not import torch."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.config.run import RunConfig
from orchestrator.display.result_text import print_result
from orchestrator.errors import EXIT_DONE, EXIT_LAUNCH_FAILED, EXIT_SAVED
from orchestrator.execution.following import StageJob, ask, report_failure
from orchestrator.metrics.console import duration
from orchestrator.monitoring.stage_status import stage_statuses
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_folder.slurm_jobs import jobs_of
from orchestrator.run_state.attempts import decide, read_attempts
from slurm.query import JobFacts, query
from slurm.states import UNKNOWN

ASK_SECONDS = 10.0
"""Seconds between two queries about a job; a controller serves thousands of users."""
DRAW_SECONDS = 0.25


def join_jobs(config: RunConfig, run: RunFolder, stages: Sequence[StageJob], *, began: float) -> int:
    """Follow stages that Slurm has, in order; without a terminal, print their state and leave them alone."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _tell(run, stages)
    for stage in stages:
        joined = _Joined(config=config, run=run, stage=stage, files=run.stage(stage.name), began=began)
        code = _follow(joined)
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


@dataclass(frozen=True, kw_only=True)
class _Joined:
    config: RunConfig
    run: RunFolder
    stage: StageJob
    files: StageFolder
    began: float
    """When the command was given."""


class JobWatch:
    """Slurm's newest answer about a stage, queried in the background: a hanging controller must not freeze the
    display.
    """

    def __init__(self, files: StageFolder) -> None:
        self._files = files
        self._ended = threading.Event()
        self.facts: JobFacts | None = None
        """None before the first answer."""
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop querying, without waiting for a pending query."""
        self._ended.set()

    @property
    def phase(self) -> str:
        """The phase of the state, or `done` if the stage has its result, which overrides any answer from Slurm."""
        if self._files.result.exists():
            return "done"
        return "unknown" if self.facts is None else self.facts.state.phase

    def _ask(self) -> None:
        while not self._ended.is_set():
            self.facts = _facts(self._files)  # reread each time: a job may have chained a successor
            self._ended.wait(ASK_SECONDS)


def _facts(files: StageFolder) -> JobFacts:
    jobs = jobs_of(files)
    return query(jobs[-1:])[jobs[-1]] if jobs else JobFacts(job_id="not submitted", state=UNKNOWN)


def sentence_of(stage: str, facts: JobFacts) -> str:
    """Job, state and reason on one line; no guess if Slurm gives no answer."""
    if facts.state.phase == "unknown":
        return f"{stage}: the state of job {facts.job_id} is unknown: Slurm gives no answer about it, which is not a failure"
    words = ", ".join(word for word in (facts.state.name, facts.reason) if word)
    return f"{stage}: job {facts.job_id} ({words}) {facts.sentence}"


def _tell(run: RunFolder, stages: Sequence[StageJob]) -> int:
    """0 as for a submission, 75 if it is unknown whether any job exists."""
    every = [_facts(run.stage(stage.name)) for stage in stages]
    is_running = any(facts.state.phase == "running" for facts in every)
    progress = {status.stage: status for status in stage_statuses([run])} if is_running else {}
    for stage, facts in zip(stages, every, strict=True):
        at = ""
        if facts.state.phase == "running":
            at = f", at step {progress[stage.name].step} of {progress[stage.name].steps or stage.steps}"
        print(f"{sentence_of(stage.name, facts)}{at}")
    print(f"left running; follow it with: orchestrator status {run.root} --watch", flush=True)
    return EXIT_SAVED if any(facts.state.phase == "unknown" for facts in every) else EXIT_DONE


def _follow(joined: _Joined) -> int:
    watch = JobWatch(joined.files)
    try:
        while True:
            try:
                return _shown(joined, watch)
            except KeyboardInterrupt:
                choice = ask(joined.stage.name, "is a Slurm job and does not need this command.")
                if choice == "l":
                    return EXIT_SAVED
                if choice == "s":
                    return _save_and_end(joined)
    finally:
        watch.close()


def _shown(joined: _Joined, watch: JobWatch) -> int:
    """Show queue and progress in turn, because a preempted job returns to the queue."""
    while True:
        if watch.phase in ("waiting", "unknown"):
            _show_queue(joined, watch)
        elif watch.phase == "running":
            _show_running(joined, watch)
        elif watch.phase == "done":
            print_result(joined.files, joined.config, wall_seconds=time.time() - joined.began)
            return EXIT_DONE
        else:
            watch.facts = _facts(joined.files)  # a successor may have come between the answer and the end
            if watch.phase == "ended":
                return _ended(joined, watch.facts)


def _show_queue(joined: _Joined, watch: JobWatch) -> None:
    from rich.console import Console
    from rich.text import Text

    began = time.time()
    with Console().status("") as line:
        while watch.phase in ("waiting", "unknown"):
            facts = watch.facts
            sentence = f"{joined.stage.name}: asking Slurm" if facts is None else sentence_of(joined.stage.name, facts)
            starts = "" if facts is None or not facts.starts else f"; expected to start {facts.starts}"
            line.update(Text(f"{sentence}{starts}  {duration(time.time() - began)}"))
            time.sleep(DRAW_SECONDS)


def _show_running(joined: _Joined, watch: JobWatch) -> None:
    """Show progress until the job is known to have left its nodes; missing answers are ignored, since the files show
    its progress.
    """
    from orchestrator.metrics.display import show_progress, view_of_stage

    files = joined.files
    view = view_of_stage(
        joined.stage.name,
        metrics_file=files.metrics,
        events_file=files.events,
        phases_file=files.phases,
        total_steps=joined.stage.steps,
        since=0.0,
        began=joined.began,
    )
    show_progress(view, lambda: watch.phase in ("running", "unknown"))


def _ended(joined: _Joined, facts: JobFacts) -> int:
    """Report a job that ended without a result, from its attempt's record, or from Slurm if there is none."""
    name, attempts = joined.stage.name, read_attempts(joined.files)
    sentence = sentence_of(name, facts)
    if not attempts or joined.files.open_attempts():
        report_failure(name, sentence.removeprefix(f"{name}: "), None, str(joined.files.logs))
        return EXIT_LAUNCH_FAILED if not attempts else EXIT_SAVED
    decision = decide(joined.files, joined.config, attempts[-1])
    if decision.exit_code == EXIT_SAVED:
        print(
            f"{sentence}; saved at step {attempts[-1].step} ({attempts[-1].why}); the same command continues from there"
        )
        return EXIT_SAVED
    report_failure(name, decision.why, None, str(joined.files.logs))
    return decision.exit_code


def _save_and_end(joined: _Joined) -> int:
    from orchestrator.execution.cancel import cancel

    with suppress(KeyboardInterrupt):  # a second Ctrl-C leaves the rest to Slurm: the job already has the request
        cancel(joined.run, joined.config)
    print(f"{joined.stage.name}: the same command continues from its last checkpoint")
    return EXIT_SAVED
