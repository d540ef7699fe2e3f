"""Selects and describes the kernels of attention and loss head: the one source for the plan, the log and the ranks.

Must not import torch.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig, training_pipeline
from orchestrator.config.training import TrainingStage

Device = Literal["cpu", "cuda"]
HeadChoice = Literal["auto", "torch", "liger"]
HeadKernel = Literal["torch", "liger"]
DocumentsPath = Literal["varlen", "blocks", "one by one"]

DOCUMENTS = "documents"
"""transformers' name of the attention in which documents of a packed row never attend to each other
(`training/attention.py`)."""
BLOCK_TOKENS = 512
"""Documents up to this long are computed as blocks in 16 bits on a CPU; longer ones by the flash kernel, whose memory is linear."""
VARLEN_SINCE = (2, 12)
"""First torch whose `varlen_attn` takes a scale, a window and grouped queries; that of 2.10 and 2.11 lacks some of
them."""
VARLEN_HEAD_DIM = 256
"""The flash kernel's widest head; widths are multiples of `VARLEN_HEAD_STEP`."""
VARLEN_HEAD_STEP = 8
NO_HEAD = "scores of the model's own head; no log-probabilities of tokens"


def attention_name(choice: str, *, packed: bool) -> str:
    """transformers' name of the attention: `auto` computes packed rows document by document, others by sdpa."""
    if choice != "auto":
        return choice
    return DOCUMENTS if packed else "sdpa"


def documents_path(
    device: str, *, is_half: bool, head_dims: tuple[int, int], has_dropout: bool = False
) -> DocumentsPath:
    """The implementation of `documents` on a device; `head_dims` are those of keys and of values."""
    if not is_half or has_dropout:
        return "one by one"
    if device == "cpu":
        return "blocks"
    width, values = head_dims
    fits = width == values and width <= VARLEN_HEAD_DIM and width % VARLEN_HEAD_STEP == 0
    return "varlen" if fits and has_varlen() else "one by one"


@lru_cache(maxsize=1)
def has_varlen() -> bool:
    """Whether the installed torch has the required `varlen_attn`."""
    major, minor = version("torch").split(".")[:2]
    return (int(major), int(minor)) >= VARLEN_SINCE


def attention_words(name: str, device: str, *, is_half: bool, head_dim: int | None, packed: bool) -> str:
    """Description of an attention: transformers' name and, for ours, the kernel; a `head_dim` of None is assumed to
    fit.
    """
    where = f"({_DEVICE_WORDS[device]}, {16 if is_half else 32} bits)"
    if name == DOCUMENTS:
        width = VARLEN_HEAD_STEP if head_dim is None else head_dim
        return f"{name}: {_PATH_WORDS[documents_path(device, is_half=is_half, head_dims=(width, width))]} {where}"
    if packed and name != "flash_attention_2":
        return f"{name}, one dense mask over the packed row {where}"
    return f"{name} {where}"


_DEVICE_WORDS = {"cpu": "CPU", "cuda": "CUDA"}
_PATH_WORDS: dict[DocumentsPath, str] = {
    "varlen": "torch varlen_attn",
    "blocks": f"blocks by document, one by one where one is longer than {BLOCK_TOKENS} tokens",
    "one by one": "torch sdpa, document by document",
}


@lru_cache(maxsize=1)
def liger_is_installed() -> bool:
    """Whether Liger and Triton can be imported here; imports neither."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton interprets its kernels in Python, on any device: Triton's own switch, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def head_kernel(choice: HeadChoice, device: str, *, has_liger: bool) -> HeadKernel:
    """The implementation of summed log-probabilities on a device. `auto` takes Liger only on a GPU; a named one also
    where Triton interprets.
    """
    if choice == "torch" or not has_liger:
        return "torch"
    return "liger" if device == "cuda" or (choice == "liger" and triton_interprets()) else "torch"


def head_words(kernel: HeadKernel, device: str) -> str:
    name = "Liger's fused linear cross-entropy" if kernel == "liger" else "chunked cross-entropy in plain torch"
    return f"{name} ({device}), on trained tokens only"


def adapts_head(config: RunConfig) -> bool:
    """Whether LoRA adapts the head, whose logits are then more than one product."""
    tuning = config.tuning
    return tuning.method == "lora" and "lm_head" in tuning.named_modules


def devices_of(cluster: ClusterConfig) -> tuple[Device, ...]:
    """Possible devices of a rank: both if only torch, on the machine itself, can decide."""
    if cluster.device != "auto":
        return (cluster.device,)
    match cluster.hardware.name:
        case "cpu":
            return ("cpu",)
        case "unknown":
            return ("cuda", "cpu")
        case _:
            return ("cuda",)


def attention_of_stage(
    config: RunConfig, stage: TrainingStage, model: Architecture | None, device: str, *, name: str | None = None
) -> str:
    """Description of a training stage's attention on a device; `name` is the one reported by a loaded model."""
    packed = stage.data.packing != "none"
    return attention_words(
        attention_name(config.model.attention, packed=packed) if name is None else name,
        device,
        is_half=config.model.dtype == "bfloat16",
        head_dim=None if model is None else model.head_dim,
        packed=packed,
    )


def head_of_stage(config: RunConfig, stage: TrainingStage, device: str, *, has_liger: bool) -> str:
    """Description of a training stage's loss head on a device, for a model whose logits are its head's products."""
    if stage.has_new_head:
        return NO_HEAD
    choice: HeadChoice = config.model.loss_head if stage.sums_logprobs and not adapts_head(config) else "torch"
    return head_words(head_kernel(choice, device, has_liger=has_liger), device)


def kernel_fields(
    config: RunConfig, stage: TrainingStage, model: Architecture | None, *, has_liger: bool
) -> dict[str, str]:
    """Kernel descriptions for the plan, for each possible device of a rank, the GPU first."""
    devices = devices_of(config.cluster)
    attentions = [attention_of_stage(config, stage, model, device) for device in devices]
    heads = [head_of_stage(config, stage, device, has_liger=has_liger) for device in devices]
    return {"attention": " or ".join(attentions), "loss_head": " or ".join(dict.fromkeys(heads))}


def liger_problem(choice: HeadChoice, devices: tuple[str, ...], *, has_liger: bool) -> str | None:
    """Why Liger, requested by name, cannot run on any of these devices; None if it can."""
    if choice != "liger":
        return None
    if "cuda" not in devices and not triton_interprets():
        return "model.loss_head: liger needs a GPU, and the ranks run on the CPU; type model.loss_head=auto"
    if not has_liger:
        return (
            "model.loss_head: liger, but the packages liger-kernel and triton are not both installed here; type "
            "pip install 'finetune-orchestrator[gpu]', or model.loss_head=auto"
        )
    return None


def head_problems(config: RunConfig, *, has_liger: bool) -> list[str]:
    """Why `model.loss_head` cannot be used, as far as is known before the ranks start."""
    choice = config.model.loss_head
    # another interpreter's packages are not visible from here
    has_liger = has_liger or config.launcher.python is not None
    found = liger_problem(choice, devices_of(config.cluster), has_liger=has_liger)
    problems = [] if found is None else [found]
    stages = training_pipeline(config)
    fitting = [
        name for name, stage in stages.items() if stage.sums_logprobs and not adapts_head(config.for_stage(name))
    ]
    if choice == "liger" and not fitting:
        problems.append(
            "model.loss_head: liger computes the loss of SFT on a head without adapters, and no stage of the pipeline "
            f"({', '.join(config.pipeline)}) has it; type model.loss_head=auto"
        )
    return problems
