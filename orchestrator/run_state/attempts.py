"""Closes an attempt and decides what comes next, from the run's files; exit codes alone never decide. No torch.

`python -m orchestrator.run_state.attempts RUN_DIR STAGE --attempt K --exit-code N` prints one word on its last line:
finished | requeue | retry | stop, and answers 0 | 75 | 1 | 93 (2 if the user has to fix something).
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.run import RunConfig
from orchestrator.errors import (
    EXIT_DEFECT,
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_SAVED,
    EXIT_USER,
    OrchestratorError,
    RunFolderError,
)
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.frozen import load_config

State = Literal["finished", "stopped", "failed"]
Word = Literal["finished", "requeue", "retry", "stop"]
INTERRUPTED = 130
"""Exit code of an attempt ended by a second Ctrl-C: a stop by its user, without a save."""
MACHINE_LOST = 255
"""Exit code that a script reports if nobody saw the attempt's end: costs no retry, like a preemption."""
NEVER_RETRIED = (EXIT_USER, EXIT_DO_NOT_RESTART)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One line of a stage's history."""

    number: int
    state: State
    why: str
    host: str
    rank: int | None
    exit_code: int
    step: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "attempt": self.number,
            "state": self.state,
            "why": self.why,
            "host": self.host,
            "rank": self.rank,
            "exit_code": self.exit_code,
            "step": self.step,
            "time": time.time(),
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    word: Word
    why: str
    exit_code: int


def write_attempt(folder: StageFolder, attempt: Attempt) -> None:
    write_json(folder.attempt(attempt.number), attempt.to_json())


def read_attempts(folder: StageFolder) -> list[Attempt]:
    """All closed attempts, oldest first."""
    files = [file for file in folder.attempts.glob("*.json") if file.stem.isdigit()]
    return [_read(file) for file in sorted(files, key=lambda file: int(file.stem))]


def readable_attempts(folder: StageFolder) -> tuple[list[Attempt], list[str]]:
    """The closed attempts with readable records, and a sentence about each unreadable one."""
    attempts: list[Attempt] = []
    damaged: list[str] = []
    for file in sorted(folder.attempts.glob("*.json"), key=lambda file: (len(file.stem), file.stem)):
        if file.stem.isdigit():
            try:
                attempts.append(_read(file))
            except RunFolderError as error:
                damaged += error.problems
    return attempts, damaged


def next_attempt(folder: StageFolder) -> int:
    """The first number that no attempt has."""
    numbers = [int(file.name.split(".")[0]) for file in folder.attempts.glob("*.json")]
    return max(numbers, default=0) + 1


def write_fault(folder: StageFolder, attempt: int, rank: int, error: BaseException, step: int | None) -> None:
    """A rank's own account of its failure; the earliest of an attempt is the first cause."""
    code = error.exit_code if isinstance(error, OrchestratorError) else EXIT_DEFECT
    why = str(error) if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
    cause = Attempt(
        number=attempt, state="failed", why=why, host=socket.gethostname(), rank=rank, exit_code=code, step=step
    )
    write_json(folder.fault(attempt, rank), cause.to_json())


def close_attempt(folder: StageFolder, number: int, exit_code: int, *, outside_cause: str | None = None) -> Attempt:
    """The attempt's record; if the job could not write it, written now from the ranks' faults and the exit code."""
    # The rank's own record is better than anything derived from an exit code, which torchrun and srun rewrite.
    if folder.attempt(number).exists():
        return _read(folder.attempt(number))
    if folder.result.exists():
        attempt = Attempt(
            number=number, state="finished", why="nothing was left to do", host=socket.gethostname(), rank=None,
            exit_code=EXIT_DONE, step=None,
        )  # fmt: skip
    # before any fault: ranks that lose their peers to the interrupt report network errors
    elif exit_code == INTERRUPTED:
        attempt = _interrupted(folder, number)
    else:
        attempt = _first_fault(folder, number) or _silent_death(folder, number, exit_code, outside_cause)
    write_attempt(folder, attempt)
    return attempt


def decide(folder: StageFolder, config: RunConfig, attempt: Attempt) -> Decision:
    """The decision that follows a closed attempt."""
    if folder.result.exists():
        return Decision(word="finished", why="result.json is there", exit_code=EXIT_DONE)
    history = read_attempts(folder)
    free = [entry for entry in history if _is_free(entry)]
    failures = [entry for entry in history if entry.state == "failed" and not _is_free(entry)]
    # Stops and lost machines have a budget of their own: they must not use up the retries of failures.
    if _is_free(attempt):
        if len(free) > config.launcher.max_preemptions:
            return _give_up(f"it was stopped {len(free)} times, {config.launcher.max_preemptions} are allowed")
        if attempt.state == "stopped":
            return Decision(word="requeue", why=attempt.why, exit_code=EXIT_SAVED)
        return Decision(word="retry", why=attempt.why, exit_code=EXIT_DEFECT)
    if attempt.exit_code in NEVER_RETRIED:
        return Decision(word="stop", why=attempt.why, exit_code=attempt.exit_code)
    if len(failures) > config.launcher.max_failures:
        return _give_up(f"it failed {len(failures)} times, {config.launcher.max_failures} are allowed; {attempt.why}")
    # A job that fails at the same step again would do so until its retries are spent.
    if _no_progress(history):
        return _give_up(f"two attempts in a row made no progress past step {attempt.step or 0}; {attempt.why}")
    return Decision(word="retry", why=attempt.why, exit_code=EXIT_DEFECT)


def _is_free(attempt: Attempt) -> bool:
    """A stop on request, or a machine that was lost: not the job's fault."""
    return attempt.state == "stopped" or attempt.exit_code == MACHINE_LOST


def _give_up(why: str) -> Decision:
    return Decision(word="stop", why=why, exit_code=EXIT_DO_NOT_RESTART)


def _no_progress(history: list[Attempt]) -> bool:
    """Whether the last two attempts failed and the later one got no further than the earlier one."""
    if len(history) < 2 or any(_is_free(entry) or entry.state == "finished" for entry in history[-2:]):
        return False
    return (history[-1].step or 0) <= (history[-2].step or 0)


def _first_fault(folder: StageFolder, number: int) -> Attempt | None:
    faults = [read_json(file) for file in folder.attempts.glob(f"{number}.fault-*.json")]
    if not faults:
        return None
    # Later faults are mostly consequences: ranks that lose their peers report network errors.
    return _from_json(min(faults, key=lambda fault: fault["time"]))


def _silent_death(folder: StageFolder, number: int, exit_code: int, outside_cause: str | None) -> Attempt:
    """The record of an attempt without a rank's fault: killed from outside, or out of memory."""
    why = outside_cause or (
        f"the ranks ended with exit code {exit_code} without a message: killed from outside, or out of host memory "
        f"(see {folder.logs})"
    )
    return Attempt(
        number=number, state="failed", why=why, host=socket.gethostname(), rank=None, exit_code=exit_code or EXIT_DEFECT,
        step=_last_step(folder, number),
    )  # fmt: skip


def _interrupted(folder: StageFolder, number: int) -> Attempt:
    from orchestrator.run_folder.checkpoints import saved_steps

    step, saved = _last_step(folder, number), saved_steps(folder)
    where = "before its first step" if step is None else f"at step {step}"
    checkpoint = f"the last checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
    return Attempt(
        number=number, state="stopped", why=f"ended by a second Ctrl-C {where}; {checkpoint}", host=socket.gethostname(),
        rank=None, exit_code=INTERRUPTED, step=step,
    )  # fmt: skip


def _last_step(folder: StageFolder, number: int) -> int | None:
    """The last step that an attempt recorded."""
    from orchestrator.metrics.jsonl import attempt_of, read_rows, step_of

    rows = [row for row in read_rows(folder.metrics) if attempt_of(row) == number and "loss" in row]
    return max((step_of(row) for row in rows), default=None)


def _read(path: Path) -> Attempt:
    try:
        return _from_json(read_json(path))
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: it is not a record of an attempt ({error})") from None


def _from_json(raw: dict[str, Any]) -> Attempt:
    return Attempt(
        number=raw["attempt"],
        state=raw["state"],
        why=raw["why"],
        host=raw["host"],
        rank=raw["rank"],
        exit_code=raw["exit_code"],
        step=raw["step"],
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.run_state.attempts")
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--cause", default=None)
    options = parser.parse_args(argv)
    try:
        decision = _judge(RunFolder(options.run_directory), options)
    except OrchestratorError as error:  # no record can be read or written: a retry would fail the same way
        decision = Decision(word="stop", why="; ".join(error.problems), exit_code=error.exit_code)
    print(decision.why, file=sys.stderr)
    print(decision.word)
    return decision.exit_code


def _judge(run: RunFolder, options: argparse.Namespace) -> Decision:
    config = load_config(run)
    folder = run.stage(options.stage)
    attempt = close_attempt(folder, options.attempt, options.exit_code, outside_cause=options.cause)
    return decide(folder, config, attempt)


if __name__ == "__main__":
    sys.exit(main())
