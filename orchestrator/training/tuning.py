"""What of the model is trained: full or LoRA; and what of it is worth saving."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from orchestrator.config.model import FullTuning, LoraTuning
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError


def apply_tuning(model: PreTrainedModel, config: RunConfig) -> torch.nn.Module:
    """The module to train: every parameter under full tuning, a PEFT model under LoRA. Base weights are frozen there."""
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    match config.tuning:
        case FullTuning():
            return model.requires_grad_(True)
        case LoraTuning():
            return _with_lora(model, config.tuning)


def _with_lora(model: PreTrainedModel, tuning: LoraTuning) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    targets: Any = tuning.target_modules
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=int(tuning.alpha) if tuning.alpha == int(tuning.alpha) else tuning.alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        names = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise ConfigError(
            f"tuning.target_modules: {error}; the linear layers of this model are {', '.join(names)}"
        ) from None


def count_trainable(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a ZeRO-3 shard counts as the whole parameter."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
