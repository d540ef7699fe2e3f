"""Ends a run from its folder: cancel. Must not import torch."""

from __future__ import annotations

from launchers.cancellation import cancel_jobs
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DONE
from orchestrator.jobs import job_spec
from orchestrator.rundir import PREPARATION, RunFolder, write_text
from orchestrator.submission import jobs_of

GENTLE_SECONDS = 60.0


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
