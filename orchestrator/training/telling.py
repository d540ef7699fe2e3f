"""What a stage tells of itself before its first step: its size, its loss head, its FLOPs."""

from __future__ import annotations

import torch

from orchestrator.architecture import read_architecture
from orchestrator.estimate.flops import flops_per_token
from orchestrator.training.causal import head_of
from orchestrator.training.context import Context, Record
from orchestrator.training.measuring import attended_tokens
from orchestrator.training.tuning import count_trainable


def tell_size(record: Record, model: torch.nn.Module) -> None:
    trainable, total = count_trainable(model)
    record.event("model", trainable_parameters=trainable, parameters=total)
    record.say(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")


def tell_head(record: Record, model: torch.nn.Module, device: torch.device) -> None:
    head = head_of(model, device)
    record.event("head", head=head)
    record.say(f"loss head: {head}")


def flops_of(context: Context) -> float | None:
    architecture = read_architecture(context.base_folder)
    if architecture is None:
        return None
    return flops_per_token(architecture, context.config, length=attended_tokens(context))


def peak_flops(context: Context) -> float | None:
    peak = context.config.cluster.hardware.peak_tflops
    return None if peak is None else peak * 1e12 * context.config.world_size
