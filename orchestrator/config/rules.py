"""The rules across the fields of a configuration; every broken one is reported at once. Must not import torch."""

from __future__ import annotations

import json

from pydantic import ValidationError

from orchestrator.config.base import JsonValue
from orchestrator.config.pipeline import resolve_starts
from orchestrator.config.run import (
    RESERVED_STAGE_NAMES,
    RunConfig,
    fitting_micro_size,
    training_pipeline,
    training_stages,
    tunings_of,
)
from orchestrator.config.sharding import ZeroSharding
from orchestrator.config.study import pause_problems, study_problems
from orchestrator.config.training import TrainingStage
from orchestrator.config.tuning_rules import stage_tuning_problems, tuning_problems
from orchestrator.config.validation_messages import problem_sentences
from orchestrator.errors import ConfigError
from orchestrator.text.plurals import counted


def parse(values: dict[str, JsonValue]) -> RunConfig:
    """Check types, ranges and rules; raise ConfigError with every problem."""
    config = parse_types(values)
    problems = rule_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def parse_types(values: dict[str, JsonValue]) -> RunConfig:
    """Check types and ranges; raise ConfigError with every problem."""
    try:
        return RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(problem_sentences(error, values, RunConfig)) from None


def rule_problems(config: RunConfig) -> list[str]:
    """One sentence for every broken rule across fields."""
    stages, launcher = training_pipeline(config), config.launcher.kind
    studied = study_problems(config.study, stages, launcher=launcher) + pause_problems(stages, launcher=launcher)
    methods = _method_problems(config) + tuning_problems(config)
    return _pipeline_problems(config) + _batch_problems(config) + methods + studied


def _pipeline_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    if not config.pipeline:
        problems.append("pipeline: no stage to run; add an experiment, such as +experiment=llama_lora")
    if len(set(config.pipeline)) != len(config.pipeline):
        problems.append(f"pipeline: a stage appears twice in {list(config.pipeline)}")
    for name in config.pipeline:
        if name not in config.stages:
            problems.append(f"pipeline: {name} has no entry under stages; there are {sorted(config.stages)}")
    problems += [
        f"stages.{name}: the run folder itself uses this name; choose another"
        for name in config.stages
        if name in RESERVED_STAGE_NAMES
    ]
    for name, stage in training_stages(config).items():
        if stage.max_steps is None and stage.epochs is None:
            problems.append(f"stages.{name}: both max_steps and epochs are null; set one of them")
        if stage.early_stopping is not None and stage.evaluate_every_steps is None:
            problems.append(
                f"stages.{name}.early_stopping: it needs evaluations during training, and there are none; type "
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
                f"{stage.batch.micro_size} x ({counted(config.cluster.nodes, 'node')} x "
                f"{counted(config.cluster.processes_per_node, 'process', 'processes')}) = {per_pass}; {stage.batch.global_size} / {per_pass} = "
                f"{stage.batch.global_size / per_pass:.3g}; try {_smaller(name, stage, world)}stages.{name}.batch.global_size={allowed}"
            )
    problems += [
        f"stages.{name}.data.tokens_per_batch: a micro-batch is one batch of the budget; type stages.{name}.batch.micro_size=1"
        for name, stage in training_stages(config).items()
        if stage.data.tokens_per_batch is not None and stage.batch.micro_size != 1
    ]
    return problems


def _smaller(name: str, stage: TrainingStage, ranks: int) -> str:
    """Advice that keeps the global batch, and with it the result; empty if the ranks cannot share it at all."""
    fitting = fitting_micro_size(
        global_size=stage.batch.global_size, micro_size=stage.batch.micro_size, world_size=ranks
    )
    return "" if fitting is None else f"stages.{name}.batch.micro_size={fitting}, or "


def _method_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    problems += stage_tuning_problems(config)
    planned = {name: stage for name, stage in resolve_starts(config).stages.items() if name in config.pipeline}
    last_tuning = [config.tuning, *tunings_of(config).values()][-1]
    for name, stage in planned.items():
        problems += [*stage.problems(name, ranks=config.world_size), *stage.tuning_problems(name, last_tuning)]
    sharding = config.sharding
    if sharding.offloads_parameters and not sharding.shards_parameters:
        problems.append(f"sharding.offload_parameters: only zero3 can offload parameters, not {sharding.strategy}")
    problems += _zero_plus_problems(config)
    problems += _compile_problems(config)
    if config.model.checkpoint_every > 1 and not config.model.gradient_checkpointing:
        problems.append(
            f"model.checkpoint_every: {config.model.checkpoint_every}, but no layer is recomputed; type "
            "model.gradient_checkpointing=true, or model.checkpoint_every=1"
        )
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        problems.append(
            "model.attention: flash_attention_2 needs 16 bits; type model.dtype=bfloat16 or model.attention=sdpa"
        )
    return problems


def _compile_problems(config: RunConfig) -> list[str]:
    """Settings with which torch.compile has not been shown to work."""
    if not config.model.compile:
        return []
    reasons = {
        "sharding=zero3 gathers weights in the middle of a layer": config.sharding.shards_parameters,
        "tuning=loreft hooks into layers": config.tuning.is_reft,
        "quantization=nf4 dequantises weights in kernels of its own": config.quantization.is_4bit,
    }
    problems = [f"model.compile: {why}; type model.compile=false" for why, is_so in reasons.items() if is_so]
    return problems + [
        f"model.compile: stages.{name} generates, and every new length would be compiled; type model.compile=false"
        for name in config.pipeline
        if config.stages[name].reads_prompts
    ]


def _zero_plus_problems(config: RunConfig) -> list[str]:
    """ZeRO++ needs zero3, its node size must divide the ranks, and its 8- and 4-bit kernels exist for GPUs only."""
    sharding = config.sharding
    if not isinstance(sharding, ZeroSharding):
        return []
    plus = {
        "hpz_partition_size": sharding.hpz_partition_size is not None,
        "quantized_weights": sharding.quantized_weights,
        "quantized_gradients": sharding.quantized_gradients,
    }
    problems = [
        f"sharding.{key}: ZeRO++ is a part of zero3, not of {sharding.strategy}; type sharding=zero3"
        for key, is_on in plus.items()
        if is_on and not sharding.shards_parameters
    ]
    size = sharding.hpz_partition_size
    if size is not None and config.world_size % size:
        problems.append(
            f"sharding.hpz_partition_size: {size} does not divide the {config.world_size} ranks; type "
            f"sharding.hpz_partition_size={config.cluster.processes_per_node}, the ranks of a node"
        )
    problems += [
        f"sharding.{key}: its kernels need GPUs, and cluster.device is cpu; set it to false"
        for key in ("quantized_weights", "quantized_gradients")
        if plus[key] and config.cluster.device == "cpu"
    ]
    return problems
