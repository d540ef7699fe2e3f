"""The layer layout of a family of models, by transformers' name of the architecture. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.model import Architecture

HasBias = Literal["none", "config", "all", "qkv"]
"""`config`: as set by the model's attention_bias and feed_forward_bias; `qkv`: all but the output of attention."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The layer layout as determined by model_type alone."""

    attention: tuple[str, ...]
    """q, k, v and output; or one fused matrix and the output."""
    feed_forward: tuple[str, ...]
    """gate, up and down; a fused gate-up and down; or, without a gate, up and down."""
    gated: bool
    bias: HasBias
    norm_vectors: Literal[1, 2]
    """1: scale (RMS norm); 2: scale and shift (layer norm)."""
    norms: int
    """Number of norms over the hidden width in a layer."""
    final_norm: bool
    query_key_norms: bool
    """RMS norms of one head's width over queries and keys."""
    head_bias: bool
    head_transform: bool
    """A dense layer and a norm before the head, as masked language models have them."""
    token_types: int
    """Rows of a second table of embeddings."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer of a decoder or encoder layer."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool
    is_attention: bool


def _decoder(*, bias: HasBias = "config", norms: int = 2, query_key_norms: bool = False, fused: bool = False) -> Family:
    """Llama and its relatives: gated, with RMS norms."""
    return Family(
        attention=("qkv_proj", "o_proj") if fused else ("q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forward=("gate_up_proj", "down_proj") if fused else ("gate_proj", "up_proj", "down_proj"),
        gated=True,
        bias=bias,
        norm_vectors=1,
        norms=norms,
        final_norm=True,
        query_key_norms=query_key_norms,
        head_bias=False,
        head_transform=False,
        token_types=0,
    )


def _older(
    attention: tuple[str, ...],
    feed_forward: tuple[str, ...],
    *,
    norms: int = 2,
    head_bias: bool = False,
    is_encoder: bool = False,
) -> Family:
    """GPT and its relatives: no gate, layer norms, biases everywhere."""
    return Family(
        attention=attention,
        feed_forward=feed_forward,
        gated=False,
        bias="all",
        norm_vectors=2,
        norms=norms,
        final_norm=not is_encoder,
        query_key_norms=False,
        head_bias=head_bias,
        head_transform=is_encoder,
        token_types=2 if is_encoder else 0,
    )


FAMILIES = {
    "llama": _decoder(),
    "mistral": _decoder(bias="none"),
    "mixtral": _decoder(bias="none"),
    "qwen2": _decoder(bias="qkv"),
    "qwen3": _decoder(query_key_norms=True),
    "qwen3_moe": _decoder(query_key_norms=True),
    "gemma": _decoder(),
    "gemma2": _decoder(norms=4),
    "gemma3_text": _decoder(norms=4, query_key_norms=True),
    "phi3": _decoder(bias="none", fused=True),
    "phi": _older(("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2"), norms=1, head_bias=True),
    "gpt2": _older(("c_attn", "c_proj"), ("c_fc", "c_proj")),
    "gpt_neox": _older(("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
    "bert": _older(("query", "key", "value", "dense"), ("dense", "dense"), head_bias=True, is_encoder=True),
}


def family_of(model: Architecture) -> Family:
    """The family; an unknown model type is assumed to be built like Llama."""
    return FAMILIES[model.model_type] if model.model_type in FAMILIES else FAMILIES["llama"]


def linear_layers(model: Architecture) -> tuple[Linear, ...]:
    """The linear layers of one layer, in order (of one expert in a mixture; its router is not among them)."""
    family = family_of(model)
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    columns = (queries, keys, keys) if len(family.attention) == 4 else (queries + 2 * keys,)
    attention = [*((hidden, width) for width in columns), (queries, hidden)]
    inner = model.intermediate_size
    up = [(hidden, inner)] * (len(family.feed_forward) - 1)
    if family.gated and len(up) == 1:
        up = [(hidden, 2 * inner)]
    shapes = [*attention, *up, (inner, hidden)]
    names = (*family.attention, *family.feed_forward)
    return tuple(
        Linear(
            name=name,
            inputs=rows,
            outputs=width,
            has_bias=_has_bias(model, index),
            is_attention=index < len(family.attention),
        )
        for index, (name, (rows, width)) in enumerate(zip(names, shapes, strict=True))
    )


def _has_bias(model: Architecture, index: int) -> bool:
    family = family_of(model)
    is_attention = index < len(family.attention)
    match family.bias:
        case "none":
            return False
        case "all":
            return True
        case "qkv":
            return index < len(family.attention) - 1
        case "config":
            return model.attention_bias if is_attention else model.feed_forward_bias
