"""Where each adapter works: the one table, as data, and the sentences that refuse the rest. Must not import torch.

`benchmarks/adapters.py` runs the cells at two ranks; docs/adapters.md reports its results and the cells that were not
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.config.data import DataConfig
from orchestrator.config.model import ModelConfig, Nf4Quantization, NoQuantization
from orchestrator.config.rollout import RolloutConfig
from orchestrator.config.run import POLICY_KINDS, RunConfig, training_stages, tunings_of
from orchestrator.config.sharding import NoSharding, ZeroSharding
from orchestrator.config.tuning import (
    ADAPTER_TUNINGS,
    AdaloraTuning,
    AdapterTuning,
    Ia3Tuning,
    LoraTuning,
    LoreftTuning,
    OftTuning,
    PromptTuning,
)

ZERO = ("zero1", "zero2", "zero3")
NO_PACKING = "virtual tokens precede a row, and the documents after the first one would not see them"
NO_ENGINE = "that engine concatenates prompts, and this method cannot tell them apart"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one method cannot do; each entry is the reason given in the message."""

    shardings: Mapping[str, str]
    nf4: str | None = None
    packing: str | None = None
    checkpointing: str | None = None
    merge: str | None = None
    continuous: str | None = None
    """Why it cannot generate with `rollout.engine=continuous`."""
    stages: tuple[str, ...] = ("sft", "dpo", "evaluate", "merge")
    """Kinds of stages that support the method."""


LIMITS: Mapping[str, Limits] = {
    "lora": Limits(
        shardings={},
        stages=(
            "sft",
            "reward",
            "dpo",
            "grpo",
            "classify",
            "self_training",
            "evaluate",
            "interpolate",
            "soup",
            "merge",
        ),
    ),
    "ia3": Limits(shardings={}),
    "vera": Limits(shardings={}),
    "oft": Limits(shardings={}),
    "adalora": Limits(
        shardings=dict.fromkeys(ZERO, "ranks are allocated by gradients, which ZeRO has freed when the update is done")
    ),
    "prompt": Limits(
        shardings={},
        packing=NO_PACKING,
        continuous=NO_ENGINE,
        merge="embeddings before the text are not part of a weight",
    ),
    "prefix": Limits(
        shardings={},
        packing=NO_PACKING,
        continuous=NO_ENGINE,
        checkpointing="a recomputed layer is given no cache, and the prefix is one",
        merge="keys and values before the text are not part of a weight",
    ),
    "loreft": Limits(
        shardings={}, continuous=NO_ENGINE, merge="it changes hidden states at some positions, not weights"
    ),
}
PISSA = Limits(
    shardings={"zero3": "the base lies in shards where its principal part is sought, and that was not tested"},
    nf4="the residual would have to be quantised in turn",
    stages=("sft", "dpo", "evaluate", "merge"),
)
"""Limits of tuning=lora with init=pissa, in addition to LoRA's own."""


@dataclass(frozen=True, kw_only=True)
class AdapterSetting:
    """The facts of a run that the table refers to."""

    tuning: AdapterTuning
    quantization: NoQuantization | Nf4Quantization
    sharding: NoSharding | ZeroSharding
    model: ModelConfig
    kinds: Mapping[str, str]
    """Kind of each planned stage."""
    data: Mapping[str, DataConfig]
    """Data of each planned stage."""
    rollouts: Mapping[str, RolloutConfig]
    """Generation settings of each planned stage that generates."""
    followers: tuple[str, ...]
    """Stages that continue training an earlier one's artifact."""


def adapter_rule_problems(setting: AdapterSetting) -> list[str]:
    """Everything that the method cannot do in this run, one sentence each with what to type instead."""
    tuning = setting.tuning
    problems = [*_limit_problems(setting, LIMITS[tuning.method], f"tuning={tuning.method}")]
    match tuning:
        case LoraTuning():
            problems += _lora_problems(setting, tuning)
        case Ia3Tuning():
            unknown = sorted(set(tuning.feedforward_modules) - set(tuning.target_modules))
            if unknown:
                problems.append(
                    f"tuning.feedforward_modules: {', '.join(unknown)} must also be in tuning.target_modules"
                )
        case AdaloraTuning():
            problems += _adalora_problems(tuning)
        case LoreftTuning():
            problems += _loreft_problems(tuning)
        case OftTuning() if not tuning.use_cayley_neumann and setting.sharding.is_deepspeed:
            if setting.model.dtype == "bfloat16":
                problems.append(
                    "tuning.use_cayley_neumann: false solves for the rotation, and torch cannot do that in the 16 bits that "
                    "ZeRO holds it in; type tuning.use_cayley_neumann=true, or sharding=none"
                )
        case PromptTuning():
            problems += [
                f"stages.{name}.rollout.generate_size: tuning=prompt sees padding between its tokens and a shorter prompt, so "
                f"that prompts are answered one at a time; type stages.{name}.rollout.generate_size=1"
                for name, rollout in setting.rollouts.items()
                if rollout.generate_size > 1
            ]
        case _:
            pass
    return problems


def why_no_merge(tuning: AdapterTuning) -> str | None:
    """Why the adapter cannot be merged into the base; None if it can."""
    reason = LIMITS[tuning.method].merge
    return None if reason is None else f"tuning={tuning.method} leaves nothing to merge: {reason}"


def _limit_problems(setting: AdapterSetting, limits: Limits, what: str) -> Iterator[str]:
    strategy = setting.sharding.strategy
    if strategy in limits.shardings:
        free = [name for name in ("none", *ZERO) if name not in limits.shardings]
        yield f"sharding: {what} does not work with {strategy}: {limits.shardings[strategy]}; type sharding={free[-1]}"
    if limits.nf4 is not None and setting.quantization.is_4bit:
        yield f"quantization: {what} does not work with nf4: {limits.nf4}; type quantization=none"
    if limits.checkpointing is not None and setting.model.gradient_checkpointing:
        yield (
            f"model.gradient_checkpointing: {what} does not work with it: {limits.checkpointing}; type "
            "model.gradient_checkpointing=false"
        )
    for name, data in setting.data.items():
        if limits.packing is not None and data.packing != "none":
            yield f"stages.{name}.data.packing: {what}: {limits.packing}; type stages.{name}.data.packing=none"
    for name, rollout in setting.rollouts.items():
        if limits.continuous is not None and rollout.engine == "continuous":
            yield f"stages.{name}.rollout.engine: {what}: {limits.continuous}; type stages.{name}.rollout.engine=batch"
    for name, kind in setting.kinds.items():
        if kind == "merge" and limits.merge is not None:
            yield f"stages.{name}: {what} leaves nothing to merge: {limits.merge}; take {name} out of the pipeline"
        elif kind not in limits.stages:
            yield f"stages.{name}: a stage of kind {kind} does not support {what}; type tuning=lora"


def _lora_problems(setting: AdapterSetting, tuning: LoraTuning) -> Iterator[str]:
    if tuning.init == "loftq" and not setting.quantization.is_4bit:
        yield "tuning.init: loftq compensates for the rounding of nf4, and the base is not quantised; type quantization=nf4"
    if tuning.use_dora and setting.quantization.is_4bit and setting.sharding.shards_parameters:
        yield (
            "sharding: tuning.use_dora=true dequantises nf4 weights and replaces them, which ZeRO-3 does not support;  "
            "type sharding=zero2, or tuning.use_dora=false"
        )
    if not tuning.is_pissa:
        return
    yield from _limit_problems(setting, PISSA, f"tuning.init={tuning.init}")
    if tuning.use_dora:
        yield "tuning.use_dora: not with tuning.init=pissa, which was not tested with it; type tuning.use_dora=false"
    for name in setting.followers:
        yield (
            f"stages.{name}: tuning.init={tuning.init} begins with the base, and the stage before leaves an adapter of twice "
            f"the rank; type tuning.init=default, or stages.{name}.start_from=null"
        )


def _adalora_problems(tuning: AdaloraTuning) -> Iterator[str]:
    if tuning.rank >= tuning.initial_rank:
        yield (
            f"tuning.initial_rank: ranks fall from {tuning.initial_rank} to {tuning.rank} on average, so it must be greater; "
            f"type tuning.initial_rank={max(tuning.rank + 1, tuning.rank * 3 // 2)}"
        )
    if tuning.first_share + tuning.last_share >= 1:
        yield (
            f"tuning.first_share and tuning.last_share leave no step to allocate ranks in: {tuning.first_share:g} + "
            f"{tuning.last_share:g} is not below 1; type tuning.first_share=0.1 tuning.last_share=0.3"
        )


def _loreft_problems(tuning: LoreftTuning) -> Iterator[str]:
    if not tuning.first_positions and not tuning.last_positions:
        yield "tuning: first_positions and last_positions are both 0, so nothing is changed; type tuning.last_positions=7"
    if tuning.layers == ():
        yield "tuning.layers: no layer is changed; type tuning.layers=all"


def tuning_problems(config: RunConfig) -> list[str]:
    """Problems of the adapter in this run."""
    tuning = next(iter(tunings_of(config).values()), config.tuning)
    if not isinstance(tuning, ADAPTER_TUNINGS):
        return []
    planned = {name: config.stages[name] for name in config.pipeline if name in config.stages}
    before = [name for name, stage in planned.items() if stage.kind in POLICY_KINDS][:1]
    trained = training_stages(config)
    setting = AdapterSetting(
        tuning=tuning,
        quantization=config.quantization,
        sharding=config.sharding,
        model=config.model,
        kinds={name: stage.kind for name, stage in planned.items()},
        data={name: stage.data for name, stage in planned.items()},
        rollouts={name: stage.generation for name, stage in planned.items() if stage.generation is not None},
        followers=tuple(
            name for name in planned if name in trained and name not in before and trained[name].start_from is not None
        ),
    )
    return adapter_rule_problems(setting)


def stage_tuning_problems(config: RunConfig) -> list[str]:
    """Problems of the stages' tunings, alone and combined; a sentence that applies to several stages appears once."""
    tunings = tunings_of(config) or {"": config.tuning}
    problems: dict[str, None] = {}
    for name, tuning in tunings.items():
        is_own = name in config.stages and training_stages(config)[name].tuning is not None
        field = f"stages.{name}.tuning" if is_own else "tuning"
        if config.quantization.is_4bit and not tuning.is_adapter:
            problems[
                f"quantization: nf4 holds a frozen base and cannot be trained with {field}={tuning.method}; "
                f"type {field}=lora (QLoRA) or quantization=none"
            ] = None
        problems |= dict.fromkeys(tuning.problems(field))
    differing = [name for name, tuning in tunings.items() if tuning != next(iter(tunings.values()))]
    if differing and not all(not tuning.is_adapter for tuning in tunings.values()):
        methods = ", ".join(f"{name} {tuning.method}" for name, tuning in tunings.items())
        problems[
            f"stages.{differing[0]}.tuning: the stages are tuned differently ({methods}), and an adapter fits only the settings it was "
            "made with; whole models alone (full, freeze) may differ: set every stage's tuning to null, or tune whole models throughout"
        ] = None
    return list(problems)
