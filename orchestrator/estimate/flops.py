"""Floating-point operations of training, by method; must not import torch.

N = matrix parameters that a token meets (without the input embedding), split into layers and head. F = attention of one token
forward: 2 matmuls x 2 FLOPs x (length / 2) keys on average under the causal mask x query width x layers. `length` is the row's
length, or with packed documents sum(l^2) / sum(l) over the documents' lengths l.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.architecture.adapter_parameters import multiplied_per_token
from orchestrator.architecture.layers import count_freeze_parameters, lowest_trained_layer
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, has_new_heads
from orchestrator.config.tuning import ADAPTER_TUNINGS, FreezeTuning


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Active matrix parameters per token."""

    layers: int
    """With the norms, which are next to nothing."""
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.head


def matrices_of(model: Architecture) -> Matrices:
    """In a mixture of experts only a token's active experts are counted."""
    untied = 0 if model.tie_word_embeddings else 1
    head = model.vocab_size * model.hidden_size
    return Matrices(layers=count_parameters(model).active - head - untied * head, head=head)


def attention_flops(model: Architecture, *, length: float) -> float:
    """F: attention of one token forward, in all layers."""
    return 2.0 * length * model.num_attention_heads * model.head_dim * model.num_hidden_layers


def flops_per_token(model: Architecture, config: RunConfig, *, length: float) -> float:
    """Useful FLOPs of one token, forward and backward: what MFU counts.

    Full fine-tuning: 6N + 3F. LoRA: 4N + 3F + 6 N_lora, since the frozen base needs no weight gradient. Recomputation is not
    useful work and is not counted.
    """
    matrices, attention = _computed(model, config).total, attention_flops(model, length=length)
    if isinstance(config.tuning, ADAPTER_TUNINGS):
        virtual = config.tuning.virtual_inputs / length
        return 4.0 * matrices * (1 + virtual) + 3.0 * attention + 6.0 * multiplied_per_token(model, config.tuning)
    if isinstance(config.tuning, FreezeTuning):
        return _freeze_flops(model, config.tuning, attention, has_new_head=has_new_heads(config))
    return 6.0 * matrices + 3.0 * attention


def _computed(model: Architecture, config: RunConfig) -> Matrices:
    """Without the head over the vocabulary where every stage has a new one, which is narrow."""
    parts = matrices_of(model)
    return replace(parts, head=0) if has_new_heads(config) else parts


def _freeze_flops(model: Architecture, tuning: FreezeTuning, attention: float, *, has_new_head: bool) -> float:
    """2N + F forward; backward 2N + 2F through everything above the lowest trained layer, 2 N_trained for the weights.

    Gradual unfreezing makes gradients for all that is ever trained from the first step.
    """
    parts = replace(matrices_of(model), head=0) if has_new_head else matrices_of(model)
    reached = 1.0 - lowest_trained_layer(model, tuning, has_new_head=has_new_head) / model.num_hidden_layers
    trained = count_freeze_parameters(model, tuning, has_new_head=has_new_head)
    forward = 2.0 * parts.total + attention
    return forward + 2.0 * (parts.layers * reached + parts.head) + 2.0 * attention * reached + 2.0 * trained


def executed_flops_per_token(model: Architecture, config: RunConfig, *, length: float) -> float:
    """FLOPs that the device executes for one token: the forward pass of recomputed layers twice.

    Then full fine-tuning takes 8N + 4F and LoRA 6N + 4F + 8 N_lora; the head is not recomputed.
    """
    useful = flops_per_token(model, config, length=length)
    share = config.model.recomputed_layers(model.num_hidden_layers) / model.num_hidden_layers
    again = 2.0 * matrices_of(model).layers + attention_flops(model, length=length)
    if isinstance(config.tuning, ADAPTER_TUNINGS):
        again += 2.0 * multiplied_per_token(model, config.tuning)
    return useful + share * again


def forward_flops_per_token(model: Architecture, config: RunConfig, *, length: float) -> float:
    """FLOPs of one token that is only scored: 2N + F, plus the adapter."""
    adapter = multiplied_per_token(model, config.tuning) if isinstance(config.tuning, ADAPTER_TUNINGS) else 0
    return 2.0 * (_computed(model, config).total + adapter) + attention_flops(model, length=length)
