"""A copy of a model with all of its kinds of layers, but narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from orchestrator.errors import ModelError

LAYERS, HIDDEN, VOCABULARY = 2, 128, 1024


def small_copy(base_folder: Path, *, attention: str, outputs: int | None = None) -> PreTrainedModel:
    """A model of the same class with two narrow layers. Raises ModelError if its configuration cannot be read."""
    kind = AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification
    head = {} if outputs is None else {"num_labels": outputs}
    try:
        config = AutoConfig.from_pretrained(str(base_folder), local_files_only=True, **head)
    except (OSError, ValueError) as error:
        raise ModelError(f"{base_folder} holds no configuration that transformers knows: {error}") from error
    narrow = narrowed(config)
    try:
        model = kind.from_config(narrow, attn_implementation=attention, dtype=torch.float32)
        _try(model)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError):
        config.num_hidden_layers = LAYERS  # where narrowing fails: widths may depend on each other
        model = kind.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model


def _try(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 4), dtype=torch.long))


def narrowed(config: Any) -> Any:
    """The configuration with two layers, small widths and a small vocabulary; heads keep their grouping."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    groups = heads // int(getattr(text, "num_key_value_heads", None) or heads)
    small: dict[str, int] = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 // groups),
        "head_dim": HIDDEN // 4,
        "vocab_size": VOCABULARY,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    for name, value in small.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:LAYERS]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return config
