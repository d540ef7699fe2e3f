"""Settles what a configuration leaves to the plan (`auto`), and lists what else would fit. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.architecture.base_model import Base
from orchestrator.composition.compose import Composed, presets
from orchestrator.config.autos import AUTO
from orchestrator.config.base import flatten
from orchestrator.config.run import Quantization, RunConfig, Sharding
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.machine.this_machine import this_machine
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.processor_speed import with_speeds
from orchestrator.planning.records import StagePlan
from orchestrator.planning.settings_search import (
    Advice,
    Axes,
    Judge,
    Judgement,
    Option,
    advise,
    axes_of,
    nearest_changes,
)
from orchestrator.run_folder.folder import RunFolder, run_directory_of
from orchestrator.run_state.frozen import read_config

SIMPLE_FIRST = ("none", "zero1", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The presets that can be chosen, by name, from simple to involved."""

    shardings: Mapping[str, Sharding]
    quantizations: Mapping[str, Quantization]


def resolve_auto_overrides(composed: Composed, config_directory: Path | None) -> list[str]:
    """An override for every `auto`: as frozen in the run folder, else as the search finds it."""
    config = resolve(composed.config, Path.cwd())
    frozen = _frozen_words(config, composed.autos)
    if frozen is not None:
        return frozen
    machine = this_machine(config.cluster.environment)
    config = as_seen(config, machine, config_directory, assumes_speed=True)
    base, data = inspect_inputs(config)
    data = with_speeds(config, machine, base, data, may_measure=True)
    choices = choices_of(config, config_directory)
    axes = _open_axes(axes_of(config, shardings=choices.shardings, quantizations=choices.quantizations), composed)
    advice = found_advice(config, axes, judge_of(base, data), choices)
    if advice.best is None:
        raise ConfigError(
            [f"{', '.join(composed.autos)}: auto finds no setting that fits", *nearest_sentences(advice, config)]
        )
    wanted = tuple(composed.autos)
    return [override for override in advice.best.overrides() if override.split("=")[0] in wanted]


def smaller_settings(config: RunConfig, stage: str, *, number: int = 3) -> list[str]:
    """Overrides that reduce a stage's memory at the same global batch, the fastest first."""
    machine = this_machine(config.cluster.environment)
    config = as_seen(config, machine, None, assumes_speed=True)
    base, data = inspect_inputs(config)
    data = with_speeds(config, machine, base, data, may_measure=False)
    choices = choices_of(config, None)
    axes = axes_of(config, shardings=choices.shardings, quantizations=choices.quantizations)
    judge = judge_of(base, data)
    now = judge(config)[stage].high_gib
    options = advise(config, axes, judge).options
    smaller = sorted((option for option in options if option.high_gib < now), key=lambda option: option.seconds)
    return [" ".join(_changed_words(option, config)) for option in smaller[:number]]


def found_advice(config: RunConfig, axes: Axes, judge: Judge, choices: Presets) -> Advice:
    """The advice, with the nearest changes if nothing fits."""
    advice = advise(config, axes, judge)
    if advice.best is not None:
        return advice
    nf4 = next((known for known in choices.quantizations.values() if known.scheme == "nf4"), None)
    whole = axes_of(config, shardings=choices.shardings, quantizations=choices.quantizations)
    wider = advise(config, whole, judge).best
    if wider is not None:
        return replace(advice, nearest=(" ".join(wider.overrides()),))
    return advice if nf4 is None else replace(advice, nearest=nearest_changes(config, whole, judge, nf4=nf4))


def judge_of(base: Base, data: Mapping[str, DataFacts]) -> Judge:
    """Evaluate settings by the plan itself. Measurements hold only for their own setting, so rates are compared by the
    hardware table.
    """
    unmeasured = {name: replace(facts, measured=None) for name, facts in data.items()}

    def judge(config: RunConfig) -> dict[str, Judgement]:
        planned = make_plan(config, base=base, data=unmeasured)
        return {stage.name: judgement(stage) for stage in planned.stages if stage.global_size is not None}

    return judge


def judgement(stage: StagePlan) -> Judgement:
    """The forecast of a planned stage; ConfigError if memory or time cannot be computed."""
    memory, time = stage.memory, stage.time
    if memory is None or memory.verdict is None:
        raise ConfigError(
            f"stages.{stage.name}: what fits is unknown without the memory of a device and the configuration of the base; type for "
            "example hardware@cluster.hardware=h100, or cluster.hardware.memory_gib=80"
        )
    if time is None or time.step_seconds is None:
        raise ConfigError(f"stages.{stage.name}: {'the base is unknown' if time is None else time.basis}")
    return Judgement(
        verdict=memory.verdict,
        low_gib=memory.low,
        high_gib=memory.high,
        node_gib=memory.node_gib,
        step_seconds=time.step_seconds,
        steps=stage.steps or 1,
    )


def choices_of(config: RunConfig, config_directory: Path | None) -> Presets:
    """The presets of the configuration's folders; the configuration's own sharding with its current values."""
    sharding = TypeAdapter[Any](Sharding)
    found = {
        name: sharding.validate_python(content)
        for name, content in presets("sharding", config_directory).items()
        if content.get("strategy") != AUTO
    }
    names = sorted(
        found, key=lambda name: (SIMPLE_FIRST.index(name) if name in SIMPLE_FIRST else len(SIMPLE_FIRST), name)
    )
    if config.world_size == 1:  # a single rank has nobody to share with
        names = [name for name in names if not found[name].is_deepspeed or _offloads(found[name])]
    ours = {name: config.sharding if _alike(found[name], config.sharding) else found[name] for name in names}
    quantization = TypeAdapter[Any](Quantization)
    quantizations = {
        name: quantization.validate_python(content)
        for name, content in presets("quantization", config_directory).items()
    }
    return Presets(shardings=ours, quantizations=quantizations)


def nearest_sentences(advice: Advice, config: RunConfig) -> list[str]:
    least = min((option.high_gib for option in advice.options), default=None)
    room = config.cluster.hardware.memory_gib
    sentences = [] if least is None else [f"every setting needs at least {least:.1f} GiB, a device has {room:.1f} GiB"]
    hosts = min((option.node_gib for option in advice.options), default=0.0)
    if config.cluster.node_memory_gib is not None and hosts > config.cluster.node_memory_gib:
        sentences.append(f"a node's host needs at least {hosts:.0f} GiB, it has {config.cluster.node_memory_gib:g}")
    sentences += [f"this would fit: {overrides}" for overrides in advice.nearest]
    return (
        sentences
        if advice.nearest
        else [*sentences, "no single change of nodes, quantization or max_length makes it fit"]
    )


def _changed_words(option: Option, config: RunConfig) -> list[str]:
    """The overrides of an option that differ from the configuration."""
    own = {
        "model.gradient_checkpointing": str(config.model.gradient_checkpointing).lower(),
        "quantization": config.quantization.scheme,
        **{f"stages.{name}.batch.micro_size": str(_micro_size(config, name)) for name in option.micro_sizes},
    }
    return [override for override in option.overrides() if own.get(override.split("=")[0]) != override.split("=")[1]]


def _open_axes(axes: Axes, composed: Composed) -> Axes:
    """Only the open choices; everything else as configured."""
    config, autos = composed.config, composed.autos
    shardings = {
        name: known for name, known in axes.shardings.items() if "sharding" in autos or known == config.sharding
    }
    sizes = {
        name: known if f"stages.{name}.batch.micro_size" in autos else (_micro_size(config, name),)
        for name, known in axes.micro_sizes.items()
    }
    is_open = "model.gradient_checkpointing" in autos
    checkpointing = (False, True) if is_open else (config.model.gradient_checkpointing,)
    return replace(
        axes, shardings=shardings or {"as configured": config.sharding}, micro_sizes=sizes, checkpointing=checkpointing
    )


def _micro_size(config: RunConfig, name: str) -> int:
    stage: Any = config.stages[name]
    return int(stage.batch.micro_size)


def _frozen_words(config: RunConfig, autos: Sequence[str]) -> list[str] | None:
    """The values that the run folder settled before, so that a rerun keeps them; None for a new run."""
    try:
        frozen: Any = read_config(RunFolder(run_directory_of(config)))
    except RunFolderError:
        return None
    leaves = flatten(frozen)
    overrides: list[str] = []
    for key in autos:
        if key == "sharding":
            overrides.append("sharding=none" if leaves["sharding.strategy"] == "none" else _sharding_override(leaves))
        elif key in leaves:
            overrides.append(f"{key}={str(leaves[key]).lower()}")
    return overrides


def _sharding_override(leaves: Mapping[str, Any]) -> str:
    is_offloaded = leaves.get("sharding.offload_optimizer") == "cpu"
    return f"sharding={leaves['sharding.strategy']}{'_offload' if is_offloaded else ''}"


def _offloads(sharding: Sharding) -> bool:
    return sharding.offloads_optimizer


def _alike(one: Sharding, other: Sharding) -> bool:
    """Whether two shardings belong to one preset; finer settings count as the configuration's own."""
    return one.strategy == other.strategy and _offloads(one) == _offloads(other)
