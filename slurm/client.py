"""Submit, find and cancel jobs through Slurm's programs; never twice, and never blocking forever.

Imports nothing of ours.
"""

import os
import re
import time
from collections.abc import Callable, Sequence

from slurm.commands import Answer, NoAnswerError, Run, SlurmError, gave_no_answer, last_words, run_command

_CALL_SECONDS = 60.0
_TOKEN = re.compile(r"[A-Za-z0-9_.:-]{8,200}\Z")


def check_submission(script_path: str, *, run: Run = run_command) -> None:
    """Ask Slurm whether it would take the script (sbatch --test-only). Raises SlurmError with Slurm's message."""
    answer = run(["sbatch", "--test-only", script_path], _CALL_SECONDS)
    if answer.exit_code == 0 or gave_no_answer(answer):
        return  # no answer: the submission itself waits and looks the job up before it retries
    raise SlurmError(f"Slurm would refuse {script_path}: {_refusal(answer)}")


def submit(
    script_path: str,
    *,
    token: str,
    after_success_of: str | None = None,
    task_by_task: bool = False,
    patience_seconds: float = 600.0,
    run: Run = run_command,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Submit once and return the job id, whatever happens on the way.

    The token marks the job (--comment). It is looked up before each try, so that neither a frozen controller nor a
    killed client makes a second job. With `task_by_task` each task of an array waits for the same task of the earlier
    array only. Raises SlurmError when refused, NoAnswerError after the patience.
    """
    argv = _submission_argv(script_path, token, after_success_of, "aftercorr" if task_by_task else "afterok")
    waited, pause = 0.0, 2.0
    while True:
        # A frozen controller says "Socket timed out" after 10 s, but the job runs: look it up before another try.
        found, certain = find_by_token(token, run=run)
        if found is not None:
            return found
        answer = run(argv, _CALL_SECONDS) if certain else Answer(None, "", "squeue did not answer")
        # --parsable prints JOB;CLUSTER where there are several clusters.
        job_id = answer.output.strip().split(";")[0]
        if answer.exit_code == 0 and job_id.isdigit():
            return job_id
        if not gave_no_answer(answer):
            raise SlurmError(f"Slurm refused {script_path}: {_refusal(answer)}")
        if waited >= patience_seconds:
            sentence = f"Slurm's controller did not answer for {waited:.0f} s ({last_words(answer)})"
            raise NoAnswerError(f"{sentence}; run the same command again: the token {token} prevents a second job.")
        sleep(pause)
        waited, pause = waited + pause, min(pause * 2, 60.0)


def _submission_argv(script_path: str, token: str, after_success_of: str | None, dependency: str) -> list[str]:
    if not _TOKEN.match(token):
        raise SlurmError(f"The token is {token!r}: 8 to 200 letters, digits and _.:- are required.")
    argv = ["sbatch", "--parsable", f"--comment={token}"]
    if after_success_of is not None:
        # Without the second option, afterok on a failed job stays pending for ever.
        argv += [f"--dependency={dependency}:{after_success_of}", "--kill-on-invalid-dep=yes"]
    return [*argv, script_path]


def find_by_token(token: str, *, run: Run = run_command) -> tuple[str | None, bool]:
    """The id of the job that carries the token, and whether the answer is certain (the controller did answer)."""
    answer = run(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%k"], _CALL_SECONDS)
    if answer.exit_code != 0:
        return None, False
    rows = [line.strip().split("|", 1) for line in answer.output.splitlines()]
    ids = [row[0].split("_")[0] for row in rows if len(row) == 2 and row[1] == token]
    return (min(ids, key=int) if ids else _find_in_accounting(token, run=run)), True


def cancel(job_ids: Sequence[str], *, run: Run = run_command) -> None:
    """End the jobs now, pending ones too; ended jobs are no error. Raises SlurmError."""
    _scancel([], job_ids, run=run)


def ask_to_stop(job_ids: Sequence[str], *, run: Run = run_command) -> None:
    """Send the batch shells the signal on which they ask the ranks to save and end. Raises SlurmError."""
    # The batch shell alone: USR2 would kill torchrun and orphan its workers.
    _scancel(["--batch", "--signal=USR2"], job_ids, run=run)


def _scancel(options: Sequence[str], job_ids: Sequence[str], *, run: Run) -> None:
    if not job_ids:
        return
    answer = run(["scancel", *options, *job_ids], _CALL_SECONDS)
    if gave_no_answer(answer):
        raise NoAnswerError(f"Slurm's controller did not answer scancel ({last_words(answer)}).")
    harmless = re.compile(r"invalid job id|already completing|already finished|not yet|pending", re.IGNORECASE)
    complaints = [line for line in answer.errors.splitlines() if line.strip() and not harmless.search(line)]
    if answer.exit_code != 0 and complaints:
        raise SlurmError(f"scancel failed: {complaints[-1].strip()}")


def _find_in_accounting(token: str, *, run: Run) -> str | None:
    """A job that ended and left the controller's memory; no accounting, no answer."""
    argv = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobIDRaw,Comment", "--starttime=now-7days"]
    argv.append(f"--user={os.getuid()}")
    answer = run(argv, _CALL_SECONDS)
    # Without slurmdbd, sacct exits with 1.
    rows = [line.split("|", 1) for line in answer.output.splitlines()] if answer.exit_code == 0 else []
    return next((row[0] for row in rows if len(row) == 2 and row[1] == token), None)


def _refusal(answer: Answer) -> str:
    words = last_words(answer)
    return words if words.endswith(".") else f"{words}."
