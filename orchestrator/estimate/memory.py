"""The memory forecast of a stage: every phase, on the device and on the host, of one rank; pure, must not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, Stage, accumulation_steps
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.activations import (
    ActivationMemory,
    Logits,
    MicroBatchShape,
    activation_memory,
    dequantised_bytes,
)
from orchestrator.estimate.constants import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    CPU_PROCESS_BYTES,
    GIB,
    HOST_PROCESS_BYTES,
    SLACK_SHARE,
    TRAINED_SHARE,
    Range,
)
from orchestrator.estimate.generation_memory import reference_bytes, rollout_parts, scoring_phases
from orchestrator.estimate.memory_parts import BytesByPart, Phase
from orchestrator.estimate.memory_records import HOST_UNCERTAINTY, MemoryForecast, PhaseForecast, verdict_of, worse_of
from orchestrator.estimate.model_states import (
    StateMemory,
    optimizer_bytes,
    shards_of,
    state_memory,
    trainable_parameters,
)
from orchestrator.estimate.sharding_buffers import (
    bucket_bytes,
    gathered_bytes,
    largest_tensor_bytes,
    loaded_layers_bytes,
    persistent_bytes,
    secondary_bytes,
    step_bytes,
    streamed_bytes,
    whole_bytes,
)

MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
UNITS_GIB = {"K": 2.0**-20, "": 2.0**-10, "M": 2.0**-10, "G": 1.0, "T": 1024.0}
"""Slurm counts in MiB if there is no unit."""
Level = Literal["low", "expected", "high"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How the loss computes logits over the vocabulary."""

    logits: Logits = "chunked"


def memory_forecast(
    model: Architecture, config: RunConfig, stage: Stage, *, memory_gib: float | None = None, loss: Loss | None = None
) -> MemoryForecast:
    """What one rank of a stage needs in every phase, against the `memory_gib` of its device, and a node's, where they are known."""
    low, expected, high = (
        _phases(model, config, stage, loss or Loss(), level) for level in ("low", "expected", "high")
    )
    phases = tuple(_phase_forecast(*same) for same in zip(low, expected, high, strict=True))
    binding = max(phases, key=lambda phase: phase.expected)
    states = _states(model, config, stage)
    ranks = config.cluster.processes_per_node
    host, room = ranks * max(phase.host_expected for phase in phases), node_memory_gib(config)
    host_verdict = verdict_of(host * (1 - HOST_UNCERTAINTY), host * (1 + HOST_UNCERTAINTY), room)
    device = verdict_of(max(phase.low for phase in phases), max(phase.high for phase in phases), memory_gib)
    return MemoryForecast(
        weights=states.weights / GIB,
        gradients=states.gradients / GIB,
        optimizer=states.optimizer / GIB,
        total=states.total / GIB,
        phases=phases,
        binding=binding.name,
        low=max(phase.low for phase in phases),
        expected=binding.expected,
        high=max(phase.high for phase in phases),
        host=max(phase.host_expected for phase in phases),
        memory_gib=memory_gib,
        node_gib=host,
        node_memory_gib=room,
        verdict=worse_of(device, host_verdict),
    )


def node_memory_gib(config: RunConfig) -> float | None:
    """Host memory of a node that the job may use: the node's, or less if less is requested from Slurm."""
    found = MEMORY.fullmatch((config.cluster.memory or "").strip())
    asked = float(found["number"]) * UNITS_GIB[found["unit"].upper()] if found is not None else 0.0
    known = [amount for amount in (config.cluster.node_memory_gib, asked) if amount]
    return min(known, default=None)


def micro_batch(config: RunConfig, stage: TrainingStage, loss: Loss, trained_share: float) -> MicroBatchShape:
    """The largest micro-batch that the stage can meet: every row as long as it may be."""
    data, rows, length = stage.data, stage.batch.micro_size, stage.data.max_length
    if stage.generation is not None:
        length += stage.generation.max_new_tokens
    if data.tokens_per_batch is not None:
        rows = -(-data.tokens_per_batch // length)
    if stage.rows_wanted == "pair" and data.packing == "none":
        rows *= 2
    return MicroBatchShape(
        rows=rows,
        length=length + config.tuning.virtual_token_count,
        trained_share=trained_share,
        logits="none" if stage.has_new_head else loss.logits,
        is_packed=data.packing != "none",
        on_cpu=config.cluster.device == "cpu",
    )


def _states(model: Architecture, config: RunConfig, stage: Stage) -> StateMemory:
    if isinstance(stage, TrainingStage):
        return state_memory(model, config, stage)
    none = {"gradients": 0.0, "optimizer": 0.0, "host_weights": 0.0, "host_optimizer": 0.0, "host_gradients": 0.0}
    return StateMemory(weights=whole_bytes(model, config), **none)


def _phases(model: Architecture, config: RunConfig, stage: Stage, loss: Loss, level: Level) -> list[Phase]:
    """The phases at one level, including what the allocator does not see."""
    if isinstance(stage, TrainingStage):
        phases = _training_phases(model, config, stage, loss, level)
    else:
        phases = scoring_phases(model, config, stage)
    on_cpu = config.cluster.device == "cpu"
    outside = {
        "context": 0.0 if on_cpu else _at(CONTEXT_BYTES, level),
        "process": _at(CPU_PROCESS_BYTES, level) if on_cpu else 0.0,
        "communication": 0.0 if on_cpu or config.world_size == 1 else _at(COMMUNICATION_BYTES, level),
    }
    slack = 0.0 if on_cpu else _at(SLACK_SHARE, level)
    host = {"process": _at(HOST_PROCESS_BYTES, level)}
    return [
        Phase(
            name=phase.name,
            static={**phase.static, **outside},
            changing={**phase.changing, "slack": slack * sum(phase.changing.values())},
            host={**phase.host, **host},
        )
        for phase in phases
    ]


def _training_phases(
    model: Architecture, config: RunConfig, stage: TrainingStage, loss: Loss, level: Level
) -> list[Phase]:
    states = state_memory(model, config, stage)
    held: BytesByPart = {
        "weights": states.weights + persistent_bytes(model, config) + secondary_bytes(model, config),
        "optimizer": states.optimizer,
        "other models": reference_bytes(model, config, stage),
        "buckets": bucket_bytes(model, config),
    }
    host: BytesByPart = {
        "weights": states.host_weights,
        "optimizer": states.host_optimizer,
        "gradients": states.host_gradients,
    }
    gathered: BytesByPart = {"gathered": gathered_bytes(model, config, least=level == "low")}
    load = Phase(
        name="load",
        static={"weights": states.weights},
        changing={"temporaries": dequantised_bytes(model, config), "gathered": loaded_layers_bytes(model, config)},
        host={**host, "loading": streamed_bytes(model, config)},
    )
    peaks = activation_memory(model, config, micro_batch(config, stage, loss, _at(TRAINED_SHARE, level)))
    before, (through, peak) = _gradients_in_backward(model, config, stage, states, peaks)
    moments: list[tuple[str, BytesByPart, BytesByPart]] = [
        ("forward", {"gradients": before}, {**_activations(peaks.forward, peaks.kept), **gathered}),
        ("backward", {"gradients": through}, {**_activations(peak, peaks.kept), **gathered}),
        ("optimizer step", {"gradients": states.gradients}, {"temporaries": _step_bytes(model, config)}),
        ("evaluation", {}, {**_activations(peaks.evaluation, 0.0), **gathered}),
        ("save", {}, {"gathered": _gathered_to_save(model, config)}),
        ("resume", {}, gathered),
    ]
    if stage.generation is not None:
        moments.insert(0, ("rollout", {}, rollout_parts(model, config, stage.generation, prompt=stage.data.max_length)))
    moments.append(("write", {}, {"gathered": _gathered_to_save(model, config)}))
    only: dict[str, BytesByPart] = {
        "save": {"checkpoint": _snapshot_bytes(model, config, stage)},
        "write": {"artifact": 2 * largest_tensor_bytes(model)},
    }
    prove = Phase(
        name="prove",  # by fresh ranks, when those that trained have left
        static={"weights": held["weights"]},
        changing={**_activations(peaks.evaluation, 0.0), **gathered},
        host={"weights": states.host_weights, "loading": streamed_bytes(model, config)},
    )
    trained = [
        Phase(name=name, static={**held, **more}, changing=changing, host={**host, **only.get(name, {})})
        for name, more, changing in moments
    ]
    return [load, *trained, prove]


def _gradients_in_backward(
    model: Architecture, config: RunConfig, stage: TrainingStage, states: StateMemory, peaks: ActivationMemory
) -> tuple[float, tuple[float, float]]:
    """(gradients in forward, (gradients, activations) at the largest moment of backward)."""
    before, early = _early_gradients(model, config, stage, states)
    top, bottom = (early, peaks.backward), (states.gradients, peaks.bottom)
    return before, max(top, bottom, key=sum)


def _step_bytes(model: Architecture, config: RunConfig) -> float:
    on_host = config.sharding.offloads_optimizer
    return 0.0 if on_host else step_bytes(model, config)


def _gathered_to_save(model: Architecture, config: RunConfig) -> float:
    """DeepSpeed gathers one parameter at a time in fp32."""
    return largest_tensor_bytes(model) if config.sharding.is_deepspeed else 0.0


def _early_gradients(
    model: Architecture, config: RunConfig, stage: TrainingStage, states: StateMemory
) -> tuple[float, float]:
    """Gradients held during forward, and once backward has passed the last layer.

    All of them after earlier micro-batches; in the first micro-batch those of the head and one layer.
    """
    if accumulation_steps(config, stage) > 1 or config.sharding.is_deepspeed:
        return states.gradients, states.gradients
    counts = count_parameters(model)
    return 0.0, states.gradients * min(1.0, (counts.layer + counts.embedding) / counts.total)


def _activations(peak: float, kept: float) -> BytesByPart:
    """A peak, split into what is kept for backward and what is temporary."""
    return {"activations": min(kept, peak), "temporaries": max(0.0, peak - kept)}


def _snapshot_bytes(model: Architecture, config: RunConfig, stage: TrainingStage) -> float:
    """A rank's share of a checkpoint, copied to be written in the background."""
    trained = trainable_parameters(model, config)
    states = optimizer_bytes(config, stage) + (0.0 if config.sharding.is_deepspeed else 4.0)
    shards = shards_of(config).optimizer if config.sharding.is_deepspeed else config.world_size
    return trained * states / shards if stage.checkpoint.background else 0.0


def _at(figure: Range, level: Level) -> float:
    return {"low": figure.low, "expected": figure.expected, "high": figure.high}[level]


def _phase_forecast(low: Phase, expected: Phase, high: Phase) -> PhaseForecast:
    return PhaseForecast(
        name=expected.name,
        device={name: part / GIB for name, part in {**expected.static, **expected.changing}.items() if part},
        host={name: part / GIB for name, part in expected.host.items() if part},
        low=low.device_total / GIB,
        expected=expected.device_total / GIB,
        high=high.device_total / GIB,
        host_expected=sum(expected.host.values()) / GIB,
    )
