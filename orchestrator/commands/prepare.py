"""The verb prepare. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.commands.plan_from_overrides import planned_run
from orchestrator.commands.preflight_process import run_preflight
from orchestrator.config.run import RunConfig
from orchestrator.execution.job_specs import render
from orchestrator.execution.run_pipeline import freeze_run
from orchestrator.execution.slurm_submission import submit_preparation
from orchestrator.planning.inspect_inputs import validate_data
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config


def prepare(arguments: Sequence[str]) -> int:
    """Tokenise and pack the data of every stage, here or in a Slurm job without GPUs; a run then only maps it."""
    config, planned = planned_run(arguments)
    if config.launcher.kind == "slurm":
        freeze_run(config, planned, [render(config, stage) for stage in config.pipeline])
    return _prepare(config)


def prepare_run(run: RunFolder) -> int:
    """As `prepare`, for the frozen configuration of a run."""
    return _prepare(load_config(run))


def _prepare(config: RunConfig) -> int:
    if config.launcher.kind == "slurm":
        return submit_preparation(config)
    validate_data(config)
    return run_preflight("prepare", config, {})
