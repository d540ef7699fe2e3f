"""What a run will do: order, inputs, batch arithmetic, steps, bytes, scripts. `make_plan` is pure. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from orchestrator.architecture.base_model import Base, looks_like_folder
from orchestrator.architecture.deepspeed import deepspeed_dict
from orchestrator.architecture.kernels import kernel_fields
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.architecture.zero_buckets import sized
from orchestrator.config.alignment import PolicyStage, RewardSource
from orchestrator.config.base import Section
from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.config.evaluation import EvaluateStage, MergeStage, ScoringStage, SoupStage
from orchestrator.config.functions import FunctionSource
from orchestrator.config.pipeline import MODEL_PREFIX, STAGE_PREFIX, inputs_of, resolve_starts
from orchestrator.config.run import RunConfig, Stage, accumulation_steps, tunings_of
from orchestrator.config.training import TrainingStage
from orchestrator.data.sources.locate import DEMONSTRATIONS
from orchestrator.estimate.cost import CostPlan
from orchestrator.estimate.flops import flops_per_token
from orchestrator.estimate.memory import memory_forecast
from orchestrator.estimate.memory_records import MemoryForecast
from orchestrator.estimate.model_states import trainable_parameters
from orchestrator.estimate.row_lengths import PreparedFacts
from orchestrator.estimate.stage_time import CheckpointPlan, TimePlan
from orchestrator.estimate.step_time import Rate
from orchestrator.machine.dtype import AS_CONFIGURED, NumberType, with_slowdown
from orchestrator.planning.measured_speed import Measured
from orchestrator.planning.plan_warnings import plan_warnings
from orchestrator.planning.stage_forecast import NOTHING, epoch_steps, forecast_fields, shape_for
from orchestrator.schedule import learning_rate_factor, total_steps, warmup_steps

AnyFunction = TypeVar("AnyFunction", bound=FunctionSource)
KEYWORDS = (*DEMONSTRATIONS, "auto", "none")


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a look at a stage's data, and at runs beside it, found; rows are None where only a download can tell."""

    train_rows: int | None
    evaluation_rows: int | None
    format: str | None
    bytes: int
    prepared: PreparedFacts | None = None
    """None where the rows are not prepared yet."""
    measured: tuple[Measured, str] | None = None
    """The newest measurement that holds for the stage, and the run that made it."""
    templated: str | None = None
    """What to type where prompts go past the base's chat template; None where they go through it, or there is none."""
    probed: Rate | None = None
    """What this machine's processor was measured to compute; None where the ranks run elsewhere, or nothing was measured."""
    has_liger: bool = False
    """Whether Liger's kernels are installed where the plan is made."""


class StagePlan(Section):
    """One stage in numbers."""

    name: str
    kind: str
    input: str
    train_rows: int | None
    """Rows after the held-out ones were taken; None where only a download or packing can tell."""
    evaluation_rows: int | None
    data_format: str | None
    data_source: str
    packing: str
    max_length: int
    global_size: int | None
    """None, like all that follows from it, for a stage that trains nothing."""
    micro_size: int
    world_size: int
    accumulation_steps: int | None
    steps_per_epoch: int | None
    steps: int | None
    warmup_steps: int | None
    learning_rates: dict[str, float]
    """Rate at 0, 25, 50 and 100 % of the steps."""
    trainable_parameters: int | None
    parameters: int | None
    memory: MemoryForecast | None
    """None where the base's facts can be known only after a download."""
    flops_per_token: float | None
    """Useful ones, at the documents' lengths."""
    tokens: int | None
    """Of one epoch, as is `trained_tokens`; None before the data is prepared."""
    trained_tokens: int | None
    time: TimePlan | None
    cost: CostPlan | None
    checkpointing: CheckpointPlan | None
    attention: str | None
    """What computes it, in words, as the log will tell; None, like `loss_head`, for a stage that trains nothing."""
    loss_head: str | None
    deepspeed: dict[str, Any] | None
    script: str
    outputs: tuple[str, ...]


class Plan(Section):
    """A run in numbers; nothing was submitted or written to make it."""

    name: str
    run_directory: str
    launcher: Literal["local", "torchrun", "slurm"]
    base: str
    base_source: str
    dtype: Literal["float32", "bfloat16"]
    dtype_is_auto: bool
    dtype_reason: str
    tuning: str
    quantization: str
    sharding: str
    nodes: int
    processes_per_node: int
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Every value of a preset that gave way to what was typed, or to the number of ranks. Frozen plans of older runs have none."""


def resolve(config: RunConfig, working_folder: Path) -> RunConfig:
    """The same configuration with absolute paths, so that no rank depends on the user's working folder."""
    config = resolve_starts(config)
    stages = {name: _resolved_stage(stage, working_folder) for name, stage in config.stages.items()}
    base = config.model.base
    if looks_like_folder(base):
        base = str(_absolute(base, working_folder))
    return config.model_copy(
        update={
            "output_dir": str(_absolute(config.output_dir, working_folder)),
            "stages": stages,
            "model": config.model.model_copy(update={"base": base}),
        }
    )


def make_plan(
    config: RunConfig,
    *,
    base: Base,
    data: Mapping[str, DataFacts],
    notes: Sequence[str] = (),
    number_type: NumberType = AS_CONFIGURED,
) -> Plan:
    """The plan of a resolved configuration, from what is known of its base and data. Pure.

    `notes` are of its composition, `number_type` says how its dtype came about.
    """
    config = sized(config, base.architecture)
    run_directory = run_directory_of(config)
    stages = tuple(_stage_plan(config, name, base, data[name], run_directory) for name in config.pipeline)
    rates = [facts.probed for facts in data.values()]
    number_type = with_slowdown(number_type, [rate.slowdown for rate in rates if rate is not None])
    return Plan(
        name=config.name,
        run_directory=str(run_directory),
        launcher=config.launcher.kind,
        base=base.place,
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


def run_directory_of(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name


def script_path(config: RunConfig, stage: str) -> Path:
    suffix = "sbatch" if config.launcher.kind == "slurm" else "sh"
    return run_directory_of(config) / "scripts" / f"{stage}.{suffix}"


def _stage_plan(config: RunConfig, name: str, base: Base, data: DataFacts, run_directory: Path) -> StagePlan:
    stage, config = config.stages[name], config.for_stage(name)
    facts = _training_plan(config, stage, base, data) if isinstance(stage, TrainingStage) else _scoring_plan(stage)
    return StagePlan(
        name=name,
        kind=stage.kind,
        input=", ".join(inputs_of(config, name)) or base.place,
        train_rows=data.train_rows,
        evaluation_rows=data.evaluation_rows,
        data_format=data.format,
        data_source=stage.data.train.path,
        packing=stage.data.packing,
        max_length=stage.data.max_length,
        parameters=None if base.architecture is None else count_parameters(base.architecture).total,
        script=str(script_path(config, name)),
        memory=_memory_forecast(config, stage, base),
        outputs=(str(run_directory / name / "artifact"), str(run_directory / name / "result.json")),
        **facts,
    )


def _scoring_plan(stage: ScoringStage | MergeStage) -> dict[str, Any]:
    """A stage without an optimizer runs in one process."""
    names = ("global_size", "accumulation_steps", "steps_per_epoch", "steps", "warmup_steps", "trainable_parameters")
    unknown = dict.fromkeys([*names, "flops_per_token", "attention", "loss_head", "deepspeed", *NOTHING])
    return {**unknown, "micro_size": stage.micro_size, "world_size": 1, "learning_rates": {}}


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
    return {
        name: stage.optimizer.lr * learning_rate_factor(stage.schedule, step, steps) for name, step in points.items()
    }


def _memory_forecast(config: RunConfig, stage: Stage, base: Base) -> MemoryForecast | None:
    if base.architecture is None:
        return None
    return memory_forecast(base.architecture, config, stage, memory_gib=config.cluster.hardware.memory_gib)


def _resolved_stage(stage: Stage, working_folder: Path) -> Stage:
    data = stage.data
    update = {
        "train": _resolved_source(data.train, working_folder),
        "mix": tuple(_resolved_source(source, working_folder) for source in data.mix),
        "eval": data.eval.model_copy(update={"path": _resolved_path(data.eval.path, working_folder)}),
        "chat_template": None if data.chat_template is None else str(_absolute(data.chat_template, working_folder)),
    }
    changes: dict[str, object] = {"data": DataConfig.model_copy(data, update=update)}
    if isinstance(stage, TrainingStage):
        functions = tuple(_resolved_function(function, working_folder) for function in stage.metrics.functions)
        changes["metrics"] = stage.metrics.model_copy(update={"functions": functions})
        changes["callbacks"] = tuple(_resolved_function(function, working_folder) for function in stage.callbacks)
    if isinstance(stage, PolicyStage | EvaluateStage):
        changes["rewards"] = tuple(_resolved_reward(reward, working_folder) for reward in stage.rewards)
    if isinstance(stage, ScoringStage):
        changes["sets"] = {
            name: entry.model_copy(update={"path": _resolved_path(entry.path, working_folder)})
            for name, entry in stage.sets.items()
        }
    if isinstance(stage, SoupStage):
        changes["members"] = tuple(
            member if member.startswith(STAGE_PREFIX) else str(_absolute(member, working_folder))
            for member in stage.members
        )
    return stage.model_copy(update=changes)


def _resolved_reward(reward: RewardSource, working_folder: Path) -> RewardSource:
    """Files of functions and folders of models become absolute."""
    if not reward.source.startswith(MODEL_PREFIX):
        return _resolved_function(reward, working_folder)
    folder = _absolute(reward.source.removeprefix(MODEL_PREFIX), working_folder)
    return reward.model_copy(update={"source": f"{MODEL_PREFIX}{folder}"})


def _resolved_function(function: AnyFunction, working_folder: Path) -> AnyFunction:
    """A user's file becomes absolute; the names of built-in functions stay."""
    if ".py:" not in function.source:
        return function
    file, _, name = function.source.rpartition(":")
    return function.model_copy(update={"source": f"{_absolute(file, working_folder)}:{name}"})


def _resolved_source(source: SourceConfig, working_folder: Path) -> SourceConfig:
    return source.model_copy(update={"path": _resolved_path(source.path, working_folder)})


def _resolved_path(path: str, working_folder: Path) -> str:
    """Files become absolute; keywords and hub ids (owner/name that is no file) stay."""
    if path in KEYWORDS:
        return path
    absolute = _absolute(path, working_folder)
    is_file_like = (
        absolute.exists() or absolute.suffix or path.startswith((".", "/", "~")) or any(c in path for c in "*?[")
    )
    return str(absolute) if is_file_like or path.count("/") != 1 else path


def _absolute(path: str, working_folder: Path) -> Path:
    return Path(working_folder, Path(path).expanduser()).resolve()
