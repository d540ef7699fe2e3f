"""End the Slurm jobs of a run: gently, then hard, then verified; no successor is forgotten."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.spec import JobSpec, LaunchError
from launchers.submission import read_jobs
from slurm.client import ask_to_stop, cancel
from slurm.commands import Run, SlurmError, run_command
from slurm.query import JobFacts, query

_LOOK_SECONDS = 2.0
_VERIFY_SECONDS = 120.0


def cancel_jobs(
    specs: Sequence[JobSpec],
    *,
    also: Sequence[str] = (),
    gentle_seconds: float,
    run: Run = run_command,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, JobFacts]:
    """Let running stages save for `gentle_seconds`, end what is left, and return how every job ended.

    The jobs are those in the stages' logs and `also` (the caller's own record, including pending ones).
    Raises LaunchError if Slurm gives no answer or a job does not end.
    """
    try:
        alive = _alive(specs, also, run=run)
        _ask_gently(specs, alive, run=run)
        waited = 0.0
        while waited < gentle_seconds and _running(alive):
            sleep(_LOOK_SECONDS)
            waited += _LOOK_SECONDS
            alive = _alive(specs, also, run=run)
        _end(specs, also, alive, run=run, sleep=sleep)
    except SlurmError as error:
        raise LaunchError(str(error)) from error
    return query(_job_ids(specs, also), run=run)


def _end(
    specs: Sequence[JobSpec],
    also: Sequence[str],
    alive: dict[str, JobFacts],
    *,
    run: Run,
    sleep: Callable[[float], None],
) -> None:
    waited = 0.0
    while alive:
        cancel(list(alive), run=run)
        sleep(_LOOK_SECONDS)
        waited += _LOOK_SECONDS
        alive = _alive(specs, also, run=run)
        if alive and waited > _VERIFY_SECONDS:
            raise LaunchError(
                f"These jobs could not be cancelled: {', '.join(alive)}; ask the cluster's administrators."
            )


def _job_ids(specs: Sequence[JobSpec], also: Sequence[str]) -> list[str]:
    recorded = [job_id for spec in specs for job_id in read_jobs(spec.log_directory)]
    return list(dict.fromkeys([*also, *recorded]))


def _alive(specs: Sequence[JobSpec], also: Sequence[str], *, run: Run) -> dict[str, JobFacts]:
    """Pending or running jobs; reread each time, because a job may have chained a successor meanwhile."""
    facts = query(_job_ids(specs, also), run=run)
    return {job_id: fact for job_id, fact in facts.items() if fact.state.phase in {"waiting", "running"}}


def _running(facts: dict[str, JobFacts]) -> list[str]:
    return [job_id for job_id, fact in facts.items() if fact.state.phase == "running"]


def _ask_gently(specs: Sequence[JobSpec], alive: dict[str, JobFacts], *, run: Run) -> None:
    """Write the stop file, whose content tells the job's script not to start another attempt."""
    running = set(_running(alive))
    for spec in specs:
        if running & set(read_jobs(spec.log_directory)):
            Path(spec.stop_file).write_text("cancel\n", encoding="utf-8")
    waiting = [job_id for job_id in alive if job_id not in running]
    cancel(waiting, run=run)
    ask_to_stop(sorted(running), run=run)
