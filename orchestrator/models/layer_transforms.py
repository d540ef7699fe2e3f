"""Transforms of whole layers: recomputed in backward to save memory, or compiled to save time. Must not know stages."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestrator.errors import ConfigError
from orchestrator.files.cache import compiled_folder
from orchestrator.models import attention


def recompute_layers(model: Any, *, every: int, **settings: Any) -> None:
    """Gradient checkpointing (1604.06174) of the first and every `every`-th layer; the others keep activations."""
    # The reentrant kind needs inputs that require a gradient, which those of a frozen base do not.
    model.gradient_checkpointing_enable({"use_reentrant": False, **settings})
    if every == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.checkpoint_every: {type(model).__name__} recomputes all its layers or none; type model.checkpoint_every=1"
        )
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0


def compile_layers(model: torch.nn.Module) -> int:
    """Compile each layer in place, once for all identical ones; return the number of layers.

    Attention by document stays outside: it depends on numbers that change with every batch.
    """
    # Compiling takes minutes at the first step; the next start finds its results here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_folder() / "inductor"))
    attention.register()
    by_document = torch.compiler.disable(attention.documents_attention)
    ALL_ATTENTION_FUNCTIONS.register(attention.DOCUMENTS, by_document)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            "model.compile: transformers does not identify the layers of this architecture; type model.compile=false"
        )
    for layer in layers:
        layer.compile()
    return len(layers)
