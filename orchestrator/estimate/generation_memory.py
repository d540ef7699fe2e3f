"""Memory of generating and scoring: KV cache, prefill, the models next to the policy. Must not import torch."""

from __future__ import annotations

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.alignment import RolloutConfig
from orchestrator.config.evaluation import ScoringStage
from orchestrator.config.merging import MergeStage
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, makes_classifier
from orchestrator.config.stage import StageSettings
from orchestrator.config.training import TrainingStage
from orchestrator.estimate.activations import MicroBatchShape, activation_memory
from orchestrator.estimate.memory_parts import BytesByPart, Phase
from orchestrator.estimate.model_states import base_bytes, compute_width, trainable_parameters
from orchestrator.estimate.sharding_buffers import whole_bytes

SAMPLER_COPIES = 6
"""fp32 rows of the vocabulary per sequence: the model's scores, scaled, log-softmax, noise, their sum, what is left possible."""


def kv_cache_bytes(model: Architecture, *, sequences: int, length: int, width: int) -> float:
    """Keys and values of every layer: 2 x layers x key heads x head width, for every token."""
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width
    return float(per_token * sequences * length)


def rollout_parts(model: Architecture, config: RunConfig, rollout: RolloutConfig, *, prompt: int) -> BytesByPart:
    """Generating with transformers: whole weights on every rank, the cache and its growth, prefill or a step."""
    sequences = min(rollout.generate_size, rollout.prompts * rollout.group_size // config.world_size)
    gathers = config.sharding.shards_parameters
    return {
        **_generation(model, config, rollout, prompt=prompt, sequences=max(1, sequences)),
        "gathered": whole_bytes(model, config) if gathers else 0.0,
    }


def reference_bytes(model: Architecture, config: RunConfig, stage: TrainingStage) -> float:
    """Models next to the policy: a reference under full fine-tuning (LoRA needs at most a second adapter), reward
    models.

    A reward model is assumed to be as large as the base.
    """
    base = base_bytes(model, config)
    reference = trainable_parameters(model, config) * 4.0 if config.tuning.is_adapter else base
    return (reference if stage.holds_reference else 0.0) + _reward_models(stage) * base


def _reward_models(stage: StageSettings) -> int:
    return sum(reward.is_model for reward in stage.reward_sources)


def scoring_phases(
    model: Architecture, config: RunConfig, stage: ScoringStage | MergeStage, *, is_cautious: bool
) -> list[Phase]:
    """A stage without an optimizer: one process, whole weights. Conservative: the merged model is also held in fp32."""
    alone = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"nodes": 1, "processes_per_node": 1})}
    )
    width = compute_width(config)
    whole = count_parameters(model).total * width
    is_of_classifiers = stage.start_from in config.stages and makes_classifier(config, stage.start_from)
    load = MicroBatchShape(
        rows=stage.micro_size,
        length=stage.data.max_length,
        trained_share=1.0,
        logits="none" if is_of_classifiers else "whole",
        on_cpu=config.cluster.device == "cpu",
        is_packed=False,
    )
    scoring: BytesByPart = {"activations": activation_memory(model, alone, load).evaluation}
    if stage.makes == "merged model":
        return _merging_phases(model, scoring, merged=count_parameters(model).total * (4.0 if is_cautious else width))
    held: BytesByPart = {"weights": base_bytes(model, config)}
    if config.tuning.is_adapter:
        held["weights"] += trainable_parameters(model, config) * 4.0
    elif stage.scores_base and not is_of_classifiers:
        held["frozen base"] = float(whole)
    blended = _blended_bytes(config, stage, whole=float(whole), adapter=trainable_parameters(model, config) * 4.0)
    other_models: BytesByPart = {"other models": _reward_models(stage) * base_bytes(model, config)}
    phases = [
        Phase(name="load", static=held, changing={}, host={"loading": float(whole), **blended}),
        Phase(name="evaluation", static=held, changing=scoring, host=blended),
    ]
    rollout = stage.generation
    if rollout is not None:
        sequences = min(rollout.generate_size, rollout.prompts * rollout.group_size)
        made = _generation(model, config, rollout, prompt=stage.data.max_length, sequences=sequences)
        phases.append(Phase(name="rollout", static={**held, **other_models}, changing=made, host=blended))
    return phases


def _blended_bytes(config: RunConfig, stage: StageSettings, *, whole: float, adapter: float) -> BytesByPart:
    """Host memory for the models of an interpolation or a soup."""
    is_adapter = config.tuning.is_adapter
    number = stage.models_on_host(is_adapter=is_adapter)
    return {"ingredients": number * (adapter if is_adapter else whole)} if number else {}


def _merging_phases(model: Architecture, scoring: BytesByPart, *, merged: float) -> list[Phase]:
    """The trained model in fp32, and the merged one."""
    whole = count_parameters(model).total * 4.0
    both: BytesByPart = {"weights": whole, "merged": merged}
    return [
        Phase(name="load", static={"weights": whole}, changing={}, host={"loading": whole}),
        Phase(name="evaluation", static=both, changing=scoring, host={}),
        Phase(name="save", static=both, changing={}, host={"artifact": merged}),
    ]


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
