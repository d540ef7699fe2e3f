"""Writes the trained weights as an adapter or a model folder, and proves a folder by reopening it."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.architecture.tokenizer_files import TEMPLATE_FILES, TOKENIZER_FILES
from orchestrator.config.data import DataConfig
from orchestrator.config.run import CLASSIFIER_KINDS, RunConfig
from orchestrator.data.encoding.encoder import template_source
from orchestrator.data.encoding.tokenizer import load_facts
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.files.atomic import publish
from orchestrator.files.manifest import write_manifest
from orchestrator.models.artifact_stream import (
    Parameters,
    begin_folder,
    note_digests,
    noted_digests,
    write_tensor_files,
)
from orchestrator.models.artifact_tensors import Layout, layout_of
from orchestrator.models.causal_lm import attach_adapted_head, attach_head
from orchestrator.models.loading import DTYPES, attention_of, load_model, load_scorer
from orchestrator.models.peft_adapters import double_rank, save_adapter_settings
from orchestrator.models.reft import attach_reft, load_reft, read_settings, save_reft_settings
from orchestrator.models.tuning import load_adapter
from orchestrator.models.weight_stream import load_streamed
from orchestrator.run_state.model_card import CARD
from orchestrator.tensors.writer import write_index

CHAT_FORMATS = ("alpaca", "messages", "sharegpt")
"""Formats whose rows are rendered with a chat template: the tool's own if the tokenizer has none."""
COMPANIONS = (
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    "tokenizer_config.json",
    "generation_config.json",
)
"""Files copied from the base into an artifact that lacks its own."""


@dataclass(frozen=True, kw_only=True)
class ArtifactFacts:
    """What an artifact was made from."""

    config: RunConfig
    base_folder: Path
    manifest: Mapping[str, Any]
    """Facts of its manifest, with the stage, its kind and the format of its rows."""


def write_artifact(
    runtime: Runtime, parameters: Parameters, folder: Path, about: ArtifactFacts, *, is_trained: bool = True
) -> None:
    """Save parameters to a temporary folder, renamed to `folder`.

    Every rank must call it, and may leave before rank 0 has finished. Adapters stay in fp32, full models are saved in
    `model.dtype`. CheckpointError if what `is_trained` is still as it was at first, or a tensor holds nothing usable;
    RunFolderError if the disk refuses.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    begin_folder(runtime, temporary)
    layout = layout_of(parameters.module, parameters.names, about.config)
    try:
        cluster = about.config.cluster
        digests = write_tensor_files(runtime, parameters, layout, temporary, cluster, is_trained=is_trained)
        note_digests(temporary, digests)
        if runtime.is_main:
            _complete(parameters, temporary, layout, about)
            publish(temporary, folder)
    except OrchestratorError:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk has better uses
        raise


def _complete(parameters: Parameters, folder: Path, layout: Layout, about: ArtifactFacts) -> None:
    """Add to the tensor files of all ranks what makes them a model: settings, tokenizer, index, manifest."""
    config, base_folder, facts = about.config, about.base_folder, about.manifest
    hashed = noted_digests(folder, layout)
    write_index(folder, layout.files, parameters=layout.parameters)
    _write_settings(parameters.module, parameters.names, folder, config, kind=str(facts["kind"]))
    for name in COMPANIONS:
        if (base_folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base_folder / name, folder / name)
    _write_template(folder, config.stages[str(facts["stage"])].data, base_folder, data_format=str(facts["format"]))
    # PEFT leaves an empty template here; the card is written once there is a proof to report, outside the manifest.
    (folder / CARD).unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    write_manifest(folder, facts, hashed=hashed)


def write_model_settings(module: Any, folder: Path) -> None:
    """config.json and generation_config.json of a whole model."""
    # Gradient checkpointing switched it off; whoever generates with the saved model needs it.
    module.config.use_cache = True
    # In a folder of its own: next to weights, transformers would remove the shards that it did not write itself.
    with tempfile.TemporaryDirectory(prefix=".settings.", dir=folder) as apart:
        module.save_pretrained(apart, state_dict={})
        for file in Path(apart).iterdir():
            file.rename(folder / file.name)


def _write_settings(module: Any, names: Sequence[str], folder: Path, config: RunConfig, *, kind: str) -> None:
    """config.json of a whole model, or the settings of an adapter."""
    if not config.tuning.is_adapter:
        write_model_settings(module, folder)
    elif config.tuning.is_reft:
        save_reft_settings(module, folder)
    else:
        if config.tuning.is_pissa:
            double_rank(module)
        save_adapter_settings(module, names, folder, config.tuning)
        if kind in CLASSIFIER_KINDS:
            _write_classes(module, folder)


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
    """A fully tuned model, placed as `load_streamed` says; CheckpointError if its weights are not those of its class."""
    model, report = load_streamed(
        AutoModelForCausalLM,
        folder,
        dtype=weights_dtype,
        attn_implementation=attention_of(config, packed=packed),
    )
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
