"""The optimizer and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from orchestrator.architecture.layers import count_layers, is_head, levels_of, rates_of
from orchestrator.config.training import OptimizerConfig
from orchestrator.errors import ConfigError
from orchestrator.training.gradual_unfreezing import LEVEL

RATE = "rate"
"""Key of a parameter group: its multiple of the step's learning rate."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: OptimizerConfig,
    *,
    is_gradual: bool = False,
    lora_plus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices with decay, vectors (biases, norms) without; split further if
    rates differ by layer or between LoRA's A and B (LoRA+, 2402.12354), or if layers open gradually. No group is empty.

    DeepSpeed with LoRA and torch >= 2.10 crashes at the first step if a group is empty.
    """
    named = dict(named_parameters)
    trainable = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    num_layers = count_layers(named)
    rates = rates_of(trainable, num_layers, settings.layer_decay) | _head_rates(trainable, settings)
    levels = levels_of(trainable, num_layers) if is_gradual else dict.fromkeys(trainable, 0)
    groups: dict[tuple[int, float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable.items():
        share = rates[name] * (lora_plus_ratio or 1.0 if ".lora_B." in name else 1.0)
        key = (levels[name], -share, num_dimensions(parameter) < 2)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[2] else settings.weight_decay, RATE: -key[1], LEVEL: key[0]}
        for key in sorted(groups)
    ]


def _head_rates(trainable: Iterable[str], settings: OptimizerConfig) -> dict[str, float]:
    """Multiples of the peak rate for trained parameters outside the layers. ConfigError if there are none."""
    if settings.head_lr is None:
        return {}
    heads = [name for name in trainable if is_head(name)]
    if not heads:
        raise ConfigError(
            "optimizer.head_lr: no separate head is trained (one tied to the embeddings does not count); "
            "type optimizer.head_lr=null"
        )
    return dict.fromkeys(heads, settings.head_lr / settings.lr)


def num_dimensions(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the whole parameter; a ZeRO-3 shard keeps the full shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(
    model: torch.nn.Module,
    settings: OptimizerConfig,
    *,
    is_gradual: bool = False,
    lora_plus_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """AdamW (1711.05101) over the trainable parameters: torch's fused one, or bitsandbytes' (8-bit or paged states)."""
    groups = parameter_groups(
        model.named_parameters(), settings, is_gradual=is_gradual, lora_plus_ratio=lora_plus_ratio
    )
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon, fused=True)
    from bitsandbytes.optim import adamw

    kinds = {
        "adamw_8bit": adamw.AdamW8bit,
        "adamw_8bit_paged": adamw.PagedAdamW8bit,
        "adamw_paged": adamw.PagedAdamW32bit,
    }
    return kinds[settings.name](groups, lr=settings.lr, betas=betas, eps=settings.epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the coming step; it is a pure function of the step, so resuming needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[RATE]
