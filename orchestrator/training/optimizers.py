"""The optimizer and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from orchestrator.config.stages import OptimizerConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Trainable matrices with decay, vectors (biases, norms) without; an empty group is left out.

    DeepSpeed with LoRA and torch >= 2.10 crashes at the first step where a group is empty.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [parameter for _, parameter in trainable if num_dimensions(parameter) >= 2]
    vectors = [parameter for _, parameter in trainable if num_dimensions(parameter) < 2]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def num_dimensions(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the whole parameter; a ZeRO-3 shard keeps the whole shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (1711.05101) over the trainable parameters: fused, or with 8-bit states from bitsandbytes."""
    groups = parameter_groups(model.named_parameters(), settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, lr=settings.lr, betas=betas, eps=settings.epsilon)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of the coming step; a pure function of the step decides it, so that a resume needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr
