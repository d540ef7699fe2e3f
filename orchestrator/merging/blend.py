"""Weighted sums of fine-tuned models of one base, as a single model: from whole weights or adapters.

A blend gives every ingredient a weight w_i, and the base the remainder, 1 - sum w_i:
theta = theta_0 + sum_i w_i (theta_i - theta_0), with theta_i - theta_0 = s_i B_i A_i for an adapter. A sum of such products is
one product of concatenated factors, [w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n], exactly, with added ranks; averaging
the factors would yield a different model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from orchestrator.classification.classes import read_classes
from orchestrator.classification.model import open_classifier
from orchestrator.config.run import RunConfig, makes_classifier
from orchestrator.distributed.gather import gathered_to_write
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import read_json
from orchestrator.merging.blend_files import BlendFiles, refuse_others
from orchestrator.models.artifact import open_model
from orchestrator.models.artifact_stream import LiveParameters, Parameters
from orchestrator.models.causal_lm import attach_adapted_head
from orchestrator.models.loading import DTYPES, load_model
from orchestrator.models.tuning import ADAPTER_WEIGHTS, load_adapter_weights
from orchestrator.run_state.stage_context import ParentArtifact, StageContext

_DOWN = re.compile(r"\.lora_(A|embedding_A)(\.|$)")
_UP = re.compile(r"\.lora_(B|embedding_B)(\.|$)")
ADAPTER_SETTINGS = "adapter_config.json"
Tensors = dict[str, torch.Tensor]


class Blend(Protocol):
    """A model whose blend weights can be changed repeatedly."""

    model: torch.nn.Module
    """The blend in memory; its holder may wrap it."""

    def put(self, weights: Sequence[float]) -> None:
        """Give the ingredients these weights, in order, and the base the remainder. Every rank must call it."""
        ...

    def parameters(self, runtime: Runtime) -> Parameters:
        """What an artifact of the blend holds."""
        ...


def open_blend(context: StageContext, ingredients: Sequence[ParentArtifact]) -> Blend:
    """The ingredients of a stage as one model; CheckpointError if they do not match each other."""
    config, base_folder = context.config, context.base_folder
    if makes_classifier(config, context.name):
        return classifier_blend(config, base_folder, ingredients)
    if not config.tuning.is_adapter:
        return whole_blend(config, base_folder, ingredients)
    return AdapterBlend(config, base_folder, ingredients)


def whole_blend(config: RunConfig, base_folder: Path, ingredients: Sequence[ParentArtifact]) -> WholeBlend:
    """A blend of whole language models."""
    files = BlendFiles.of_models(config, base_folder, _folders(ingredients))
    dtype = DTYPES[config.model.dtype]
    return WholeBlend(open_model(ingredients[0].folder, config, dtype, packed=False), files)


def classifier_blend(config: RunConfig, base_folder: Path, ingredients: Sequence[ParentArtifact]) -> WholeBlend:
    """A blend of whole classifiers, with weights that add up to 1: the base has no head for their classes."""
    _refuse_other_classes(ingredients)
    files = BlendFiles.of_classifiers(config, _folders(ingredients))
    dtype, first = DTYPES[config.model.dtype], ingredients[0].folder
    model = open_classifier(first, config, base_folder=base_folder, weights_dtype=dtype, packed=False)
    return WholeBlend(model, files)


def _folders(ingredients: Sequence[ParentArtifact]) -> list[Path]:
    return [one.folder for one in ingredients]


class WholeBlend:
    """Owns a whole model; the weights of base and ingredients stay in their files."""

    def __init__(self, model: torch.nn.Module, files: BlendFiles) -> None:
        self.model = model.requires_grad_(False)
        self._files = files

    @torch.no_grad()
    def put(self, weights: Sequence[float]) -> None:
        self._files.weigh(weights)
        for name, parameter in inner(self.model).named_parameters():
            with gathered_to_write([parameter]) as is_writer:
                if is_writer:
                    parameter.copy_(self._files.read(name))

    def parameters(self, runtime: Runtime) -> Parameters:
        del runtime  # the files are the same for all ranks
        return self._files.parameters


def inner(model: Any) -> Any:
    """The module that a rank holds, whether or not DeepSpeed has wrapped it."""
    return getattr(model, "module", model)


class AdapterBlend:
    """Owns a base with one adapter, whose rank is the sum of the ingredients' ranks."""

    def __init__(self, config: RunConfig, base_folder: Path, ingredients: Sequence[ParentArtifact]) -> None:
        from peft import PeftConfig, get_peft_model

        self._adapters = [_read_adapter(ingredient) for ingredient in ingredients]
        first = self._adapters[0]
        refuse_others(_folders(ingredients), [dict.fromkeys(one.tensors) for one in self._adapters])
        settings: Any = PeftConfig.from_pretrained(str(ingredients[0].folder))
        settings.r = sum(adapter.rank for adapter in self._adapters)
        settings.lora_alpha = first.scale * (settings.r**0.5 if settings.use_rslora else settings.r)
        settings.inference_mode = True
        self._scale = first.scale
        base = load_model(base_folder, config, weights_dtype=DTYPES[config.model.dtype])
        self.model = get_peft_model(base, settings)
        attach_adapted_head(base)

    def put(self, weights: Sequence[float]) -> None:
        module = inner(self.model)
        with gathered_to_write(list(self._factors(module).values())) as is_writer:
            if is_writer:
                load_adapter_weights(module, self._joined(weights), source="the blend")

    def parameters(self, runtime: Runtime) -> Parameters:
        module = inner(self.model)
        return LiveParameters(runtime=runtime, module=module, names=list(self._factors(module)))

    def _factors(self, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in module.named_parameters() if ".lora_" in name}

    def _joined(self, weights: Sequence[float]) -> Tensors:
        """The factors of the weighted sum: the A's stacked, the B's concatenated with weight and scale applied."""
        joined: Tensors = {}
        for name in self._adapters[0].tensors:
            parts = [adapter.tensors[name] for adapter in self._adapters]
            if _DOWN.search(name):
                joined[name] = torch.cat(parts, dim=0)
                continue
            shares = [
                weight * adapter.scale / self._scale for weight, adapter in zip(weights, self._adapters, strict=True)
            ]
            joined[name] = torch.cat([share * part for share, part in zip(shares, parts, strict=True)], dim=1)
        return joined


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    tensors: Tensors
    rank: int
    scale: float
    """s in s B A: alpha / rank, or alpha / sqrt(rank) (2312.03732)."""


def _read_adapter(ingredient: ParentArtifact) -> _Adapter:
    settings = read_json(ingredient.folder / ADAPTER_SETTINGS)
    tensors = load_file(ingredient.folder / ADAPTER_WEIGHTS)
    strange = [name for name, tensor in tensors.items() if not _is_factor(name) or tensor.dim() != 2]
    if strange or settings["use_dora"] or settings["rank_pattern"] or settings["alpha_pattern"]:
        raise CheckpointError(
            f"{ingredient.folder}: this adapter is not a plain sum of low-rank products ({', '.join(strange[:3]) or 'DoRA or ranks by layer'}): "
            "blend whole models, or leave it out"
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    return _Adapter(tensors=tensors, rank=rank, scale=alpha / (rank**0.5 if settings["use_rslora"] else rank))


def _is_factor(name: str) -> bool:
    return _DOWN.search(name) is not None or _UP.search(name) is not None


def _refuse_other_classes(ingredients: Sequence[ParentArtifact]) -> None:
    """Raise CheckpointError if two classifiers have different classes."""
    classes = [read_classes(one.folder) for one in ingredients]
    for one, theirs in zip(ingredients, classes, strict=True):
        if theirs != classes[0]:
            raise CheckpointError(
                f"{one.folder}: it learnt {theirs.problem} over {list(theirs.names)}, {ingredients[0].stage} {classes[0].problem} over "
                f"{list(classes[0].names)}; members of a soup must share their classes: give both stages the same labels"
            )
