"""Submit rendered stages to Slurm, one or a chain, and read which jobs a run has had; the effects of launcher=slurm."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.secrets import write_secrets
from launchers.spec import JobSpec, LaunchError, Script, write
from slurm.client import check_submission
from slurm.client import submit as submit_script
from slurm.commands import Run, SlurmError, run_command

JOBS_FILE = "jobs"


@dataclass(frozen=True)
class Stage:
    """A stage ready to be submitted; the caller stores the token *before* submitting, one per submission."""

    spec: JobSpec
    script: Script
    token: str


def submit(stage: Stage, *, after_success_of: str | None = None, run: Run = run_command) -> str:
    """Submit one stage and return its job id. Raises LaunchError."""
    return submit_chain([stage], record=lambda _stage, _job_id: None, after_success_of=after_success_of, run=run)[0]


def submit_chain(
    stages: Sequence[Stage],
    *,
    record: Callable[[Stage, str], None],
    after_success_of: str | None = None,
    run: Run = run_command,
) -> tuple[str, ...]:
    """Submit the stages so that each starts when the one before it succeeded, and none stays behind when it failed.

    Slurm is asked about every script first. `record` is called after each submission, so that a killed client loses
    nothing: the same stages submitted again (same tokens) find their jobs. Raises LaunchError.
    """
    try:
        for stage in stages:
            _prepare(stage)
            # All scripts before the first submission: half a chain is worse than none.
            check_submission(stage.script.path, run=run)
        job_ids: list[str] = []
        for stage in stages:
            before = job_ids[-1] if job_ids else after_success_of
            job_ids.append(submit_script(stage.script.path, token=stage.token, after_success_of=before, run=run))
            # At once: a client that is killed between two submissions must not forget the first.
            record(stage, job_ids[-1])
    except (SlurmError, OSError) as error:
        raise LaunchError(str(error)) from error
    return tuple(job_ids)


@dataclass(frozen=True)
class Array:
    """One stage of several runs, ready to be submitted as a job array; task i is the i-th spec."""

    specs: Sequence[JobSpec]
    scripts: Sequence[Script]
    array_script: Script
    token: str


def submit_arrays(
    arrays: Sequence[Array],
    *,
    record: Callable[[Array, str], None],
    after_success_of: str | None = None,
    run: Run = run_command,
) -> tuple[str, ...]:
    """Submit arrays in sequence: each task waits for the same task of the previous array. Raises LaunchError."""
    try:
        for array in arrays:
            for spec, script in zip(array.specs, array.scripts, strict=True):
                _prepare(Stage(spec, script, array.token))
            Path(array.array_script.path).parent.mkdir(parents=True, exist_ok=True)
            check_submission(str(write(array.array_script)), run=run)
        job_ids: list[str] = []
        for array in arrays:
            before = job_ids[-1] if job_ids else after_success_of
            job_ids.append(
                submit_script(
                    array.array_script.path,
                    token=array.token,
                    after_success_of=before,
                    task_by_task=bool(job_ids),
                    run=run,
                )
            )
            record(array, job_ids[-1])
    except (SlurmError, OSError) as error:
        raise LaunchError(str(error)) from error
    return tuple(job_ids)


def read_jobs(log_directory: str | Path) -> tuple[str, ...]:
    """Every job that has worked on the stage or was chained to it, oldest first; the last one counts."""
    with suppress(OSError):
        lines = (Path(log_directory) / JOBS_FILE).read_text(encoding="utf-8").split()
        return tuple(dict.fromkeys(lines))
    return ()


def _prepare(stage: Stage) -> None:
    """Script, log folder (without it Slurm fails the job and leaves no log) and secrets."""
    spec = stage.spec
    Path(spec.log_directory).mkdir(parents=True, exist_ok=True)
    write(stage.script)
    if spec.secrets_file is not None:
        write_secrets(spec.secrets_file, os.environ)
