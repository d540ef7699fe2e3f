"""Floating-point operations of training, by method; must not import torch."""

from __future__ import annotations

from orchestrator.architecture import count_lora_parameters, count_parameters
from orchestrator.config.model import Architecture, LoraTuning
from orchestrator.config.run import RunConfig


def flops_per_token(model: Architecture, config: RunConfig, *, length: int) -> float:
    """Useful FLOPs of one token, forward and backward.

    N = matrix parameters that a token meets (without the input embedding), F = attention of one token forward:
    2 matmuls x 2 FLOPs x (length / 2) keys on average under the causal mask x query width x layers. Full fine-tuning:
    6N + 3F. LoRA: 4N + 3F + 6 N_lora, since the frozen base needs no weight gradient. Recomputation is not useful
    work and is not counted.
    """
    counts = count_parameters(model)
    matrices = counts.active - model.vocab_size * model.hidden_size * (0 if model.tie_word_embeddings else 1)
    attention = 2.0 * length * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    if isinstance(config.tuning, LoraTuning):
        return 4.0 * matrices + 3.0 * attention + 6.0 * count_lora_parameters(model, config.tuning)
    return 6.0 * matrices + 3.0 * attention
