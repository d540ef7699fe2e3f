"""Parameter counts from the facts of a model's config.json. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.architecture.families import Linear, family_of, linear_layers
from orchestrator.config.model import Architecture


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int
    embedding: int
    """Input embedding, and the head if it is not tied."""
    layer: int
    """One decoder layer."""
    active: int
    """Active parameters per token (fewer than `total` in a mixture of experts)."""


def count_parameters(model: Architecture) -> ParameterCounts:
    """Parameters of the causal model, or of the masked one for an encoder family."""
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
    """Tables of tokens, positions and token types, and the head if it is not tied."""
    tables = model.vocab_size * (1 if model.tie_word_embeddings else 2) + model.num_positions
    return (tables + family_of(model).token_types) * model.hidden_size


def _head_extras(model: Architecture) -> int:
    """The bias of the head; an encoder's norm of the embeddings, and its dense layer and norm before the head."""
    family, hidden = family_of(model), model.hidden_size
    bias = model.vocab_size if family.head_bias else 0
    return bias + (2 * hidden + hidden * hidden + hidden + 2 * hidden if family.head_transform else 0)
