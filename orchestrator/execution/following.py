"""Starts a stage here, or joins the attempt that already works on it, and follows it to its end. Must not import torch."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from launchers.claims import Claim, open_claim
from launchers.process import Joined, Launch, Outcome, launch
from launchers.spec import JobSpec, Script
from orchestrator.config.run import RunConfig
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_LAUNCH_FAILED,
    EXIT_SAVED,
    LaunchFailed,
    OrchestratorError,
    RunFolderError,
)
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.attempts import INTERRUPTED, MACHINE_LOST, close_attempt, decide, read_attempts
from orchestrator.run_state.location import locate
from orchestrator.run_state.moved import away

POLL_SECONDS = 0.05
LISTEN_SECONDS = 25.0
"""Guards send a sign of life every 10 s."""
CHOICE = "l: leave it running (Enter)   s: save and end it   w: keep watching\n? "

Watch = Callable[[str], bool]
"""Polled with the stage's name while it runs here: whether it is to save and end."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """A stage that can be started on this machine."""

    name: str
    spec: JobSpec
    script: Script
    steps: int
    """Planned steps, for the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Followed:
    """One command's view of a stage that runs on this machine."""

    job: StageJob
    files: StageFolder
    running: Launch | Joined
    watch: Watch
    since: float
    """Launch time; 0 for a joined one."""
    began: float
    """Start time of the command."""
    is_interrupted: bool = False
    """Whether Ctrl-C arrived while the job was being started."""


def live_claim(spec: JobSpec, run: RunFolder) -> Claim | None:
    """The attempt at a stage that runs on this machine. Attempts that a copy inherited do not count."""
    claim = _open_claim(spec)
    is_alive = claim is not None and claim.is_of_this_machine and claim.is_alive
    if not is_alive or (locate(run).is_copy and away(run, spec.stage) is None):
        return None
    return claim


def run_stage(config: RunConfig, run: RunFolder, job: StageJob, *, watch: Watch, began: float) -> int:
    """Start the stage, or join its running attempt, and show it until it ends; return the exit code."""
    files = run.stage(job.name)
    while True:
        launched = time.time()
        running, is_interrupted = _start_or_join(run, job)
        if running is None:
            return EXIT_DONE
        since = 0.0 if isinstance(running, Joined) else launched
        followed = Followed(
            job=job,
            files=files,
            running=running,
            watch=watch,
            since=since,
            began=began,
            is_interrupted=is_interrupted,
        )
        outcome = _follow(followed)
        if outcome is None:
            return EXIT_SAVED
        lost_the_race = outcome.exit_code == EXIT_LAUNCH_FAILED and outcome.attempt is None
        if not lost_the_race or live_claim(job.spec, run) is None:
            return _after(config, files, job.name, outcome)


@contextmanager
def start_lock(run: RunFolder) -> Generator[None]:
    """Lock that lets one command at a time check whether a stage runs and start it; the kernel releases it with the
    process.
    """
    with open(run.lock, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another command is starting {run.root}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the script's own claim still admits only one
            pass
        yield


def _start_or_join(run: RunFolder, job: StageJob) -> tuple[Launch | Joined | None, bool]:
    """(job, whether Ctrl-C arrived meanwhile); no job if another command has finished the stage."""
    files, spec = run.stage(job.name), job.spec
    with start_lock(run):
        if files.result.exists():
            return None, False
        claim = live_claim(spec, run)
        if claim is not None:
            _refuse_moved_away(run, job.name)
            print(
                f"{job.name}: attempt {claim.attempt} is running on this machine (process {claim.process}); joined it",
                flush=True,
            )
            return Joined(claim, spec), False
        _refuse_other_machine(spec)
        print(f"{job.name}: {spec.script_path}; log {files.logs}", flush=True)
        running = launch(job.script, spec)
        try:
            while running.is_running() and running.attempt is None:
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # the job exists and must not be forgotten: the caller follows it and asks it to end
            return running, True
        return running, False


def _open_claim(spec: JobSpec) -> Claim | None:
    return open_claim(spec.log_directory, spec.attempts_directory)


def _refuse_moved_away(run: RunFolder, stage: str) -> None:
    """Ranks write to the path they were started with, even if the folder has moved."""
    found = away(run, stage)
    if found is None:
        return
    # Once the process has recreated its old folder, `mv` would put the run inside it.
    back = "" if found.root.exists() else f"move it back with `mv {run.root} {found.root}`, or "
    raise RunFolderError(
        f"{stage}: process {found.claim.process} (attempt {found.claim.attempt}) is still running in {found.root}, from where the "
        f"run folder was moved: {back}type `cancel {run.root}`, which makes it save and end there and prints how to continue"
    )


def _refuse_other_machine(spec: JobSpec) -> None:
    """An attempt on another machine that shares this folder is only visible through its files."""
    claim = _open_claim(spec)
    if claim is None or claim.job or claim.is_of_this_machine:
        return
    before = claim.beats()
    if not before:
        return
    print(
        f"attempt {claim.attempt} was started on {claim.host}: listening {LISTEN_SECONDS:.0f} s for its ranks",
        flush=True,
    )
    deadline = time.monotonic() + LISTEN_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        if claim.beats() != before:
            raise LaunchFailed(
                f"attempt {claim.attempt} is running on {claim.host}, which shares this folder: type `status --watch` to see it "
                "here, `cancel` to make it save and end, or resume on that machine to join it"
            )


def _follow(stage: Followed) -> Outcome | None:
    """How the attempt ended; None if it continues without this command."""
    running, interrupts, is_pending = stage.running, 0, stage.is_interrupted
    is_running = _watched(running, lambda: stage.watch(stage.job.name))
    while True:
        try:
            if is_pending:
                is_pending = False
                raise KeyboardInterrupt
            _show(stage, is_running)
            break
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 1 and isinstance(running, Joined):
                choice = ask(stage.job.name, "was started by another command.")
                if choice == "l":
                    return None
                interrupts = 1 if choice == "s" else 0
            if interrupts == 1:
                print("\nasked the job to save and end; a second Ctrl-C ends it at once", flush=True)
                running.stop()
            elif interrupts > 1:
                _end(stage, INTERRUPTED, None)
        except BrokenPipeError:  # `run | head`: the display never decides whether a job continues
            # Python flushes stdout once more at exit, which would raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"{stage.job.name}: this command's output is closed; the job continues without it", file=sys.stderr)
            return None
        except OrchestratorError as error:  # a study that cannot use the stage
            _end(stage, MACHINE_LOST, f"ended by its command: {error}")
            raise
    outcome = running.poll()
    assert outcome is not None
    if interrupts and outcome.attempt is None:
        print(f"{stage.job.name}: ended by Ctrl-C before it began; the same command starts it")
        return None
    return outcome


def _show(stage: Followed, is_running: Callable[[], bool]) -> None:
    # used for drawing: imported while the job starts
    from orchestrator.metrics.display import show_progress, view_of_stage

    files = stage.files
    while stage.running.is_running():
        view = view_of_stage(
            stage.job.name,
            metrics_file=files.metrics,
            events_file=files.events,
            phases_file=files.phases,
            total_steps=stage.job.steps,
            since=stage.since,
            began=stage.began,
        )
        show_progress(view, is_running)


def ask(name: str, what_it_is: str) -> str:
    """What to do with a job that this command did not start: l, s or w. Without a terminal it is left alone."""
    choice = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"\n{name} {what_it_is}")
        try:
            while choice not in ("l", "s", "w"):
                choice = input(CHOICE).strip().lower()[:1] or "l"
        except (KeyboardInterrupt, EOFError):
            choice = "l"
    choice = choice or "l"
    if choice == "l":
        print(f"\n{name}: left running; the same command joins it again, `cancel` makes it save and end", flush=True)
    return choice


def _end(stage: Followed, code: int, why: str | None) -> None:
    """Kill the attempt and record the cause, which nobody else would know."""
    with suppress(KeyboardInterrupt):  # a third one changes nothing
        attempt = stage.running.attempt
        stage.running.kill()
        if attempt is not None:
            close_attempt(stage.files, attempt, code, outside_cause=why)


def _watched(running: Launch | Joined, is_enough: Callable[[], bool]) -> Callable[[], bool]:
    """Whether it runs; asks it once to save and end if `is_enough` says so."""
    asked: list[bool] = []

    def is_running() -> bool:
        if not asked and is_enough():
            asked.append(True)
            running.stop()
        return running.is_running()

    return is_running


def _after(config: RunConfig, files: StageFolder, stage: str, outcome: Outcome) -> int:
    """Report how the attempt ended, from its record."""
    if files.result.exists():
        return EXIT_DONE
    code, cause = outcome.exit_code, None if outcome.cause is None else str(outcome.cause)
    earlier = [attempt.number for attempt in read_attempts(files)]
    if outcome.attempt is None and (code == EXIT_LAUNCH_FAILED or not earlier):
        raise LaunchFailed(f"{stage}: it ended with exit code {code} before an attempt: {outcome.last_words or cause}")
    attempt = close_attempt(files, outcome.attempt or earlier[-1], code)
    decision = decide(files, config, attempt)
    if decision.exit_code == EXIT_SAVED:
        end = attempt.why if attempt.exit_code == INTERRUPTED else f"saved at step {attempt.step} ({attempt.why})"
        print(f"{stage}: {end}; the same command continues from there")
        return EXIT_SAVED
    report_failure(stage, decision.why, cause, str(files.logs))
    return decision.exit_code


def report_failure(stage: str, why: str, cause: str | None, logs: str) -> None:
    """Report on stderr: the reason, the first cause if it adds something, and the path of the log."""
    print(f"error: {stage}: {why}", file=sys.stderr)
    if cause is not None and cause not in why:
        print(f"error: first cause: {cause}", file=sys.stderr)
    print(f"the whole log is in {logs}", file=sys.stderr)
