"""Writes the trained weights as an adapter or a model folder, and proves a folder by reopening it."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from orchestrator.architecture.tokenizer_files import TEMPLATE_FILES, TOKENIZER_FILES
from orchestrator.config.data import DataConfig
from orchestrator.config.run import CLASSIFIER_KINDS, RunConfig
from orchestrator.data.encoding.encoder import template_source
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import publish
from orchestrator.files.manifest import write_manifest
from orchestrator.models.causal_lm import attach_adapted_head, attach_head
from orchestrator.models.loading import DTYPES, attention_of, load_model, load_scorer
from orchestrator.models.peft_adapters import save_adapter, saved_shapes
from orchestrator.models.reft import attach_reft, load_reft, read_settings, save_reft
from orchestrator.models.tuning import load_adapter

FROM_ZERO = ("lora_B", "lora_E", "vera_lambda_b", "oft_R")
"""Adapter tensors that are all zero before the first step."""
CARD = "README.md"
CHAT_FORMATS = ("alpaca", "messages", "sharegpt")
"""Formats whose rows are rendered with a chat template: the tool's own if the tokenizer has none."""
COMPANIONS = (
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    "tokenizer_config.json",
    "generation_config.json",
)
"""Files copied from the base into an artifact that lacks its own."""


def write_artifact(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    base_folder: Path,
    config: RunConfig,
    facts: Mapping[str, Any],
) -> None:
    """Save `weights` (fp32, by their names in the unwrapped module) to a temporary folder, renamed to `folder`.

    Call it on rank 0 only. Adapters stay in fp32, full models are saved in `model.dtype`.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    saved: Any = model
    if not config.tuning.is_adapter:
        dtype = DTYPES[config.model.dtype]
        saved.config.dtype = dtype
        # Gradient checkpointing switched it off; whoever generates with the saved model needs it.
        saved.config.use_cache = True
        saved.save_pretrained(temporary, state_dict={name: tensor.to(dtype) for name, tensor in weights.items()})
    elif config.tuning.is_reft:
        save_reft(saved, weights, temporary)
    else:
        save_adapter(saved, weights, temporary, config.tuning)
        if facts["kind"] in CLASSIFIER_KINDS:
            _write_classes(saved, temporary)
    for name in COMPANIONS:
        if (base_folder / name).is_file() and not (temporary / name).exists():
            shutil.copyfile(base_folder / name, temporary / name)
    _write_template(temporary, config.stages[str(facts["stage"])].data, base_folder, data_format=str(facts["format"]))
    # PEFT leaves an empty template here; the card is written once there is a proof to report, outside the manifest.
    (temporary / CARD).unlink(missing_ok=True)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner may read
    write_manifest(temporary, facts)
    publish(temporary, folder)


def _write_template(folder: Path, data: DataConfig, base_folder: Path, *, data_format: str) -> None:
    """Save the chat template used for the rows if it is not the tokenizer's own: prompts need the same one."""
    facts = load_facts(base_folder)
    if data.chat_template is None and (facts.chat_template is not None or data_format not in CHAT_FORMATS):
        return
    (folder / "chat_template.jinja").write_text(template_source(facts, data), encoding="utf-8")


def _write_classes(adapted: Any, folder: Path) -> None:
    """Save the class names next to an adapter: the base's settings with the head contained in the adapter."""
    settings = copy.deepcopy(adapted.get_base_model().config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    settings.save_pretrained(folder)


@torch.no_grad()
def round_as_saved(model: torch.nn.Module, config: RunConfig) -> bool:
    """Round trained fp32 weights to the type in which a full model is saved, to score exactly what is written.

    Return whether any weight may have changed. Under DeepSpeed the weights of the forward pass already have that type.
    """
    saved_as = DTYPES[config.model.dtype]
    if config.tuning.is_adapter or saved_as == torch.float32:
        return False
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.copy_(parameter.to(saved_as))
    return True


def check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check names and shapes, that nothing is empty, all is finite, and what started at zero no longer is.

    `expected` holds the names as they are in the folder. Raises CheckpointError with every fault.
    """
    problems: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    still: dict[str, bool] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a dict)
                tensor = tensors.get_tensor(name)
                found[name] = tuple(tensor.shape)
                problems += _tensor_problems(name, tensor)
                # A factor that is still zero is the silent failure of adapters: the file loads and changes nothing.
                still |= {mark: still.get(mark, True) and not bool(tensor.any()) for mark in FROM_ZERO if mark in name}
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems += [f"{name}: missing from the saved file" for name in missing[:5]]
    problems += [f"{name}: it was not trained" for name in surplus[:5]]
    problems += [
        f"{name}: shape {list(found[name])}, {list(expected[name])} was trained"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    problems += [
        f"every {mark} is zero: the adapter changes nothing, it was not trained"
        for mark, is_so in still.items()
        if is_so
    ]
    if problems:
        raise CheckpointError([f"{folder}: {problem}" for problem in problems])


def open_artifact(
    folder: Path,
    *,
    base_folder: Path,
    config: RunConfig,
    weights_dtype: torch.dtype,
    packed: bool = False,
    scores: bool = False,
) -> torch.nn.Module:
    """The trained model as a user would load it, from disk alone; CheckpointError if names do not match.

    With `scores` it is a reward model, which outputs a score per token.
    """
    load = load_scorer if scores else load_model
    if not config.tuning.is_adapter:
        if scores:
            return load_scorer(folder, config, weights_dtype=weights_dtype, packed=packed)
        return open_model(folder, config, weights_dtype, packed=packed)
    base = load(base_folder, config, weights_dtype=weights_dtype, packed=packed)
    if config.tuning.is_reft:
        attach_reft(base, read_settings(folder))
        load_reft(base, folder)
        return base
    return open_adapter(base, folder)


def open_model(folder: Path, config: RunConfig, weights_dtype: torch.dtype, *, packed: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, by output_loading_info
        str(folder),
        dtype=weights_dtype,
        attn_implementation=attention_of(config, packed=packed),
        output_loading_info=True,
        use_safetensors=True,
    )
    model, report = loaded
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        raise CheckpointError(
            [f"{folder}: {kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in faults.items()]
        )
    attach_head(model, choice=config.model.loss_head)
    return model


def open_adapter(base: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """A base with the adapter of a folder applied."""
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    model = get_peft_model(base, settings)
    if settings.task_type == "CAUSAL_LM":
        attach_adapted_head(base)
    load_adapter(model, folder)
    return model


def adapter_names(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], config: RunConfig
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the saved folder must contain for these trained parameters."""
    if not config.tuning.is_adapter or config.tuning.is_reft:
        return {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return saved_shapes(model, weights, config.tuning)


def _tensor_problems(name: str, tensor: torch.Tensor) -> list[str]:
    if tensor.numel() == 0:
        return [f"{name}: empty"]
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        return [f"{name}: {bad} of {math.prod(tensor.shape)} values are not finite"]
    return []
