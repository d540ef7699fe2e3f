"""Submits the unfinished stages of a run to Slurm as a chain, once. Must not import torch."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launchers.sbatch import render_array, render_task
from launchers.submission import Array, Stage, submit_chain
from launchers.submission import submit_arrays as chain
from orchestrator.config.run import RunConfig, data_sets_of
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.execution.job_specs import job_spec, preparation_spec, render
from orchestrator.execution.preparation import needs_job
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import PREPARATION, RunFolder, StageFolder, run_directory_of
from orchestrator.run_folder.slurm_jobs import jobs_of
from slurm.query import query


def submit(config: RunConfig, unfinished: Sequence[str], preparations: dict[str, str] | None = None) -> dict[str, str]:
    """Submit each stage without a live job, to start when the previous one has succeeded; return the live jobs: stage
    -> job.

    `preparations` (prepared data -> job) is shared by the runs of a multirun and extended here.
    """
    run = RunFolder(run_directory_of(config))
    live = {stage: job for stage in unfinished if (job := live_job(run.stage(stage))) is not None}
    for stage, job in live.items():
        print(f"{stage}: already submitted, as job {job}", flush=True)
    waiting = [stage for stage in unfinished if stage not in live]
    stages = [_stage(config, run, name) for name in waiting]
    before = live[unfinished[len(live) - 1]] if live and waiting else None
    if waiting and not live:
        before = _preparation_job(config, waiting, {} if preparations is None else preparations)
    submit_chain(stages, record=partial(_record, run), after_success_of=before)
    if waiting:
        print(f"follow it with: orchestrator status {run.root}")
    return live


def submit_arrays(configs: Sequence[RunConfig]) -> int:
    """Submit the runs of a multirun as one job array per stage, after the jobs that prepare their data."""
    pipeline = configs[0].pipeline
    for config in configs:
        problem = _array_problem(config, pipeline)
        if problem is not None:
            raise ConfigError(f"launcher.array: {config.name}: {problem}")
    waiting = [config for config in configs if not _is_under_way(config)]
    if not waiting:
        print("every run is finished or already submitted")
        return EXIT_DONE
    preparations: dict[str, str] = {}
    for config in waiting:
        _preparation_job(config, pipeline, preparations)
    arrays = [_array(waiting, stage) for stage in pipeline]

    def record(array: Array, job: str) -> None:
        for task, (config, spec) in enumerate(zip(waiting, array.specs, strict=True)):
            run = RunFolder(run_directory_of(config))
            write_json(run.stage(spec.stage).submission, {"token": array.token, "job": f"{job}_{task}"})
        print(f"{array.specs[0].stage}: submitted as array {job} of {len(waiting)}; script {array.array_script.path}")

    chain(arrays, record=record, after_success_of=":".join(preparations.values()) or None)
    print(f"follow them with: orchestrator status {configs[0].output_dir}")
    return EXIT_DONE


def _array(configs: Sequence[RunConfig], stage: str) -> Array:
    specs = [job_spec(config, stage) for config in configs]
    name = f"sweep-{secrets.token_hex(4)}"
    folder = Path(configs[0].output_dir) / ".sweeps" / name
    script = render_array(
        specs,
        name=name,
        path=str(folder / f"{stage}.sbatch"),
        log_directory=str(folder),
        max_running=configs[0].launcher.array_max_running,
    )
    scripts = [render(config, stage) for config in configs]
    return Array(specs=specs, scripts=scripts, array_script=script, token=f"{name}.{stage}")


def _array_problem(config: RunConfig, pipeline: Sequence[str]) -> str | None:
    if config.launcher.kind != "slurm":
        return f"arrays need launcher=slurm; launcher is {config.launcher.kind}"
    if config.pipeline != pipeline:
        return f"its pipeline is {list(config.pipeline)}, the first run's {list(pipeline)}: an array needs one pipeline"
    if len(pipeline) > 1 and not config.cluster.requeue:
        return "a pipeline of several stages needs cluster.requeue=true in an array; leave out launcher.array"
    return None


def _is_under_way(config: RunConfig) -> bool:
    """Whether nothing is left to submit: the run is finished, or Slurm has one of its stages."""
    stages = [RunFolder(run_directory_of(config)).stage(name) for name in config.pipeline]
    return stages[-1].result.exists() or any(live_job(stage) is not None for stage in stages)


def _preparation_job(config: RunConfig, stages: Sequence[str], preparations: dict[str, str]) -> str | None:
    """The job that the first stage has to wait for: a live one, one of an earlier run, or a new one; None if none is
    needed.
    """
    run = RunFolder(run_directory_of(config))
    wanted = json.dumps(
        [
            config.model.base,
            config.seeds.split,
            *(data.model_dump(mode="json") for name in stages for data in data_sets_of(config.stages[name]).values()),
        ]
    )
    live = live_job(run.stage(PREPARATION))
    if live is not None:
        preparations[wanted] = live
    elif not needs_job(config, stages):
        return None
    elif wanted not in preparations:
        (preparations[wanted],) = submit_chain([_preparation(config, run)], record=partial(_record, run))
    return preparations[wanted]


def submit_preparation(config: RunConfig) -> int:
    """Submit the job that prepares the data of every stage; runs submitted meanwhile wait for it."""
    run = RunFolder(run_directory_of(config))
    job = live_job(run.stage(PREPARATION))
    if job is not None:
        print(f"{PREPARATION}: job {job} is already submitted; see `orchestrator status {run.root}`")
        return EXIT_DONE
    submit_chain([_preparation(config, run)], record=partial(_record, run))
    print(f"follow it with: orchestrator status {run.root}")
    return EXIT_DONE


def live_job(folder: StageFolder) -> str | None:
    """The stage's newest job if it is pending or running in Slurm, or Slurm gives no answer about it."""
    jobs = jobs_of(folder)
    if not jobs:
        return None
    facts = query(jobs[-1:])[jobs[-1]]
    return jobs[-1] if facts.state.phase in ("waiting", "running", "unknown") else None


def _stage(config: RunConfig, run: RunFolder, name: str) -> Stage:
    return Stage(spec=job_spec(config, name), script=render(config, name), token=_token(config, run, name))


def _preparation(config: RunConfig, run: RunFolder) -> Stage:
    run.stage(PREPARATION).result.unlink(missing_ok=True)
    spec = preparation_spec(config)
    return Stage(spec=spec, script=render_task(spec), token=_token(config, run, PREPARATION))


def _record(run: RunFolder, stage: Stage, job: str) -> None:
    write_json(run.stage(stage.spec.stage).submission, {"token": stage.token, "job": job})
    print(f"{stage.spec.stage}: submitted as job {job}; script {stage.script.path}", flush=True)


def _token(config: RunConfig, run: RunFolder, name: str) -> str:
    """The token of a submission, written to disk before Slurm is called, so that a killed client finds its job
    again.
    """
    file = run.stage(name).submission
    pending: dict[str, str | None] = read_json(file) if file.exists() else {}
    token = pending.get("token")
    if token is None or pending.get("job") is not None:
        token = f"{config.name}.{name}.{secrets.token_hex(6)}"
        write_json(file, {"token": token, "job": None})
    return token
