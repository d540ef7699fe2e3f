"""The parameters of a base with its adapter merged in, one layer at a time: PEFT adds, files deliver."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orchestrator.errors import CheckpointError
from orchestrator.merging.merge_source import Source
from orchestrator.models.artifact import open_adapter
from orchestrator.models.loading import DTYPES, nf4_settings
from orchestrator.models.model_files import ModelFiles, without_memory


class MergedParameters:
    """Reads merged parameters, in fp32; those that no adapter touches are as in the file.

    With `quantised`, the base is what was seen in training: its 4-bit weights, dequantised.
    """

    def __init__(self, source: Source, *, quantised: bool = False) -> None:
        folder, config = source.base_folder, source.config
        self._base = ModelFiles(AutoModelForCausalLM, folder, dtype=torch.float32)
        self._seen = None
        if quantised:
            settings = nf4_settings(config)
            self._seen = ModelFiles(
                AutoModelForCausalLM, folder, dtype=DTYPES[config.model.dtype], quantization_config=settings
            )
        self.module: Any = self._base.module
        self.shapes = self._base.shapes
        bare: Any = without_memory(copy.deepcopy(self._base.module), torch.float32)
        paths = {id(module): path for path, module in bare.named_modules()}
        self._adapted = open_adapter(bare, source.artifact)
        self._layers: dict[str, list[Any]] = {}
        """Path of a module of the base -> the adapter layers around it, the inner ones first."""
        self._trained: dict[str, torch.Tensor] = {}
        """Parameters that were trained themselves, next to the adapter."""
        self._find_layers(paths)
        self._merged: dict[str, torch.Tensor] = {}

    @property
    def is_tied(self) -> bool:
        """Whether the head's matrix is still the embedding's: one of them may have been trained apart."""
        ends = (self.module.get_input_embeddings(), self.module.get_output_embeddings())
        apart = {path for path, module in self.module.named_modules() if any(module is end for end in ends)}
        return self._base.is_tied and not any(name.rpartition(".")[0] in apart for name in self._trained)

    def read(self, name: str) -> torch.Tensor:
        """A merged parameter by its name in the base. CheckpointError if PEFT finds values that are not finite."""
        path, _, _ = name.rpartition(".")
        if name in self._trained:
            return self._trained[name]
        if path not in self._layers:
            return self._read_base(name)
        if name not in self._merged:
            self._merged = self._merge(path)
        return self._merged[name]

    def _find_layers(self, paths: dict[int, str]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        for module in self._adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                path = paths[id(module.original_module)]
                trained: Any = module.modules_to_save["default"]
                self._trained |= {f"{path}.{name}": value.detach() for name, value in trained.named_parameters()}
            elif isinstance(module, BaseTunerLayer):
                self._layers.setdefault(paths[id(module.get_base_layer())], []).insert(0, module)

    def _read_base(self, name: str) -> torch.Tensor:
        # What is not in 4 bits is read again: cast to fp32, not to the base's type in training.
        seen = None if self._seen is None else self._seen.read(name)
        is_quantised = seen is not None and name in self._seen_in_4bit()
        return seen if is_quantised and seen is not None else self._base.read(name)

    def _seen_in_4bit(self) -> set[str]:
        from bitsandbytes.nn.modules import Linear4bit

        assert self._seen is not None
        modules = self._seen.module.named_modules()
        return {f"{path}.weight" for path, module in modules if isinstance(module, Linear4bit)}

    def _merge(self, path: str) -> dict[str, torch.Tensor]:
        layers = self._layers[path]
        base = layers[0].get_base_layer()
        empty = {name: parameter.data for name, parameter in base.named_parameters()}
        for name, parameter in base.named_parameters():
            # A copy: what was read may be kept for the next parameter of the layer.
            parameter.data = self._read_base(f"{path}.{name}").float().reshape(empty[name].shape).clone()
        try:
            for layer in layers:
                # safe_merge: PEFT checks the product for NaN before it touches the base.
                layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        merged = {f"{path}.{name}": parameter.data for name, parameter in base.named_parameters()}
        for name, parameter in base.named_parameters():
            parameter.data = empty[name]
        return merged
