"""Facts of a model from its config.json, and the parameter counts that follow from them; must not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from orchestrator.architecture.families import Linear, family_of, linear_layers
from orchestrator.config.model import Architecture, FreezeTuning, FullTuning, LoraTuning
from orchestrator.config.tuning import AdapterTuning
from orchestrator.errors import ModelError

TIED = ("gpt2", "bert", "gemma", "gemma2", "gemma3_text")
"""Model types whose head is tied where config.json does not say."""


RELATIVES = {"roberta": "bert", "xlm-roberta": "bert", "camembert": "bert", "distilbert": "bert"}
"""Encoders with BERT's layers, taken for BERT; their tables of token types differ by a row or two."""
NOT_FORECAST = ("albert", "deberta", "deberta-v2", "electra", "modernbert", "xlnet")
"""Models whose layers are neither BERT's nor Llama's: a stage may train them, nothing is forecast."""
ENCODERS = ("bert",)
"""Families in which a token sees those behind it: they classify, and do not generate."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int
    embedding: int
    """Input embedding, and the head where it is not tied."""
    layer: int
    """One decoder layer."""
    active: int
    """Parameters that one token meets (fewer than `total` in a mixture of experts)."""


def read_architecture(folder: Path) -> Architecture | None:
    """The facts of a model folder; None where its config.json lacks what a decoder has, ModelError where a fact is absurd."""
    path = folder / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object; transformers' settings of a model are expected")
    raw = cast("dict[str, Any]", content)
    try:
        return _architecture(raw.get("text_config", raw))
    except KeyError:
        return None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}, not {item['input']}" for item in error.errors()]
        raise ModelError([f"{path}: {fault}" for fault in faults]) from None
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise ModelError(f"{path} is no model's config: {error}") from None


def _architecture(raw: dict[str, Any]) -> Architecture:
    """transformers' names, with older ones beside them; KeyError where one is missing, or the layers are of an unknown kind."""
    if raw["model_type"] in NOT_FORECAST:
        raise KeyError("model_type")
    heads: int = _first(raw, "num_attention_heads", "n_head", "n_heads")
    hidden: int = _first(raw, "hidden_size", "n_embd", "dim")
    given: str = raw["model_type"]
    kind = RELATIVES.get(given, given)
    learned = kind in ("gpt2", "bert")
    return Architecture(
        model_type=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw.get("moe_intermediate_size")
        or raw.get("n_inner")
        or raw.get("intermediate_size")
        or raw.get("hidden_dim")
        or _inner(raw, hidden),
        num_hidden_layers=_first(raw, "num_hidden_layers", "n_layer", "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        tie_word_embeddings=raw.get("tie_word_embeddings", kind in TIED),
        num_experts=raw.get("num_local_experts", raw.get("num_experts", 0)) or 0,
        num_experts_per_token=raw.get("num_experts_per_tok", 0) or 0,
        attention_bias=raw.get("attention_bias", False),
        feed_forward_bias=raw.get("mlp_bias", False),
        num_positions=_first(raw, "n_positions", "max_position_embeddings") if learned else 0,
        sliding_window=raw.get("sliding_window") if raw.get("use_sliding_window", True) else None,
    )


def _first(raw: dict[str, Any], *names: str) -> Any:
    """The value of the first name that is there."""
    for name in names:
        if name in raw:
            return raw[name]
    raise KeyError(names[0])


def _inner(raw: dict[str, Any], hidden: int) -> int:
    """GPT-2 leaves the inner width out: four times the hidden one."""
    if raw["model_type"] != "gpt2":
        raise KeyError("intermediate_size")
    return 4 * hidden


def count_parameters(model: Architecture) -> ParameterCounts:
    """Parameters of the causal model, or of the masked one where the family is an encoder."""
    family = family_of(model)
    linears = linear_layers(model)
    attention = sum(_size(linear) for linear in linears if linear.is_attention)
    if family.query_key_norms:
        attention += 2 * model.head_dim
    feed_forward = sum(_size(linear) for linear in linears if not linear.is_attention)
    norm = family.norm_vectors * model.hidden_size
    router = model.hidden_size * model.num_experts
    layer = attention + family.norms * norm + router + feed_forward * max(1, model.num_experts)
    active_layer = layer - feed_forward * (max(1, model.num_experts) - max(1, model.num_experts_per_token))
    embedding = _embeddings(model)
    rest = embedding + (norm if family.final_norm else 0) + _head_extras(model)
    return ParameterCounts(
        total=rest + layer * model.num_hidden_layers,
        embedding=embedding,
        layer=layer,
        active=rest + active_layer * model.num_hidden_layers,
    )


def _size(linear: Linear) -> int:
    return linear.inputs * linear.outputs + (linear.outputs if linear.has_bias else 0)


def _embeddings(model: Architecture) -> int:
    """Tables of tokens, positions and token types, and the head where it is not tied."""
    tables = model.vocab_size * (1 if model.tie_word_embeddings else 2) + model.num_positions
    return (tables + family_of(model).token_types) * model.hidden_size


def _head_extras(model: Architecture) -> int:
    """The bias of the head; an encoder's norm of the embeddings, and its dense layer and norm before the head."""
    family, hidden = family_of(model), model.hidden_size
    bias = model.vocab_size if family.head_bias else 0
    return bias + (2 * hidden + hidden * hidden + hidden + 2 * hidden if family.head_transform else 0)


def count_lora_parameters(model: Architecture, tuning: LoraTuning) -> int:
    """Sum of r (in + out) over the adapted layers (2106.09685); DoRA adds a magnitude for every output feature.

    In a mixture `all-linear` means attention, router and the fused experts as PEFT adapts them: one adapter of rank 2 r for
    gate and up of each expert, one of rank r for down. By name, attention alone can be chosen there.
    """
    is_all = tuning.target_modules == "all-linear"
    known = [linear for linear in linear_layers(model) if linear.is_attention or not model.num_experts]
    chosen = [linear for linear in known if is_all or linear.name in tuning.target_modules]
    per_layer = sum(tuning.rank * (linear.inputs + linear.outputs) for linear in chosen)
    if is_all and model.num_experts:
        hidden, inner, experts = model.hidden_size, model.intermediate_size, model.num_experts
        per_layer += tuning.rank * (hidden + experts + 2 * experts * (hidden + 2 * inner) + experts * (inner + hidden))
    magnitudes = sum(linear.outputs for linear in chosen) if tuning.use_dora else 0
    return (per_layer + magnitudes) * model.num_hidden_layers + _head_lora(model, tuning)


def _head_lora(model: Architecture, tuning: LoraTuning) -> int:
    """An encoder's dense layer before the head is adapted with the others."""
    is_meant = tuning.target_modules == "all-linear" or "dense" in tuning.target_modules
    if not family_of(model).head_transform or not is_meant:
        return 0
    return (2 * tuning.rank + (1 if tuning.use_dora else 0)) * model.hidden_size


def adapter_problems(model: Architecture, tuning: FullTuning | FreezeTuning | AdapterTuning) -> list[str]:
    """What PEFT cannot do with this model, one sentence each."""
    if not isinstance(tuning, LoraTuning) or not model.num_experts or tuning.target_modules != "all-linear":
        return []
    faults = {"use_dora=true": tuning.use_dora, f"dropout={tuning.dropout}": tuning.dropout > 0}
    return [
        f"tuning.{setting}: PEFT cannot do that for the fused experts of a mixture; type "
        f"tuning.target_modules=[{','.join(family_of(model).attention)}]"
        for setting, is_set in faults.items()
        if is_set
    ]
