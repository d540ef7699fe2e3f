"""PEFT settings of every adapter, and what PEFT itself does not handle correctly for us: initial values and saving."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.config.tuning import (
    AdaloraTuning,
    AdapterTuning,
    Ia3Tuning,
    LoraTuning,
    LoreftTuning,
    OftTuning,
    PrefixTuning,
    PromptTuning,
    VeraTuning,
)
from orchestrator.config.tuning_method import TuningMethod
from orchestrator.distributed.gather import gathered
from orchestrator.errors import ModelError
from orchestrator.tensors.reader import TensorFolder

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROMPT_WEIGHTS = "prompt_embeddings"
"""PEFT's name for the weights saved by prompt and prefix tuning."""


def adapter_settings(tuning: AdapterTuning, task: str = "CAUSAL_LM", *, whole: Sequence[str] = ()) -> Any:
    """PEFT's settings; modules named in `whole` are trained in full, and saved."""
    settings = _settings(tuning, task)
    if whole:
        settings.modules_to_save = list(whole)
    return settings


def _settings(tuning: AdapterTuning, task: str) -> Any:
    match tuning:
        case LoraTuning():
            return lora_settings(tuning, task)
        case Ia3Tuning() | VeraTuning() | OftTuning() | AdaloraTuning():
            return _layer_settings(tuning, task)
        case PromptTuning() | PrefixTuning():
            return _virtual_token_settings(tuning, task)
        case LoreftTuning():
            raise AssertionError("LoReFT is not PEFT's")


def lora_settings(tuning: LoraTuning, task: str = "CAUSAL_LM") -> Any:
    """PEFT's settings for LoRA. LoftQ's values are inserted later: PEFT's own way needs an unquantised base."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=tuning.rank,
        lora_alpha=whole(tuning.alpha),  # pyright: ignore[reportArgumentType]  # PEFT takes any number
        lora_dropout=tuning.dropout,
        target_modules=modules_of(tuning.target_modules),
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
        init_lora_weights=tuning.init if tuning.is_pissa else True,  # pyright: ignore[reportArgumentType]  # `pissa_niter_N` for any N
    )


def _layer_settings(tuning: Ia3Tuning | VeraTuning | OftTuning | AdaloraTuning, task: str) -> Any:
    from peft import AdaLoraConfig, IA3Config, OFTConfig, VeraConfig

    common: dict[str, Any] = {"task_type": task, "target_modules": modules_of(tuning.target_modules)}
    match tuning:
        case Ia3Tuning():
            return IA3Config(**common, feedforward_modules=list(tuning.feedforward_modules))
        case VeraTuning():
            with warnings.catch_warnings():  # it warns that A and B are remade from their seed: intended
                warnings.simplefilter("ignore")
                return VeraConfig(
                    **common,
                    r=tuning.rank,
                    vera_dropout=tuning.dropout,
                    d_initial=tuning.d_initial,
                    projection_prng_key=tuning.projection_seed,
                    save_projection=False,
                )
        case OftTuning():
            return OFTConfig(
                **common, r=0, oft_block_size=tuning.block_size, use_cayley_neumann=tuning.use_cayley_neumann
            )
        case AdaloraTuning():
            return AdaLoraConfig(
                **common,
                target_r=tuning.rank,
                init_r=tuning.initial_rank,
                lora_alpha=whole(tuning.alpha),  # pyright: ignore[reportArgumentType]  # PEFT takes any number
                lora_dropout=tuning.dropout,
                total_step=1,  # the real number is known only with the rows: RankAllocation has the real schedule
                tinit=0,
                tfinal=0,
                deltaT=tuning.allocate_every_steps,
                beta1=tuning.beta1,
                beta2=tuning.beta2,
                orth_reg_weight=tuning.orthogonal_weight,
            )


def _virtual_token_settings(tuning: PromptTuning | PrefixTuning, task: str) -> Any:
    from peft import PrefixTuningConfig, PromptTuningConfig

    if isinstance(tuning, PrefixTuning):
        return PrefixTuningConfig(task_type=task, num_virtual_tokens=tuning.virtual_tokens, prefix_projection=False)
    init = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[tuning.init]
    return PromptTuningConfig(task_type=task, num_virtual_tokens=tuning.virtual_tokens, prompt_tuning_init=init)


def whole(number: float) -> float:
    """An int for whole numbers, as PEFT writes them into its settings."""
    return int(number) if number == int(number) else number


def modules_of(targets: str | tuple[str, ...]) -> Any:
    return targets if isinstance(targets, str) else list(targets)


def save_initial_weights(model: Any) -> None:
    """Remember PiSSA's initial A and B, which were subtracted from the base (`plain_lora`)."""
    model.initial_weights = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def with_initial_weights(model: Any, name: str, values: torch.Tensor) -> torch.Tensor:
    """PiSSA's trained factor as one of LoRA of twice the rank on the original base; other tensors are unchanged.

    W0 - s B0 A0 + s B A = W0 + s [B, -B0] [A; A0] (PEFT converts in the same way). Anyone can load it, and with the
    adapter off the base is unchanged. `double_rank` adapts the settings.
    """
    first: Mapping[str, torch.Tensor] = getattr(model, "initial_weights", {})
    if name not in first:
        return values
    initial = first[name].to(values.device)
    return torch.cat([values, initial], dim=0) if ".lora_A." in name else torch.cat([values, -initial], dim=1)


def double_rank(model: Any) -> None:
    """Adapt the model's settings to factors from `with_initial_weights`."""
    from peft import LoraConfig

    settings: LoraConfig = model.peft_config["default"]
    settings.init_lora_weights = True
    settings.r *= 2  # alpha too, so that the scale is unchanged: alpha / r, or alpha / sqrt(r) under rsLoRA
    settings.lora_alpha = whole(settings.lora_alpha * (2**0.5 if settings.use_rslora else 2))  # pyright: ignore[reportAttributeAccessIssue]  # PEFT takes any number


@torch.no_grad()
def apply_loftq_init(model: Any, folder: Path) -> None:
    """LoftQ's first step (2310.08659, algorithm 1) on a base in 4 bits: s B A is the best approximation of W - Q(W).

    `folder` holds the weights before rounding. PEFT's own function needs a GPU and ignores the scale s.
    """
    from peft.tuners.lora import Linear4bit
    from peft.utils.loftq_utils import _low_rank_decomposition

    written = TensorFolder.open(folder, fault=ModelError)
    for path, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        layer: Any = module
        exact = _as_written(written, model, f"{path.removeprefix('base_model.model.')}.weight")
        with gathered(layer.base_layer.weight):
            rounded = dequantised(layer.base_layer)
        # On the layer's device: on a host, the decompositions of a large model take hours.
        parts = _low_rank_decomposition(exact.to(rounded.device).float() - rounded, layer.r["default"])
        layer.lora_A["default"].weight.copy_(parts["R"])
        layer.lora_B["default"].weight.copy_(parts["L"] / layer.scaling["default"])


def _as_written(tensors: TensorFolder, model: Any, name: str) -> torch.Tensor:
    """A weight by its name in the model: files of a bare backbone leave out its prefix."""
    bare = name.removeprefix(f"{model.get_base_model().base_model_prefix}.")
    return tensors.read(name if name in tensors else bare)


def dequantised(layer: Any) -> torch.Tensor:
    """The weights of a 4-bit layer as used in its computation, fp32."""
    import bitsandbytes.functional as bnb

    whole_weight: Any = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return whole_weight.float()


def save_adapter_settings(model: Any, names: Sequence[str], folder: Path, tuning: TuningMethod) -> None:
    """Write PEFT's settings of an adapter with these trained parameters."""
    settings = model.peft_config["default"]
    if tuning.virtual_token_count:
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
        return
    # PEFT writes its settings next to weights only: empty ones, put in the place of the real file meanwhile.
    weights, aside = folder / ADAPTER_WEIGHTS, folder / f".{ADAPTER_WEIGHTS}"
    weights.rename(aside)
    model.save_pretrained(folder, state_dict={name: torch.empty(0) for name in names}, selected_adapters=["default"])
    aside.replace(weights)


def saved_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trained parameters by the names, and cut to the ranks, that PEFT's file has."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, state_dict=dict(weights))
    assert len(saved) == len(weights), "PEFT saves every trained parameter under a name of its own"
    return saved
