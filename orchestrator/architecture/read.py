"""Reads a model's config.json into the facts that forecasts need. Must not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from orchestrator.config.model import Architecture
from orchestrator.errors import ModelError

TIED = ("gpt2", "bert", "gemma", "gemma2", "gemma3_text")
"""Model types whose head is tied by default."""


RELATIVES = {"roberta": "bert", "xlm-roberta": "bert", "camembert": "bert", "distilbert": "bert"}
"""Encoders with BERT's layers, treated as BERT; their token-type tables differ by a row or two."""


NOT_FORECAST = ("albert", "deberta", "deberta-v2", "electra", "modernbert", "xlnet")
"""Models whose layers are neither BERT's nor Llama's: a stage may train them, nothing is forecast."""


ENCODERS = ("bert",)
"""Families with bidirectional attention: they classify and cannot generate."""


def read_architecture(folder: Path) -> Architecture | None:
    """The facts of a model folder; None if its config.json lacks a decoder's facts, ModelError if a fact is absurd."""
    path = folder / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object; a model's transformers configuration is expected")
    raw = cast("dict[str, Any]", content)
    try:
        return _architecture(raw.get("text_config", raw))
    except KeyError:
        return None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}, not {item['input']}" for item in error.errors()]
        raise ModelError([f"{path}: {fault}" for fault in faults]) from None
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise ModelError(f"{path} is not a model's config: {error}") from None


def _architecture(raw: dict[str, Any]) -> Architecture:
    """Facts by transformers' names or older ones; KeyError if one is missing, or the layers are of an unknown kind."""
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
    """The value of the first name present."""
    for name in names:
        if name in raw:
            return raw[name]
    raise KeyError(names[0])


def _inner(raw: dict[str, Any], hidden: int) -> int:
    """Inner width of the feed-forward; GPT-2 omits it: four times the hidden one."""
    if raw["model_type"] != "gpt2":
        raise KeyError("intermediate_size")
    return 4 * hidden
