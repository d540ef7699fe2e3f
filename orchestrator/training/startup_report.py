"""What a stage reports before its first step: its size, its kernels, its FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.architecture.kernels import attention_of_stage
from orchestrator.architecture.read import read_architecture
from orchestrator.estimate.flops import flops_per_token
from orchestrator.models.causal_lm import head_of
from orchestrator.models.tuning import count_trainable
from orchestrator.run_state.recorder import Recorder
from orchestrator.run_state.stage_context import StageContext, training_stage
from orchestrator.training.throughput import attended_tokens


def log_model_size(record: Recorder, model: torch.nn.Module) -> None:
    trainable, total = count_trainable(model)
    record.event("model", trainable_parameters=trainable, parameters=total)
    record.log(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")


def log_kernels(context: StageContext, record: Recorder, model: torch.nn.Module, device: torch.device) -> None:
    """Report attention and loss head, in the plan's wording."""
    tuned: Any = model
    base = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
    attention = attention_of_stage(
        context.config,
        training_stage(context),
        read_architecture(context.base_folder),
        device.type,
        name=base.config._attn_implementation,
    )
    head = head_of(model, device, is_summed=training_stage(context).sums_logprobs)
    record.event("attention", attention=attention)
    record.event("head", head=head)
    record.log(f"attention: {attention}")
    record.log(f"loss head: {head}")


def flops_of(context: StageContext) -> float | None:
    architecture = read_architecture(context.base_folder)
    if architecture is None:
        return None
    return flops_per_token(architecture, context.config, length=attended_tokens(context))


def peak_flops(context: StageContext) -> float | None:
    peak = context.config.cluster.hardware.peak_tflops
    return None if peak is None else peak * 1e12 * context.config.world_size
