"""Memory of generating and scoring: KV cache, prefill, the models next to the policy. Must not import torch."""

from __future__ import annotations

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.alignment import RolloutConfig
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.merging import MergeStage
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, makes_classifier
from orchestrator.config.sharding import ZeroSharding
from orchestrator.config.stage import StageSettings
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.activations import MicroBatchShape, activation_memory
from orchestrator.estimate.memory_parts import BytesByPart, Phase
from orchestrator.estimate.model_states import base_bytes, compute_width, trainable_parameters
from orchestrator.estimate.sharding_buffers import (
    gathered_bytes,
    held_bytes,
    largest_tensor_bytes,
    loaded_layers_bytes,
    streamed_bytes,
    whole_bytes,
)

SAMPLER_COPIES = 6
"""fp32 rows of the vocabulary per sequence: the model's scores, scaled, log-softmax, noise, their sum, what is left possible."""


def kv_cache_bytes(model: Architecture, *, sequences: int, length: int, width: int) -> float:
    """Keys and values of every layer: 2 x layers x key heads x head width, for every token."""
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width
    return float(per_token * sequences * length)


def rollout_parts(model: Architecture, config: RunConfig, rollout: RolloutConfig, *, prompt: int) -> BytesByPart:
    """Generating with transformers: whole weights or layers on every rank, the cache and its growth, prefill or a step."""
    sequences = min(rollout.generate_size, rollout.prompts * rollout.group_size // config.world_size)
    sharding = config.sharding
    is_whole = isinstance(sharding, ZeroSharding) and sharding.shards_parameters and not sharding.generate_by_layer
    return {
        **_generation(model, config, rollout, prompt=prompt, sequences=max(1, sequences)),
        "gathered": whole_bytes(model, config) if is_whole else gathered_bytes(model, config),
    }


def reference_bytes(model: Architecture, config: RunConfig, stage: TrainingStage) -> float:
    """Models next to the policy: a reference under full fine-tuning (LoRA needs at most a second adapter), reward
    models.

    A reward model is assumed to be as large as the base.
    """
    base = held_bytes(config, base_bytes(model, config))
    reference = trainable_parameters(model, config) * 4.0 if config.tuning.is_adapter else base
    return (reference if stage.holds_reference else 0.0) + _reward_models(stage) * base


def _reward_models(stage: StageSettings) -> int:
    return sum(reward.is_model for reward in stage.reward_sources)


def scoring_phases(model: Architecture, config: RunConfig, stage: ScoringStage | MergeStage) -> list[Phase]:
    """A stage without an optimizer, on every rank: models whole, or a share of each under ZeRO-3."""
    is_of_classifiers = stage.start_from in config.stages and makes_classifier(config, stage.start_from)
    shape = MicroBatchShape(
        rows=stage.micro_size,
        length=stage.data.max_length,
        trained_share=1.0,
        logits="none" if is_of_classifiers else "whole",
        on_cpu=config.cluster.device == "cpu",
        is_packed=False,
    )
    gathered: BytesByPart = {"gathered": gathered_bytes(model, config)}
    scoring: BytesByPart = {"activations": activation_memory(model, config, shape).evaluation, **gathered}
    tuned = base_bytes(model, config) + _adapter_bytes(model, config)
    held: BytesByPart = {"weights": held_bytes(config, tuned)}
    streamed: BytesByPart = {"loading": streamed_bytes(model, config)}
    load = Phase(name="load", static=held, changing={"gathered": loaded_layers_bytes(model, config)}, host=streamed)
    prove = Phase(name="prove", static=held, changing=scoring, host=streamed)
    blended: BytesByPart = {"ingredients": _blended_bytes(model, config, stage)}
    if stage.makes == "merged model":
        merged = held_bytes(config, float(count_parameters(model).total * compute_width(config)))
        # Both models' logits of a batch at a time.
        twice = {**scoring, "activations": 2 * scoring["activations"]}
        evaluation = Phase(name="evaluation", static={**held, "merged": merged}, changing=twice, host=streamed)
        write = Phase(name="write", static=held, changing={}, host={"ingredients": 4 * largest_tensor_bytes(model)})
        only = Phase(name="prove", static={"merged": merged}, changing=scoring, host=streamed)
        return [load, write, evaluation, only]
    phases = [load, Phase(name="evaluation", static=held, changing=scoring, host=blended)]
    rollout = stage.generation
    if rollout is not None:
        sequences = max(1, min(rollout.generate_size, rollout.prompts * rollout.group_size))
        made = _generation(model, config, rollout, prompt=stage.data.max_length, sequences=sequences)
        rewards: BytesByPart = {"other models": _reward_models(stage) * held_bytes(config, base_bytes(model, config))}
        phases.append(Phase(name="rollout", static={**held, **rewards}, changing={**made, **gathered}, host=blended))
    if blended["ingredients"]:
        phases += [Phase(name="write", static=held, changing={}, host=blended), prove]
    return phases


def _adapter_bytes(model: Architecture, config: RunConfig) -> float:
    return trainable_parameters(model, config) * 4.0 if config.tuning.is_adapter else 0.0


def _blended_bytes(model: Architecture, config: RunConfig, stage: StageSettings) -> float:
    """Host memory of an interpolation or a soup: adapters, or a layer of each whole model and two of the sum."""
    number = stage.models_on_host(is_adapter=config.tuning.is_adapter)
    each = _adapter_bytes(model, config) if config.tuning.is_adapter else streamed_bytes(model, config)
    return number * each + (2 * largest_tensor_bytes(model) if number else 0.0)


def _generation(
    model: Architecture, config: RunConfig, rollout: RolloutConfig, *, prompt: int, sequences: int
) -> BytesByPart:
    """The cache; its largest layer twice while it grows; prefill of the prompts, whose last logits alone are made."""
    full_autocast = not config.tuning.is_adapter and not config.sharding.is_deepspeed
    width = 4 if full_autocast else compute_width(config)
    cache = kv_cache_bytes(model, sequences=sequences, length=prompt + rollout.max_new_tokens, width=width)
    load = MicroBatchShape(
        rows=sequences,
        length=prompt,
        trained_share=0.0,
        logits="none",
        is_packed=False,
        on_cpu=config.cluster.device == "cpu",
    )
    return {
        "KV cache": cache,
        "temporaries": 2 * cache / model.num_hidden_layers + sequences * model.vocab_size * 4.0 * SAMPLER_COPIES,
        "activations": activation_memory(model, config, load).evaluation,
    }
