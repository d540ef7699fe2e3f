"""A model's parameters read from its files, by their names in the module: one layer is in memory, never the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model

from orchestrator.errors import CheckpointError
from orchestrator.models.weight_stream import layer_groups, layer_of, open_unfilled


class ModelFiles:
    """Reads parameters as transformers would load them: renamed, fused, quantised and cast. Holds the last layer read."""

    def __init__(self, kind: Any, folder: Path, *, dtype: torch.dtype, **options: Any) -> None:
        """`kind` is an Auto class of transformers, `options` those of `from_pretrained`."""
        self.module: Any
        self.module, self._tensors, self._filling = open_unfilled(kind, folder, dtype=dtype, **options)
        self._folder, self._dtype = folder, dtype
        converts = any(isinstance(one, WeightConverter) for one in self._filling.weight_mapping or ())
        self._is_plain = not converts and self._filling.hf_quantizer is None
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}
        self._groups = {layer_of(group[0]): group for group in layer_groups(self._tensors.names)}
        self._read: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    @property
    def is_tied(self) -> bool:
        """Whether the head's matrix is the embedding's."""
        head = self.module.get_output_embeddings()
        return head is not None and head.weight is self.module.get_input_embeddings().weight

    def read(self, name: str) -> torch.Tensor:
        """A parameter on the host; in fp32 if the model is quantised and this one is. CheckpointError if no file has it."""
        if name not in self._read:
            self._fill(name)
        if name not in self._read:
            raise CheckpointError(f"{self._folder}: no file has {name}")
        return self._read[name]

    def _fill(self, name: str) -> None:
        """Read a parameter that its file has as it is; else load its layer, and leave the module without values again."""
        self._read = {}
        if self._is_plain and name in self._tensors and self._tensors.shape(name) == self.shapes[name]:
            self._read[name] = self._tensors.read(name).to(self._dtype)
            return
        values = {one: self._tensors.read(one) for one in self._group_of(name)}
        convert_and_load_state_dict_in_model(self.module, values, self._filling)
        for one, parameter in list(self.module.named_parameters()):
            if parameter.is_meta:
                continue
            self._read[one] = dequantised(parameter)
            owner, _, own = one.rpartition(".")
            empty = torch.empty(self.shapes[one], dtype=parameter.dtype, device="meta")
            setattr(self.module.get_submodule(owner), own, torch.nn.Parameter(empty, requires_grad=False))

    def _group_of(self, name: str) -> Sequence[str]:
        """Names in the files of the layer that has a parameter; base models are published without their prefix."""
        layer, prefix = layer_of(name), f"{self.module.base_model_prefix}."
        candidates = (layer, layer.removeprefix(prefix), prefix + layer)
        return next((self._groups[one] for one in candidates if one in self._groups), [])


def dequantised(parameter: Any) -> torch.Tensor:
    """A parameter's values as its layer computes with them: fp32 if they are held in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    import bitsandbytes.functional as bnb

    whole: Any = bnb.dequantize_4bit(parameter.data, state)
    return whole.float()


def without_memory(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give the parameters of a model on the meta device zeros that share a single element: shapes on the host, no memory."""
    known: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
                known.setdefault(id(parameter), torch.nn.Parameter(zeros, requires_grad=False))
                module._parameters[name] = known[id(parameter)]  # tied ones stay tied
    return model
