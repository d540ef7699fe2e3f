"""Expected time of an optimizer step, and tokens per second: an estimate with a description of its basis.

Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.alignment import PolicyStage
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, accumulation_steps
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.communication import (
    dequantised_bytes,
    exchange_seconds,
    exchanged_bytes,
    gathering_passes,
    offload_seconds,
)
from orchestrator.estimate.flops import executed_flops_per_token
from orchestrator.estimate.frozen_base import frozen_bytes
from orchestrator.estimate.generation_time import rollout_seconds
from orchestrator.estimate.model_states import trainable_parameters
from orchestrator.estimate.row_lengths import RowShape

ADAM_BYTES = 28
"""Memory traffic of fp32 Adam for a parameter: weight, two moments and gradient read, weight and moments written."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one device does."""

    flops_per_second: float
    """Executed ones."""
    is_whole: bool
    """Whether communication, padding and everything else is in it already: measured on as many ranks."""
    rollout_seconds: float | None
    """Measured time of rollouts for one optimizer step."""
    basis: str
    slowdown: float | None = None
    """Time of an emulated number type relative to float32; None if nothing compared them."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by part."""

    compute: float
    """Matrix operations, or reading the weights if that takes longer; dequantisation."""
    exposed_communication: float
    """Communication that does not overlap with computation."""
    optimizer: float
    """Update and offload."""
    rollout: float
    """Generating completions, spread over the steps that train on them."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed_communication + self.optimizer + self.rollout


def table_rate(config: RunConfig) -> Rate | None:
    """The rate from the hardware table; None if it is unknown."""
    hardware = config.cluster.hardware
    is_quantized = config.quantization.is_4bit
    method = "full" if not config.tuning.is_adapter else "qlora" if is_quantized else "lora"
    achieved = {"full": hardware.achieved.full, "lora": hardware.achieved.lora, "qlora": hardware.achieved.qlora}[
        method
    ]
    if hardware.peak_tflops is None or not achieved:
        return None
    if config.model.dtype == "float32" and config.cluster.device == "cuda":
        return None
    if _emulates(config):  # a table's rate would promise a minute for what takes an hour
        return None
    return Rate(
        flops_per_second=hardware.peak_tflops * 1e12 * achieved,
        is_whole=False,
        rollout_seconds=None,
        basis=f"{hardware.name}: {achieved:.0%} of {hardware.peak_tflops:g} TFLOP/s assumed for {method}",
    )


def why_no_rate(config: RunConfig) -> str:
    """What to do if neither table nor measurement has a rate."""
    if _emulates(config):
        return "bfloat16 is emulated here, at a small part of any table's rate: type model.dtype=auto"
    if config.cluster.hardware.peak_tflops is None:
        return (
            "this processor's speed was not measured: see `orchestrator doctor`, or run once: a run measures it"
            if config.cluster.device == "cpu"
            else "the hardware has no name: type hardware@cluster.hardware=h100 (or another), or run once: a run measures it"
        )
    return "the hardware table holds rates of 16-bit training only: run once, a run measures it"


def _emulates(config: RunConfig) -> bool:
    return config.model.dtype == "bfloat16" and config.cluster.hardware.native_bfloat16 is False


def step_time(
    model: Architecture, config: RunConfig, stage: TrainingStage, *, shape: RowShape, rate: Rate
) -> StepTime | None:
    """Seconds of an optimizer step of one rank; None if a required bandwidth is unknown."""
    micro_batches = accumulation_steps(config, stage)
    executed = executed_flops_per_token(model, config, length=shape.attended)
    rows = stage.batch.global_size / config.world_size
    tokens = rows * (shape.tokens if rate.is_whole else shape.computed_tokens)
    compute = tokens * executed / rate.flops_per_second
    rollout = _rollout(model, config, stage, shape, rate)
    if rate.is_whole:
        return StepTime(compute=compute, exposed_communication=0, optimizer=0, rollout=rollout)
    compute = max(compute, micro_batches * _weight_reading_seconds(model, config))
    compute += _memory_seconds(config, dequantised_bytes(model, config, micro_batches=micro_batches))
    exchange = exchange_seconds(config, exchanged_bytes(model, config, micro_batches=micro_batches))
    offload = offload_seconds(model, config, micro_batches=micro_batches)
    if exchange is None or offload is None:
        return None
    hidden = _overlap(config) * compute / (micro_batches if config.sharding.stage < 2 else 1)
    return StepTime(
        compute=compute,
        exposed_communication=max(0.0, exchange - hidden),
        optimizer=offload + _update_seconds(model, config),
        rollout=rollout,
    )


def _rollout(model: Architecture, config: RunConfig, stage: TrainingStage, shape: RowShape, rate: Rate) -> float:
    if not isinstance(stage, PolicyStage):
        return 0.0
    if rate.rollout_seconds is not None:
        return rate.rollout_seconds
    prompt = max(1.0, shape.tokens - stage.rollout.max_new_tokens)
    seconds = rollout_seconds(model, config, stage, prompt_tokens=prompt, flops_per_second=rate.flops_per_second)
    return seconds or 0.0


def _overlap(config: RunConfig) -> float:
    """Share of the compute time that overlaps with communication: under none and zero1 only that of the last
    micro-batch.
    """
    return config.cluster.communication_overlap if config.sharding.overlaps_communication else 0.0


def _weight_reading_seconds(model: Architecture, config: RunConfig) -> float:
    """Least time of a micro-batch, however few tokens it has: every pass reads the weights."""
    width = 2.0 if config.model.dtype == "bfloat16" else 4.0
    weights = frozen_bytes(model, config) + width * trainable_parameters(model, config)
    return _memory_seconds(config, gathering_passes(model, config) * weights)


def _update_seconds(model: Architecture, config: RunConfig) -> float:
    sharding = config.sharding
    if sharding.offloads_optimizer:
        return 0.0
    owners = 1 if not sharding.is_deepspeed else config.world_size
    return _memory_seconds(config, ADAM_BYTES * trainable_parameters(model, config) / owners)


def _memory_seconds(config: RunConfig, traffic_bytes: float) -> float:
    """0 if the bandwidth is unknown: it rarely matters."""
    bandwidth = config.cluster.hardware.memory_gbytes_per_second
    return 0.0 if bandwidth is None else traffic_bytes / (bandwidth * 1e9)
