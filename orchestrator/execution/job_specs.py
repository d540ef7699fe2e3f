"""Turns a run's configuration into JobSpecs and scripts for the launchers. Must not import torch."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

from launchers import local, torchrun
from launchers.spec import ClusterSettings, JobSpec, Script
from orchestrator.config.run import RunConfig
from orchestrator.files.cache import cache_folder
from orchestrator.run_folder.folder import PREPARATION, RunFolder, run_directory_of, script_path


def job_spec(config: RunConfig, stage: str) -> JobSpec:
    """One stage of a resolved configuration as a job."""
    run = RunFolder(run_directory_of(config))
    folder = run.stage(stage)
    python = config.launcher.python or sys.executable
    return JobSpec(
        name=f"{config.name}-{stage}",
        stage=stage,
        command=(python, "-m", "orchestrator.worker", str(run.run), "--stage", stage),
        decide=(python, "-m", "orchestrator.run_state.attempts", str(run.root), stage),
        working_directory=str(run.root),
        script_path=str(script_path(config, stage)),
        stage_directory=str(folder.root),
        attempts_directory=str(folder.attempts),
        result_file=str(folder.result),
        stop_file=str(folder.stop),
        log_directory=str(folder.logs),
        nodes=config.cluster.nodes,
        processes_per_node=config.cluster.processes_per_node,
        python=python,
        environment=dict(config.cluster.environment),
        cluster=_settings(config),
        secrets_file=str(secrets_file(run.root)),
        single_process_direct=config.launcher.kind != "slurm" and not config.sharding.is_deepspeed,
    )


def preparation_spec(config: RunConfig) -> JobSpec:
    """One process without GPUs that prepares the data of every stage."""
    run = RunFolder(run_directory_of(config))
    folder = run.stage(PREPARATION)
    spec = job_spec(config, config.pipeline[0])
    examine = "orchestrator.preflight.main"
    return replace(
        spec,
        name=f"{config.name}-{PREPARATION}",
        stage=PREPARATION,
        command=(spec.python, "-m", examine, "prepare", str(run.run), "--result", str(folder.result)),
        script_path=str(folder.script),
        stage_directory=str(folder.root),
        attempts_directory=str(folder.attempts),
        result_file=str(folder.result),
        stop_file=str(folder.stop),
        log_directory=str(folder.logs),
        nodes=1,
        processes_per_node=1,
        cluster=_preparation_settings(config),
    )


def secrets_file(run_directory: Path) -> Path:
    """Where keys and tokens wait for a Slurm job: outside the run folder, readable only by the user."""
    name = hashlib.sha256(str(run_directory).encode()).hexdigest()[:16]
    return cache_folder() / "secrets" / f"{name}.sh"


def render(config: RunConfig, stage: str) -> Script:
    """The script of one stage under the configured launcher. Pure."""
    spec = job_spec(config, stage)
    match config.launcher.kind:
        case "local":
            return local.render(spec)
        case "torchrun":
            return torchrun.render(spec)
        case "slurm":
            from launchers import sbatch

            return sbatch.render(spec)


def render_scripts(config: RunConfig) -> list[Script]:
    """The script of every stage, and the helper that starts it over ssh if torchrun has several nodes. Pure."""
    scripts = [render(config, stage) for stage in config.pipeline]
    if config.launcher.kind == "torchrun" and config.cluster.nodes > 1:
        scripts += [torchrun.render_launch_all(job_spec(config, stage)) for stage in config.pipeline]
    return scripts


def _preparation_settings(config: RunConfig) -> ClusterSettings:
    """The site's settings without GPUs; a partition of its own has other nodes, to which its constraints do not apply."""
    prepare, settings = config.cluster.prepare, _settings(config)
    if prepare.partition is not None:
        settings = replace(settings, partition=prepare.partition, constraint=None, exclude=(), extra_sbatch=())
    return replace(
        settings,
        gpu_request="none",
        gpus_per_node=0,
        gpu_type=None,
        cpus_per_task=prepare.cpus_per_task or settings.cpus_per_task,
        memory=prepare.memory or settings.memory,
        time_limit=prepare.time_limit or settings.time_limit,
    )


def _settings(config: RunConfig) -> ClusterSettings:
    cluster, launcher = config.cluster, config.launcher
    return ClusterSettings(
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        gpus_per_node=cluster.gpus_per_node,
        gpu_request=cluster.gpu_request,
        gpu_type=cluster.gpu_type,
        cpus_per_task=cluster.cpus_per_task,
        memory=cluster.memory,
        time_limit=cluster.time_limit,
        setup_lines=cluster.setup_lines,
        container_command=cluster.container_command,
        interface=cluster.interface,
        exclude=cluster.exclude,
        extra_sbatch=cluster.extra_sbatch,
        requeue=cluster.requeue,
        stop_lead_seconds=cluster.stop_lead_seconds,
        scratch=cluster.scratch,
        max_preemptions=launcher.max_preemptions,
        max_failures=launcher.max_failures,
    )
