"""Bytes of weights, gradients and optimizer states on one device; pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.architecture import count_lora_parameters, count_parameters
from orchestrator.config.model import Architecture, LoraTuning, Nf4Quantization, ZeroSharding
from orchestrator.config.run import RunConfig
from orchestrator.config.stages import TrainingStage

GIB = 2**30
NF4_BYTES = 4.127 / 8
"""Bytes of a parameter with double quantisation (2305.14314)."""


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes that one device holds between steps."""

    weights: float
    gradients: float
    optimizer: float
    """Optimizer states and, under 16 bits, the fp32 master weights that DeepSpeed keeps."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def trainable_parameters(model: Architecture, config: RunConfig) -> int:
    if isinstance(config.tuning, LoraTuning):
        return count_lora_parameters(model, config.tuning)
    return count_parameters(model).total


def state_memory(model: Architecture, config: RunConfig, stage: TrainingStage) -> StateMemory:
    """States of mixed-precision Adam (1910.02054, section 3), over the *trainable* parameters for gradients and optimizer."""
    trained = trainable_parameters(model, config)
    frozen = count_parameters(model).total if isinstance(config.tuning, LoraTuning) else 0
    shards = _shards(config)
    width = 2 if config.model.dtype == "bfloat16" else 4
    under_zero = isinstance(config.sharding, ZeroSharding)
    trained_width = width if under_zero else 4  # without DeepSpeed trained weights are fp32 and run under autocast
    states = 2.0 if stage.optimizer.name == "adamw_8bit" else 8.0
    master = 4.0 if under_zero else 0.0
    offloaded = isinstance(config.sharding, ZeroSharding) and config.sharding.offload_optimizer == "cpu"
    parameters_offloaded = isinstance(config.sharding, ZeroSharding) and config.sharding.offload_parameters == "cpu"
    weights = (frozen * _frozen_width(model, config, width) + trained * trained_width) / shards["parameters"]
    return StateMemory(
        weights=0.0 if parameters_offloaded else weights,
        gradients=trained * trained_width / shards["gradients"],
        optimizer=0.0 if offloaded else trained * (states + master) / shards["optimizer"],
    )


def _frozen_width(model: Architecture, config: RunConfig, width: int) -> float:
    """Bytes of a frozen parameter on average: 4-bit linear layers, embeddings and head in the compute type."""
    if not isinstance(config.quantization, Nf4Quantization):
        return width
    counts = count_parameters(model)
    return (counts.embedding * width + (counts.total - counts.embedding) * NF4_BYTES) / counts.total


def _shards(config: RunConfig) -> dict[str, int]:
    """Over how many ranks each kind is divided."""
    stage = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}[config.sharding.strategy]
    world = config.world_size
    return {
        "optimizer": world if stage >= 1 else 1,
        "gradients": world if stage >= 2 else 1,
        "parameters": world if stage >= 3 else 1,
    }
