"""Facts of a model from its config.json, and the parameter counts that follow from them; must not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from orchestrator.config.model import Architecture, FullTuning, LoraTuning
from orchestrator.errors import ModelError

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_LINEARS = ("gate_proj", "up_proj", "down_proj")


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
    heads: int = raw["num_attention_heads"]
    hidden: int = raw["hidden_size"]
    return Architecture(
        model_type=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        num_experts=raw.get("num_local_experts", raw.get("num_experts", 0)) or 0,
        num_experts_per_token=raw.get("num_experts_per_tok", 0) or 0,
    )


def linear_shapes(model: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) features of the linear layers of one decoder layer (of one expert in a mixture)."""
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, model.intermediate_size),
        "up_proj": (hidden, model.intermediate_size),
        "down_proj": (model.intermediate_size, hidden),
    }


def count_parameters(model: Architecture) -> ParameterCounts:
    """Parameters of a decoder with gated feed-forward and RMS norms (Llama and its relatives)."""
    sizes = {name: rows * columns for name, (rows, columns) in linear_shapes(model).items()}
    attention = sum(sizes[name] for name in ATTENTION_LINEARS)
    if model.model_type == "qwen2":  # biases of q, k, v
        attention += sum(linear_shapes(model)[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    if model.model_type.startswith("qwen3"):  # norms of q and k
        attention += 2 * model.head_dim
    feed_forward = sum(sizes[name] for name in FEED_FORWARD_LINEARS)
    norms = 2 * model.hidden_size
    router = model.hidden_size * model.num_experts
    layer = attention + norms + router + feed_forward * max(1, model.num_experts)
    active_layer = attention + norms + router + feed_forward * max(1, model.num_experts_per_token)
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    rest = embedding + model.hidden_size
    return ParameterCounts(
        total=rest + layer * model.num_hidden_layers,
        embedding=embedding,
        layer=layer,
        active=rest + active_layer * model.num_hidden_layers,
    )


def count_lora_parameters(model: Architecture, tuning: LoraTuning) -> int:
    """Sum of r (in + out) over the adapted layers (2106.09685); DoRA adds a magnitude for every output feature.

    In a mixture `all-linear` means attention, router and the fused experts as PEFT adapts them: one adapter of rank 2 r for
    gate and up of each expert, one of rank r for down. By name, attention alone can be chosen there.
    """
    shapes = linear_shapes(model)
    known = ATTENTION_LINEARS if model.num_experts else ATTENTION_LINEARS + FEED_FORWARD_LINEARS
    is_all = tuning.target_modules == "all-linear"
    names = [name for name in known if is_all or name in tuning.target_modules]
    per_layer = sum(tuning.rank * (shapes[name][0] + shapes[name][1]) for name in names)
    if is_all and model.num_experts:
        hidden, inner, experts = model.hidden_size, model.intermediate_size, model.num_experts
        per_layer += tuning.rank * (hidden + experts + 2 * experts * (hidden + 2 * inner) + experts * (inner + hidden))
    magnitudes = sum(shapes[name][1] for name in names) if tuning.use_dora else 0
    return (per_layer + magnitudes) * model.num_hidden_layers


def adapter_problems(model: Architecture, tuning: FullTuning | LoraTuning) -> list[str]:
    """What PEFT cannot do with this model, one sentence each."""
    if not isinstance(tuning, LoraTuning) or not model.num_experts or tuning.target_modules != "all-linear":
        return []
    faults = {"use_dora=true": tuning.use_dora, f"dropout={tuning.dropout}": tuning.dropout > 0}
    return [
        f"tuning.{setting}: PEFT cannot do that for the fused experts of a mixture; type "
        f"tuning.target_modules=[{','.join(ATTENTION_LINEARS)}]"
        for setting, is_set in faults.items()
        if is_set
    ]
