"""Bytes of weights, gradients and optimizer states on one rank, by ZeRO stage; pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.architecture.adapter_parameters import count_adapter_parameters
from orchestrator.architecture.families import linear_layers
from orchestrator.architecture.layers import count_freeze_parameters
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture, Nf4Quantization
from orchestrator.config.run import RunConfig, has_new_heads
from orchestrator.config.training import TrainingStage
from orchestrator.config.tuning import ADAPTER_TUNINGS, FreezeTuning
from orchestrator.estimate.constants import (
    MOMENTS_8BIT_BYTES,
    NF4_BLOCK,
    NF4_NESTED_BLOCK,
    NF4_TABLES_BYTES,
)

NF4_BYTES = (4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_NESTED_BLOCK)) / 8
"""Of a parameter with double quantisation: 4.127 bit (2305.14314)."""
NF4_SINGLE_BYTES = (4 + 32 / NF4_BLOCK) / 8
"""Of a parameter without: 4.5 bit."""


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes that one rank holds between steps: on its device, and in the host's memory where they are offloaded."""

    weights: float
    gradients: float
    optimizer: float
    """Optimizer states and, under DeepSpeed, the fp32 master weights."""
    host_weights: float
    host_optimizer: float
    host_gradients: float

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Over how many ranks each kind is divided."""

    optimizer: int
    gradients: int
    parameters: int


def trainable_parameters(model: Architecture, config: RunConfig) -> int:
    if isinstance(config.tuning, ADAPTER_TUNINGS):
        return count_adapter_parameters(model, config.tuning)
    if isinstance(config.tuning, FreezeTuning):
        return count_freeze_parameters(model, config.tuning, has_new_head=has_new_heads(config))
    return count_parameters(model).total


def compute_width(config: RunConfig) -> int:
    """Bytes of a number in `model.dtype`."""
    return 2 if config.model.dtype == "bfloat16" else 4


def trained_width(config: RunConfig) -> int:
    """Bytes of a trained weight and its gradient: without DeepSpeed they are fp32 and run under autocast."""
    return compute_width(config) if config.sharding.is_deepspeed else 4


def shards_of(config: RunConfig) -> Shards:
    stage = config.sharding.stage
    world = config.world_size
    return Shards(
        optimizer=world if stage >= 1 else 1,
        gradients=world if stage >= 2 else 1,
        parameters=world if stage >= 3 else 1,
    )


def adapter_width(config: RunConfig) -> int:
    """Bytes of an adapter's weight: ZeRO-3, into whose shards the base is loaded, leaves PEFT's adapters in fp32."""
    keeps_fp32 = config.sharding.shards_parameters and not isinstance(config.quantization, Nf4Quantization)
    return 4 if keeps_fp32 else trained_width(config)


def base_bytes(model: Architecture, config: RunConfig) -> float:
    """The base at its true width: linear layers in 4 bits where they are quantised, all else in `model.dtype`."""
    total, width = count_parameters(model).total, compute_width(config)
    if not isinstance(config.quantization, Nf4Quantization):
        return total * width
    quantised = quantised_parameters(model)
    return (total - quantised) * width + quantised / 2 + constants_bytes(model, config)


def constants_bytes(model: Architecture, config: RunConfig) -> float:
    """Of 4-bit layers: the blocks' constants and bitsandbytes' tables, which no sharding divides."""
    if not isinstance(config.quantization, Nf4Quantization):
        return 0.0
    double = config.quantization.double_quantization
    tables = sum(NF4_TABLES_BYTES) if double else NF4_TABLES_BYTES[0]
    per_element = (NF4_BYTES if double else NF4_SINGLE_BYTES) - 0.5
    return quantised_parameters(model) * per_element + len(_quantised_layers(model)) * model.num_hidden_layers * tables


def quantised_parameters(model: Architecture) -> int:
    """Weights of linear layers; embeddings, head, norms, biases and a mixture's fused experts stay as they are."""
    return sum(_quantised_layers(model)) * model.num_hidden_layers


def _quantised_layers(model: Architecture) -> list[int]:
    """Elements of each quantised matrix of one layer."""
    layers = [linear for linear in linear_layers(model) if linear.is_attention or not model.num_experts]
    return [linear.inputs * linear.outputs for linear in layers]


def optimizer_bytes(config: RunConfig, stage: TrainingStage) -> float:
    """Of one trained parameter; with the fp32 master under DeepSpeed."""
    states = MOMENTS_8BIT_BYTES if stage.optimizer.has_8bit_states else 8.0
    return states + (4.0 if config.sharding.is_deepspeed else 0.0)


def state_memory(model: Architecture, config: RunConfig, stage: TrainingStage) -> StateMemory:
    """States of mixed-precision Adam (1910.02054, section 3), over the *trainable* parameters for gradients and optimizer."""
    trained = trainable_parameters(model, config)
    shards = shards_of(config)
    weights = _weights(model, config, trained, shards.parameters)
    gradients = trained * trained_width(config) / shards.gradients
    optimizer = trained * optimizer_bytes(config, stage) / shards.optimizer
    optimizer_away, weights_away = _offloaded(config)
    return StateMemory(
        weights=0.0 if weights_away else weights,
        gradients=0.0 if optimizer_away else gradients,
        optimizer=0.0 if optimizer_away else optimizer,
        host_weights=weights if weights_away else 0.0,
        host_gradients=trained * 4.0 / shards.gradients if optimizer_away else 0.0,
        host_optimizer=optimizer if optimizer_away else 0.0,
    )


def _weights(model: Architecture, config: RunConfig, trained: int, shards: int) -> float:
    """The base, and adapters where there are any; the constants of 4-bit layers are whole on every rank."""
    if not config.tuning.is_adapter:
        frozen = count_parameters(model).total - trained
        return (frozen * compute_width(config) + trained * trained_width(config)) / shards
    constants = constants_bytes(model, config)
    return (base_bytes(model, config) - constants + trained * adapter_width(config)) / shards + constants


def _offloaded(config: RunConfig) -> tuple[bool, bool]:
    """Whether optimizer and parameters are in the host's memory."""
    return config.sharding.offloads_optimizer, config.sharding.offloads_parameters
