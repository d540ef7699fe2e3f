"""Bytes of the frozen parameters; must not import torch."""

from __future__ import annotations

from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.estimate.model_states import NF4_BYTES, trainable_parameters


def frozen_bytes(
    model: Architecture, config: RunConfig, *, per_linear: float | None = None, per_embedding: float | None = None
) -> float:
    """Bytes of the frozen base at its real width (or at the given widths); 0 if everything is trained."""
    if config.tuning.freezes_parts:
        frozen = count_parameters(model).total - trainable_parameters(model, config)
        return frozen * (2.0 if config.model.dtype == "bfloat16" else 4.0)
    if not config.tuning.is_adapter:
        return 0.0
    counts = count_parameters(model)
    width = 2.0 if config.model.dtype == "bfloat16" else 4.0
    linear = NF4_BYTES if config.quantization.is_4bit else width
    return (counts.total - counts.embedding) * (linear if per_linear is None else per_linear) + counts.embedding * (
        width if per_embedding is None else per_embedding
    )
