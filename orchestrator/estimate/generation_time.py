"""Time of generating a policy stage's completions: decoding is bound by memory bandwidth. Must not import torch."""

from __future__ import annotations

import math

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.alignment import PolicyStage
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.estimate.communication import exchange_seconds
from orchestrator.estimate.flops import forward_flops_per_token
from orchestrator.estimate.frozen_base import frozen_bytes
from orchestrator.estimate.model_states import trainable_parameters
from orchestrator.schedule import rollout_steps

HOST_SECONDS_PER_LAYER = 3e-4
"""Assumption: what launching the kernels of one layer for one token takes without compiled graphs (transformers on a GPU)."""


def rollout_seconds(
    model: Architecture, config: RunConfig, stage: PolicyStage, *, prompt_tokens: float, flops_per_second: float
) -> float | None:
    """Seconds of one rollout over the optimizer steps that learn from it; None where the memory bandwidth is unknown."""
    hardware = config.cluster.hardware
    if hardware.memory_gbytes_per_second is None:
        return None
    bandwidth = hardware.memory_gbytes_per_second * 1e9
    completions = stage.rollout.prompts * stage.rollout.group_size / config.world_size
    together = min(stage.rollout.generate_size, completions)
    length = prompt_tokens + stage.rollout.max_new_tokens
    forward = forward_flops_per_token(model, config, length=length)
    cache = together * length / 2 * _cache_bytes_per_token(model)
    token = max((_weight_bytes(model, config) + cache) / bandwidth, together * forward / flops_per_second)
    host = HOST_SECONDS_PER_LAYER * model.num_hidden_layers if config.cluster.device != "cpu" else 0.0
    prefill = together * prompt_tokens * forward / flops_per_second
    decoding = math.ceil(completions / together) * (prefill + stage.rollout.max_new_tokens * max(token, host))
    scored = completions * length * _scoring_passes(config, stage) * forward / flops_per_second
    gathered = _gathering_seconds(model, config)
    return (decoding + scored + gathered) / rollout_steps(stage)


def _weight_bytes(model: Architecture, config: RunConfig) -> float:
    """Weights read for every token: all of them in a mixture too, since a batch activates all experts."""
    if config.tuning.is_adapter:
        return frozen_bytes(model, config) + 2.0 * trainable_parameters(model, config)
    return (2.0 if config.model.dtype == "bfloat16" else 4.0) * count_parameters(model).total


def _cache_bytes_per_token(model: Architecture) -> float:
    """Keys and values of all layers in 16 bits."""
    return 2.0 * 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers


def _scoring_passes(config: RunConfig, stage: PolicyStage) -> int:
    """Forward passes over each completion besides training: the old policy, the reference, and every reward model."""
    models = sum(reward.is_model for reward in stage.rewards)
    return 1 + (1 if stage.kl_coefficient else 0) + models


def _gathering_seconds(model: Architecture, config: RunConfig) -> float:
    """Under ZeRO-3 the full weights are gathered once per rollout."""
    if not config.sharding.shards_parameters:
        return 0.0
    return exchange_seconds(config, _weight_bytes(model, config)) or 0.0
