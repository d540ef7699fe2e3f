"""Hands the unfinished stages of a run to Slurm as a chain, once; must not import torch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from launchers.submission import Stage, read_jobs, submit_chain
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DONE
from orchestrator.jobs import job_spec, render
from orchestrator.plan import run_directory_of
from orchestrator.rundir import RunFolder, StageFolder, read_json, write_json
from slurm.query import query


def submit(config: RunConfig, unfinished: Sequence[str]) -> int:
    """Submits each stage that has no live job; each starts when the one before it succeeded."""
    run = RunFolder(run_directory_of(config))
    live = {stage: job for stage in unfinished if (job := live_job(run.stage(stage))) is not None}
    for stage, job in live.items():
        print(f"{stage}: job {job} is with Slurm already; see `orchestrator status {run.root}`")
    waiting = [stage for stage in unfinished if stage not in live]
    before = live[unfinished[len(live) - 1]] if live and waiting else None

    def record(stage: Stage, job: str) -> None:
        write_json(run.stage(stage.spec.stage).submission, {"token": stage.token, "job": job})
        print(f"{stage.spec.stage}: submitted as job {job}; script {stage.script.path}", flush=True)

    submit_chain([_stage(config, run, name) for name in waiting], record=record, after_success_of=before)
    print(f"follow it with: orchestrator status {run.root}")
    return EXIT_DONE


def jobs_of(folder: StageFolder) -> tuple[str, ...]:
    """Every Slurm job that the stage has had, oldest first."""
    submitted = read_json(folder.submission).get("job") if folder.submission.exists() else None
    known = read_jobs(folder.logs)
    return known if submitted is None or submitted in known else (submitted, *known)


def live_job(folder: StageFolder) -> str | None:
    """The stage's newest job where Slurm still has it waiting or running, or gives no answer about it."""
    jobs = jobs_of(folder)
    if not jobs:
        return None
    facts = query(jobs[-1:])[jobs[-1]]
    return jobs[-1] if facts.state.phase in ("waiting", "running", "unknown") else None


def _stage(config: RunConfig, run: RunFolder, name: str) -> Stage:
    """The token of a submission is on disk before Slurm is asked: a killed client finds its job again."""
    file = run.stage(name).submission
    pending: dict[str, str | None] = read_json(file) if file.exists() else {}
    token = pending.get("token")
    if token is None or pending.get("job") is not None:
        token = f"{config.name}.{name}.{secrets.token_hex(6)}"
        write_json(file, {"token": token, "job": None})
    return Stage(spec=job_spec(config, name), script=render(config, name), token=token)
