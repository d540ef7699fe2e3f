"""What part of the model is trained: all, some parameters, or an adapter; and which of it to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from orchestrator.architecture.layers import is_head, trained_names
from orchestrator.config.run import RunConfig
from orchestrator.config.tuning import (
    AdapterTuning,
    FreezeTuning,
    FullTuning,
    LoreftTuning,
)
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.models.causal_lm import attach_adapted_head
from orchestrator.models.layer_transforms import recompute_layers
from orchestrator.models.loading import load_model, load_scorer
from orchestrator.models.peft_adapters import (
    ADAPTER_WEIGHTS,
    PROMPT_WEIGHTS,
    adapter_settings,
    apply_loftq_init,
    save_initial_weights,
)
from orchestrator.models.reft import attach_reft, load_reft
from orchestrator.run_state.stage_context import StageContext

TRAINED_MARKS = ("lora_", "ia3_l", "vera_lambda_", "oft_R")
"""In the names of parameters trained by PEFT's adapters; it loads virtual tokens separately, and strictly."""


def build_policy(context: StageContext, dtype: torch.dtype, packed: bool) -> torch.nn.Module:
    """The causal model to train: the base, or the artifact of the stage that this one starts from."""
    start = context.start
    folder = start.folder if start is not None and start.kind.is_whole_model else context.base_folder
    model = apply_tuning(load_model(folder, context.config, weights_dtype=dtype, packed=packed), context.config)
    _start(model, context)
    return model


def _start(model: torch.nn.Module, context: StageContext) -> None:
    """Set an adapter's initial values if they are not PEFT's: those of the previous stage, or LoftQ's."""
    start, tuning = context.start, context.config.tuning
    if start is not None and start.kind.is_adapter:
        load_reft(model, start.folder) if tuning.is_reft else load_adapter(model, start.folder)
    elif tuning.is_loftq:
        assert context.config.quantization.is_4bit, "the configuration's rules ask for it"
        apply_loftq_init(model, context.base_folder)


def build_reward_model(context: StageContext, dtype: torch.dtype, packed: bool) -> torch.nn.Module:
    """A model with a new scalar head on whatever the stage starts from."""
    start = context.start
    folder = start.folder if start is not None and start.kind.is_whole_model else context.base_folder
    scorer = load_scorer(folder, context.config, weights_dtype=dtype, packed=packed)
    model = apply_tuning(scorer, context.config, task="SEQ_CLS")
    _start(model, context)
    hold_masters_in_fp32(model, context.config, dtype)  # PEFT leaves the head in the base's dtype
    return model


def hold_masters_in_fp32(model: torch.nn.Module, config: RunConfig, dtype: torch.dtype) -> None:
    """Hold trained parameters in fp32 unless DeepSpeed does: it keeps its own masters next to 16-bit parameters."""
    if dtype == torch.float32 or not config.sharding.is_deepspeed:
        cast_trained_to_fp32(model)


def cast_trained_to_fp32(model: torch.nn.Module) -> None:
    """Hold trained parameters in fp32, as DeepSpeed would next to their 16-bit copies."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(model: torch.nn.Module, folder: Path, *, name: str = "default") -> None:
    """Load an adapter's weights into a PEFT model made with the same settings. Raises CheckpointError."""
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder}: PEFT cannot load it: {' '.join(str(error).split())[:300]}") from None
    load_adapter_weights(model, weights, source=str(folder), name=name)


def load_adapter_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], *, source: str, name: str = "default"
) -> None:
    """The same for weights keyed as in an adapter's file; `source` names their origin."""
    from peft import set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    try:
        for path, module in model.named_modules():  # a head unknown to the adapter keeps its new weights
            if isinstance(module, ModulesToSaveWrapper):
                for key, parameter in module.modules_to_save[name].named_parameters():
                    weights.setdefault(f"{path}.{key}", parameter.detach())
        report: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: PEFT cannot load it: {' '.join(str(error).split())[:300]}") from None
    lost = [lost for lost in report.missing_keys if any(mark in lost for mark in TRAINED_MARKS) and f".{name}" in lost]
    unknown = [name for name in report.unexpected_keys if name != PROMPT_WEIGHTS]
    if lost or unknown:
        raise CheckpointError(f"{source}: PEFT lacks {lost[:5]} and does not recognise {unknown[:5]}")


def apply_tuning(
    model: PreTrainedModel, config: RunConfig, *, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> torch.nn.Module:
    """The module to train: all parameters (full tuning), the selected ones (freeze), or a PEFT model (adapter).

    Under SEQ_CLS the head is trained too, and saved with the adapter.
    """
    if config.model.gradient_checkpointing:
        recompute_layers(model, every=config.model.checkpoint_every)
        model.config.use_cache = False
    match config.tuning:
        case FullTuning():
            return model.requires_grad_(True)
        case FreezeTuning():
            freeze(model, config.tuning, has_new_head=task == "SEQ_CLS")
            hold_masters_in_fp32(model, config, model.dtype)
            return model
        case LoreftTuning():
            attach_reft(model, config.tuning)
            return model
        case _:
            return _with_adapter(model, config.tuning, task)


def freeze(model: PreTrainedModel, tuning: FreezeTuning, *, has_new_head: bool = False) -> None:
    """Make only the parameters selected by the settings trainable. ConfigError listing what exists if none match."""
    named = dict(model.named_parameters())
    trained = trained_names(list(named), tuning, is_tied=has_tied_head(model), has_new_head=has_new_head)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output head shares its matrix with the input embeddings."""
    head: Any = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _with_adapter(model: PreTrainedModel, tuning: AdapterTuning, task: str) -> torch.nn.Module:
    from peft import get_peft_model

    model.requires_grad_(False)
    unknown = _unmatched(model, tuning)
    if unknown:  # PEFT trains the others silently
        raise ConfigError(f"tuning.target_modules: {', '.join(unknown)}: no such layer; {_linear_layers(model)}")
    try:
        whole = head_modules(model) if task == "SEQ_CLS" else ()
        adapted = get_peft_model(model, adapter_settings(tuning, task, whole=whole))
    except ValueError as error:
        raise ConfigError(f"tuning.target_modules: {error}; {_linear_layers(model)}") from None
    if tuning.is_pissa:
        save_initial_weights(adapted)
    if task == "CAUSAL_LM":
        attach_adapted_head(model)
    return adapted


def cast_adapters_as_deepspeed(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast what was added to a sharded 4-bit base: DeepSpeed only casts models of which it has sharded nothing yet."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id") and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def keep_input_types(model: torch.nn.Module) -> None:
    """Under autocast, make LoRA layers accept 16-bit inputs unchanged.

    PEFT casts them to fp32 because the adapters are, and autocast casts them back to 16 bits: the same numbers, but two
    copies of every layer's input. The adapters stay fp32; autocast makes their 16-bit copies, which are small.
    """
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that turn hidden states into a classifier's answer: a pooler and a head, new or not."""
    prefix = f"{model.base_model_prefix}."
    heads = (name.removeprefix(prefix) for name, _ in model.named_parameters() if is_head(name))
    return sorted({name.split(".")[0] for name in heads})


def _unmatched(model: PreTrainedModel, tuning: AdapterTuning) -> list[str]:
    """Target module names that match no module of the model."""
    there = [f".{name}" for name, _ in model.named_modules()]
    return [wanted for wanted in tuning.named_modules if not any(name.endswith(f".{wanted}") for name in there)]


def _linear_layers(model: PreTrainedModel) -> str:
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return f"the linear layers of this model are {', '.join(sorted(linear))}"


def count_trainable(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a ZeRO-3 shard counts as the whole parameter."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
