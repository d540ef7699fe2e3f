"""Models with given facts and settings as the trainer would build them, without reading weights: for memory traces."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig

from orchestrator.architecture.families import family_of
from orchestrator.config.model import Architecture
from orchestrator.config.tuning import LoraTuning
from orchestrator.models.layer_transforms import recompute_layers
from orchestrator.models.peft_adapters import lora_settings
from orchestrator.models.tracing.live_bytes import CudaAutocast, Precision

AttentionPath = Literal["sdpa", "masked", "eager"]
"""A fused kernel without a mask (flash; by document on CUDA), a fused kernel with a dense mask, and no fused kernel."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How the model is trained, as far as its activations depend on it."""

    precision: Precision
    checkpoint_every: int
    """Recompute every n-th layer; 0 recomputes none."""
    attention: AttentionPath
    lora: LoraTuning | None


def transformers_config(model: Architecture) -> PretrainedConfig:
    """transformers' configuration of a model with these facts; no attention dropout: fused kernels keep no mask."""
    facts = model.model_dump(include={"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"})
    facts |= {"num_attention_heads": model.num_attention_heads, "tie_word_embeddings": model.tie_word_embeddings}
    facts |= {"attn_pdrop": 0.0} if model.model_type == "gpt2" else {}
    facts |= {"attention_probs_dropout_prob": 0.0} if model.model_type == "bert" else {}
    if family_of(model).gated or model.model_type == "phi":
        facts["num_key_value_heads"] = model.num_key_value_heads
    if family_of(model).gated and model.model_type != "phi3":
        facts |= {
            "head_dim": model.head_dim,
            "attention_bias": model.attention_bias,
            "mlp_bias": model.feed_forward_bias,
        }
    if model.model_type == "gpt2":
        facts |= {"n_inner": facts.pop("intermediate_size"), "n_positions": model.num_positions}
    if model.model_type == "bert":
        facts["max_position_embeddings"] = model.num_positions
    if model.model_type == "phi3":
        facts |= {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    if model.sliding_window is not None:
        facts |= {"sliding_window": model.sliding_window}
    return AutoConfig.for_model(model.model_type, **facts, **_experts(model))


def _experts(model: Architecture) -> dict[str, Any]:
    if not model.num_experts:
        return {}
    if model.model_type == "mixtral":
        return {"num_local_experts": model.num_experts, "num_experts_per_tok": model.num_experts_per_token}
    return {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_token,
        "moe_intermediate_size": model.intermediate_size,
    }


def build_model(model: Architecture, mode: Mode) -> torch.nn.Module:
    """The module to train; parameters have the dtypes that the trainer gives them."""
    register_paths()
    held = mode.precision != "float32" and (mode.precision == "bfloat16" or mode.lora is not None)
    kind = AutoModelForMaskedLM if model.model_type == "bert" else AutoModelForCausalLM
    built: Any = kind.from_config(
        transformers_config(model),
        attn_implementation="eager" if mode.attention == "eager" else f"traced_{mode.attention}",
        dtype=torch.bfloat16 if held else torch.float32,
    )
    if mode.checkpoint_every:
        recompute_layers(built, every=mode.checkpoint_every, context_fn=_recomputed_as_on_cuda)
    if mode.lora is None:
        return built
    from peft import get_peft_model

    built.requires_grad_(False)
    adapted = get_peft_model(
        built, lora_settings(mode.lora, "CAUSAL_LM" if model.model_type != "bert" else "FEATURE_EXTRACTION")
    )
    return adapted.to(torch.bfloat16) if mode.precision == "bfloat16" else adapted


def _recomputed_as_on_cuda() -> tuple[nullcontext[None], CudaAutocast]:
    return nullcontext(), CudaAutocast()


def register_paths() -> None:
    """Register the fused paths with transformers, whose own mask checks read tensors, which a trace does not allow."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, mask in (("traced_sdpa", _no_mask), ("traced_masked", _dense_mask)):
        ALL_ATTENTION_FUNCTIONS.register(name, sdpa_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)


def _no_mask(**_: Any) -> None:
    return None


def _dense_mask(*, batch_size: int, q_length: int, kv_length: int, **_: Any) -> torch.Tensor:
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
