"""Plans a run: order, inputs, batch arithmetic, steps, bytes, scripts. `make_plan` is pure. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.architecture.base_model import Base
from orchestrator.architecture.deepspeed import deepspeed_dict
from orchestrator.architecture.kernels import kernel_fields
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.architecture.zero_buckets import with_zero_buckets
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.merging import MergeStage
from orchestrator.config.pipeline import inputs_of
from orchestrator.config.run import RunConfig, Stage, accumulation_steps, tunings_of
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.flops import flops_per_token
from orchestrator.estimate.memory import memory_forecast
from orchestrator.estimate.memory_records import MemoryForecast
from orchestrator.estimate.model_states import trainable_parameters
from orchestrator.machine.dtype import AS_CONFIGURED, NumberType, with_slowdown
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.plan_warnings import plan_warnings
from orchestrator.planning.records import Plan, StagePlan
from orchestrator.planning.stage_forecast import NO_FORECAST, epoch_steps, forecast_fields, shape_for
from orchestrator.run_folder.folder import RunFolder, run_directory_of, script_path
from orchestrator.schedule import learning_rate_at, total_steps, warmup_steps


def make_plan(
    config: RunConfig,
    *,
    base: Base,
    data: Mapping[str, DataFacts],
    notes: Sequence[str] = (),
    number_type: NumberType = AS_CONFIGURED,
) -> Plan:
    """The plan of a resolved configuration, from the facts about its base and data. Pure.

    `notes` come from its composition, `number_type` explains its dtype.
    """
    config = with_zero_buckets(config, base.architecture)
    run_directory = run_directory_of(config)
    stages = tuple(_stage_plan(config, name, base, data[name], run_directory) for name in config.pipeline)
    rates = [facts.probed for facts in data.values()]
    number_type = with_slowdown(number_type, [rate.slowdown for rate in rates if rate is not None])
    return Plan(
        name=config.name,
        run_directory=str(run_directory),
        launcher=config.launcher.kind,
        base=base.location,
        base_source=base.source,
        dtype=config.model.dtype,
        dtype_is_auto=number_type.is_auto,
        dtype_reason=number_type.reason,
        tuning=" then ".join(dict.fromkeys(tuning.method for tuning in tunings_of(config).values()))
        or config.tuning.method,
        quantization=config.quantization.scheme,
        sharding=config.sharding.strategy,
        nodes=config.cluster.nodes,
        processes_per_node=config.cluster.processes_per_node,
        stages=stages,
        warnings=(
            *([] if number_type.warning is None else [number_type.warning]),
            *plan_warnings(config, base, stages, data),
        ),
        notes=tuple(notes),
    )


def _stage_plan(config: RunConfig, name: str, base: Base, data: DataFacts, run_directory: Path) -> StagePlan:
    stage, config = config.stages[name], config.for_stage(name)
    files = RunFolder(run_directory).stage(name)
    facts = (
        _training_plan(config, stage, base, data) if isinstance(stage, TrainingStage) else _scoring_plan(config, stage)
    )
    return StagePlan(
        name=name,
        kind=stage.kind,
        input=", ".join(inputs_of(config, name)) or base.location,
        train_rows=data.train_rows,
        evaluation_rows=data.evaluation_rows,
        data_format=data.format,
        data_source=stage.data.train.path,
        packing=stage.data.packing,
        max_length=stage.data.max_length,
        parameters=None if base.architecture is None else count_parameters(base.architecture).total,
        script=str(script_path(config, name)),
        memory=_memory_forecast(config, stage, base),
        outputs=(str(files.artifact), str(files.result)),
        **facts,
    )


def _scoring_plan(config: RunConfig, stage: ScoringStage | MergeStage) -> dict[str, Any]:
    """A stage without an optimizer."""
    names = ("global_size", "accumulation_steps", "steps_per_epoch", "steps", "warmup_steps", "trainable_parameters")
    unknown = dict.fromkeys([*names, "flops_per_token", "attention", "loss_head", "deepspeed", *NO_FORECAST])
    return {**unknown, "micro_size": stage.micro_size, "world_size": config.world_size, "learning_rates": {}}


def _training_plan(config: RunConfig, stage: TrainingStage, base: Base, data: DataFacts) -> dict[str, Any]:
    per_epoch = epoch_steps(stage, data)
    steps = (
        stage.max_steps
        if per_epoch is None
        else total_steps(max_steps=stage.max_steps, epochs=stage.epochs, steps_per_epoch=per_epoch)
    )
    model = base.architecture
    return {
        "global_size": stage.batch.global_size,
        "micro_size": stage.batch.micro_size,
        "world_size": config.world_size,
        "accumulation_steps": accumulation_steps(config, stage),
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "warmup_steps": None if steps is None else warmup_steps(stage.schedule, steps),
        "learning_rates": {} if steps is None else _learning_rates(stage, steps),
        "trainable_parameters": None if model is None else trainable_parameters(model, config),
        "flops_per_token": None
        if model is None
        else flops_per_token(model, config, length=shape_for(stage, data).attended),
        **forecast_fields(config, stage, model, data, steps=steps),
        **kernel_fields(config, stage, model, has_liger=data.has_liger),
        "deepspeed": deepspeed_dict(config, stage),
    }


def _learning_rates(stage: TrainingStage, steps: int) -> dict[str, float]:
    points = {"0%": 1, "25%": max(1, steps // 4), "50%": max(1, steps // 2), "100%": steps}
    return {name: learning_rate_at(stage, step, steps) for name, step in points.items()}


def _memory_forecast(config: RunConfig, stage: Stage, base: Base) -> MemoryForecast | None:
    if base.architecture is None:
        return None
    return memory_forecast(base.architecture, config, stage, memory_gib=config.cluster.hardware.memory_gib)
