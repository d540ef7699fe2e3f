"""The whole configuration of a run, and the rules across its sections; no defaults, no torch."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field, ValidationError

from orchestrator.config.alignment import DpoStage, PolicyStage, RewardStage
from orchestrator.config.base import Identifier, JsonValue, NaturalInt, Section, Text
from orchestrator.config.classification import (
    CLASSIFIER_KINDS,
    ClassifyStage,
    SelfTrainingStage,
    classification_problems,
)
from orchestrator.config.ends import EvaluateStage, MergeStage
from orchestrator.config.model import (
    WHOLE_MODEL_TUNINGS,
    FreezeTuning,
    FullTuning,
    LoraTuning,
    ModelConfig,
    Nf4Quantization,
    NoQuantization,
    NoSharding,
    ZeroSharding,
)
from orchestrator.config.problems import problem_sentences
from orchestrator.config.sites import ClusterConfig, LauncherConfig, NoTracking, WandbTracking
from orchestrator.config.stages import SftStage, TrainingStage
from orchestrator.errors import ConfigError

Tuning = Annotated[FullTuning | FreezeTuning | LoraTuning, Field(discriminator="method")]
Quantization = Annotated[NoQuantization | Nf4Quantization, Field(discriminator="scheme")]
Sharding = NoSharding | ZeroSharding
Tracking = Annotated[WandbTracking | NoTracking, Field(discriminator="kind")]
Stage = Annotated[
    SftStage | RewardStage | DpoStage | PolicyStage | ClassifyStage | SelfTrainingStage | EvaluateStage | MergeStage,
    Field(discriminator="kind"),
]
POLICY_KINDS = ("sft", "dpo", "grpo")
"""Stages that make a policy: something that a later stage can go on from."""
RESERVED_STAGE_NAMES = ("prepare", "scripts", "superseded", "export")


class Seeds(Section):
    """Two kinds of luck, kept apart (2002.06305)."""

    weights: NaturalInt
    """Seed of new weights (adapters, heads) and of dropout."""
    data: NaturalInt
    """Seed of the order of the rows."""


class RunConfig(Section):
    """Everything that decides what a run does."""

    name: Identifier
    """The run folder is output_dir/name."""
    seed: NaturalInt
    seeds: Seeds
    output_dir: Text
    pipeline: tuple[str, ...]
    """Stages in order."""
    stages: dict[str, Stage]
    model: ModelConfig
    tuning: Tuning
    quantization: Quantization
    sharding: Annotated[Sharding, Field(discriminator="strategy")]
    cluster: ClusterConfig
    launcher: LauncherConfig
    tracking: Tracking

    @property
    def world_size(self) -> int:
        return self.cluster.nodes * self.cluster.processes_per_node


def training_stages(config: RunConfig) -> dict[str, TrainingStage]:
    """The stages of the pipeline that train, by name."""
    stages = {name: stage for name, stage in config.stages.items() if name in config.pipeline}
    return {name: stage for name, stage in stages.items() if isinstance(stage, TrainingStage)}


def has_new_heads(config: RunConfig) -> bool:
    """Whether every stage that trains puts a new head on the model, which is trained whatever `tuning` says."""
    kinds = [config.stages[name].kind for name in training_stages(config)]
    return bool(kinds) and all(kind in ("reward", *CLASSIFIER_KINDS) for kind in kinds)


def accumulation_steps(config: RunConfig, stage: TrainingStage) -> int:
    """Micro-batches of one rank in one optimizer step; the rule `batch_problems` makes it exact."""
    return stage.batch.global_size // (stage.batch.micro_size * config.world_size)


def parse(values: dict[str, JsonValue]) -> RunConfig:
    """Types, ranges and rules; raises ConfigError with every problem."""
    config = parse_types(values)
    problems = rule_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def parse_types(values: dict[str, JsonValue]) -> RunConfig:
    """Types and ranges; raises ConfigError with every problem."""
    try:
        return RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(problem_sentences(error, values, RunConfig)) from None


def rule_problems(config: RunConfig) -> list[str]:
    """One sentence for every rule across fields that does not hold."""
    return _pipeline_problems(config) + _batch_problems(config) + _method_problems(config)


def _pipeline_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    if not config.pipeline:
        problems.append("pipeline: no stage to run; add an experiment, such as +experiment=llama_lora")
    if len(set(config.pipeline)) != len(config.pipeline):
        problems.append(f"pipeline: a stage stands twice in {list(config.pipeline)}")
    for name in config.pipeline:
        if name not in config.stages:
            problems.append(f"pipeline: {name} has no entry under stages; there are {sorted(config.stages)}")
    problems += [
        f"stages.{name}: this name belongs to the run folder itself; take another one"
        for name in config.stages
        if name in RESERVED_STAGE_NAMES
    ]
    for name, stage in training_stages(config).items():
        if stage.max_steps is None and stage.epochs is None:
            problems.append(f"stages.{name}: both max_steps and epochs are null; set one of them")
        if stage.early_stopping is not None and stage.evaluate_every_steps is None:
            problems.append(
                f"stages.{name}.early_stopping: it judges evaluations on the way, and there are none; type "
                f"stages.{name}.evaluate_every_steps=50"
            )
        if stage.early_stopping is not None and stage.data.eval.path == "none":
            problems.append(
                f"stages.{name}.early_stopping: there are no held-out rows; type stages.{name}.data.eval.path=auto"
            )
    return problems


def _batch_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    world = config.world_size
    for name, stage in training_stages(config).items():
        per_pass = stage.batch.micro_size * world
        if stage.batch.global_size % per_pass:
            allowed = max(per_pass, stage.batch.global_size // per_pass * per_pass)
            problems.append(
                f"stages.{name}.batch: global_size {stage.batch.global_size} is not a multiple of micro_size x ranks = "
                f"{stage.batch.micro_size} x ({config.cluster.nodes} nodes x {config.cluster.processes_per_node} "
                f"processes) = {per_pass}; {stage.batch.global_size} / {per_pass} = "
                f"{stage.batch.global_size / per_pass:.3g}; try stages.{name}.batch.global_size={allowed}"
            )
    problems += [
        f"stages.{name}.data.tokens_per_batch: a micro-batch is one batch of the budget; type stages.{name}.batch.micro_size=1"
        for name, stage in training_stages(config).items()
        if stage.data.tokens_per_batch is not None and stage.batch.micro_size != 1
    ]
    return problems


def _method_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    if isinstance(config.quantization, Nf4Quantization) and isinstance(config.tuning, WHOLE_MODEL_TUNINGS):
        problems.append(
            f"quantization: nf4 holds a frozen base and cannot be trained with tuning={config.tuning.method}; "
            "type tuning=lora (QLoRA) or quantization=none"
        )
    tuning = config.tuning
    if isinstance(tuning, FreezeTuning) and None not in (tuning.unfreeze_every_steps, tuning.unfreeze_every_epochs):
        problems.append(
            "tuning: unfreeze_every_steps and unfreeze_every_epochs say the same thing twice; set one to null"
        )
    planned = {name: stage for name, stage in config.stages.items() if name in config.pipeline}
    problems += [sentence for name, stage in planned.items() for sentence in _stage_problems(config, name, stage)]
    sharding = config.sharding
    if isinstance(sharding, ZeroSharding) and sharding.offload_parameters != "none" and sharding.strategy != "zero3":
        problems.append(f"sharding.offload_parameters: only zero3 can offload parameters, not {sharding.strategy}")
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        problems.append(
            "model.attention: flash_attention_2 needs 16 bits; type model.dtype=bfloat16 or model.attention=sdpa"
        )
    return problems


def _stage_problems(config: RunConfig, name: str, stage: Stage) -> list[str]:
    """What a stage of preference or policy optimisation, or of the end, cannot do."""
    field = f"stages.{name}"
    problems: list[str] = []
    if isinstance(stage, ClassifyStage | SelfTrainingStage):
        problems += classification_problems(field, stage)
    if isinstance(stage, DpoStage) and stage.label_smoothing and stage.loss != "dpo":
        problems.append(f"{field}.label_smoothing: only loss=dpo has it, not {stage.loss}; set it to 0")
    if isinstance(stage, PolicyStage):
        completions = stage.rollout.prompts * stage.rollout.group_size
        if completions % stage.batch.global_size:
            problems.append(
                f"{field}.rollout: prompts x group_size = {stage.rollout.prompts} x {stage.rollout.group_size} = {completions} "
                f"completions is not a multiple of batch.global_size = {stage.batch.global_size}"
            )
        if stage.rollout.group_size < 2:
            problems.append(
                f"{field}.rollout.group_size: advantages compare completions of one prompt; at least 2, not 1"
            )
        if stage.rollout.prompts % config.world_size:
            problems.append(
                f"{field}.rollout.prompts: {stage.rollout.prompts} prompts cannot be shared by {config.world_size} ranks evenly"
            )
        if stage.data.packing != "none":
            problems.append(f"{field}.data.packing: prompts are not packed; set packing=none, not {stage.data.packing}")
    if isinstance(stage, MergeStage) and isinstance(config.tuning, WHOLE_MODEL_TUNINGS):
        problems.append(
            f"{field}: tuning={config.tuning.method} leaves no adapter to merge; take {name} out of the pipeline"
        )
    return problems
