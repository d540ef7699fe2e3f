"""Fetches the base model to a local folder and loads it: quantised or not, whole or as ZeRO-3 shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from orchestrator.architecture.base_model import find_base, hub_is_offline, package_gguf
from orchestrator.architecture.kernels import DOCUMENTS, attention_name
from orchestrator.config.model import ModelConfig, Nf4Quantization
from orchestrator.config.run import RunConfig
from orchestrator.errors import ModelError
from orchestrator.models import attention
from orchestrator.models.causal_lm import NOT_FOR_A_BACKBONE, attach_head
from orchestrator.models.gguf_conversion import dequantise
from orchestrator.models.weight_stream import load_streamed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def silence_libraries() -> None:
    """Keep progress bars and library chatter out of the logs; errors remain."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_log

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional kernel package that is not needed
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # raised inside PEFT

    warnings.filterwarnings(
        "ignore", message=".*vera_A and vera_B.*", category=UserWarning
    )  # PEFT remakes them from their seed
    warnings.filterwarnings(
        "ignore", message="Position ids are not supported.*", category=UserWarning
    )  # positions count from 0

    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()


def fetch_base(model: ModelConfig, *, cache: Path, say: Callable[[str], None]) -> Path:
    """A local folder with config, safetensors and tokenizer; dequantises or downloads if needed."""
    base = find_base(model)
    match base.source:
        case "folder":
            return Path(base.location)
        case "package":
            gguf = package_gguf(base.location)
            assert gguf is not None, "find_base saw it"
            return dequantise(gguf, cache=cache, say=say)
        case "hub":
            return _downloaded(model, say=say)


def load_model(folder: Path, config: RunConfig, *, weights_dtype: torch.dtype, packed: bool = False) -> PreTrainedModel:
    """The base model in `weights_dtype`, or in 4 bits: on the rank's device, or as ZeRO-3 shards (`load_streamed`).

    `packed` means that its rows contain several documents, which must not see each other.
    """
    options: dict[str, Any] = {"dtype": weights_dtype, "attn_implementation": attention_of(config, packed=packed)}
    if config.quantization.is_4bit:
        options["quantization_config"] = nf4_settings(config)
    try:
        model, _ = load_streamed(AutoModelForCausalLM, folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    disable_cpu_weight_repacking(model)
    attach_head(model, choice=config.model.loss_head)
    return model


def load_scorer(folder: Path, config: RunConfig, *, weights_dtype: torch.dtype, packed: bool) -> PreTrainedModel:
    """A sequence-classification model with one label that scores *every* token; the caller reads the end of a text.

    transformers locates the last token by its id, which is wrong if padding is the end token or one occurs in the
    prompt. Raises ModelError if the architecture has no such head.
    """
    options: dict[str, Any] = {"dtype": weights_dtype, "attn_implementation": attention_of(config, packed=packed)}
    if config.quantization.is_4bit:
        options["quantization_config"] = nf4_settings(config, skip=("score",))
    try:
        model, _ = load_streamed(AutoModelForSequenceClassification, folder, num_labels=1, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as a reward model: {' '.join(str(error).split())[:300]}"
        ) from error
    if not hasattr(model, "score"):
        raise ModelError(
            f"{folder}: {type(model).__name__} has no head named score; use a decoder such as Llama or Qwen"
        )
    model.config.pad_token_id = model.config.pad_token_id or 0
    disable_cpu_weight_repacking(model)
    return _scoring_every_token(model)


def _scoring_every_token(model: Any) -> PreTrainedModel:
    """Make the forward pass return (B, T, 1) scores; the class keeps its name, which config.json will contain."""
    original = type(model)

    def forward(self: Any, input_ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        known = {name: value for name, value in inputs.items() if value is not None and name not in NOT_FOR_A_BACKBONE}
        backbone = getattr(self, self.base_model_prefix)
        return self.score(backbone(input_ids=input_ids, **known).last_hidden_state)

    model.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    return model


def attention_of(config: RunConfig, *, packed: bool) -> str:
    """transformers' name of the attention: `auto` computes packed rows document by document, others by sdpa."""
    name = attention_name(config.model.attention, packed=packed)
    if name == DOCUMENTS:
        attention.register()
    return name


def disable_cpu_weight_repacking(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights for a CPU's AVX-512 in evaluation.

    It replaces `weight.data` behind ZeRO-3's back (the base silently changes), and fails for layers whose input
    width is not a multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]  # a plain attribute of bitsandbytes' layers


def weights_dtype(config: RunConfig, *, uses_deepspeed: bool) -> torch.dtype:
    """Type of the loaded weights.

    A frozen base is held in `model.dtype`. Trained weights have fp32 masters: held by DeepSpeed itself, or loaded as
    fp32 and run under autocast without DeepSpeed.
    """
    if config.tuning.trains_everything and not uses_deepspeed:
        return torch.float32
    return DTYPES[config.model.dtype]


def nf4_settings(config: RunConfig, *, skip: tuple[str, ...] = ()) -> Any:
    """transformers' settings for a base in 4 bits; modules named in `skip` stay as they are."""
    from transformers import BitsAndBytesConfig

    quantization, compute_dtype = config.quantization, DTYPES[config.model.dtype]
    assert isinstance(quantization, Nf4Quantization)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=list(skip) or None,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,  # ZeRO shards only weights of the other parameters' type
    )


def _downloaded(model: ModelConfig, *, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    # Not *.bin: pickled weights are never loaded.
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.base: the hub has no {model.base} (or it is gated and no token is set: type hf auth login)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        state = (
            "the hub is disabled (HF_HUB_OFFLINE)"
            if hub_is_offline()
            else "the hub does not answer: this machine is offline"
        )
        raise ModelError(
            f"model.base: {model.base} is not in the local cache and {state}; give a folder (model.base=FOLDER), or "
            f"download it where there is a network: hf download {model.base} ({type(error).__name__})"
        ) from None
