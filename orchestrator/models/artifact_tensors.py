"""Which tensors the files of an artifact hold, and which trained parameters each is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from orchestrator.config.run import RunConfig
from orchestrator.models.loading import DTYPES
from orchestrator.models.peft_adapters import (
    ADAPTER_WEIGHTS,
    PROMPT_WEIGHTS,
    saved_weights,
    with_initial_weights,
)
from orchestrator.models.reft import WEIGHTS as REFT_WEIGHTS
from orchestrator.tensors.writer import Entry, split_into_shards

GIBIBYTE = 1 << 30
PYTORCH = {"format": "pt"}
"""The metadata by which loaders recognise torch's tensors."""
_LAYER = re.compile(r"^(.*?\.\d+)\.")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors of a file that are made of some parameters, all of them whole while it is made."""

    sources: tuple[str, ...]
    """Names in the unwrapped module."""
    saved: tuple[Entry, ...]
    make: Callable[[Tensors], Tensors]
    """From host tensors by source name to those by their names in the file."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensor files of an artifact."""

    files: Mapping[str, Sequence[Entry]]
    """By file name, in any order."""
    pieces: Sequence[Piece]
    metadata: Mapping[str, str] | None
    parameters: int
    """Number of parameters of the whole model, as an index of several files says it."""


def layout_of(module: Any, names: Sequence[str], config: RunConfig) -> Layout:
    """The files that an artifact of these parameters of the unwrapped module will have.

    Adapters are one file, in fp32; a whole model is in `model.dtype`, in files of at most `model.shard_gib`.
    """
    parameters = dict(module.named_parameters())
    shapes = {name: _shape(parameters[name]) for name in names}
    if not config.tuning.is_adapter:
        return whole_layout(module, shapes, config)
    pieces = list(_adapter(module, shapes, config))
    file = REFT_WEIGHTS if config.tuning.is_reft else ADAPTER_WEIGHTS
    is_plain = config.tuning.is_reft or bool(config.tuning.virtual_token_count)
    entries = [entry for piece in pieces for entry in piece.saved]
    return Layout(files={file: entries}, pieces=pieces, metadata=None if is_plain else PYTORCH, parameters=0)


def whole_layout(module: Any, shapes: Mapping[str, tuple[int, ...]], config: RunConfig) -> Layout:
    """The files of a whole model with these parameters, in `model.dtype`, of at most `model.shard_gib` each."""
    pieces = list(_whole_model(module, shapes, DTYPES[config.model.dtype]))
    entries = [entry for piece in pieces for entry in piece.saved]
    files = split_into_shards(entries, int(config.model.shard_gib * GIBIBYTE))
    number = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Layout(files=files, pieces=pieces, metadata=PYTORCH, parameters=number)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in the module


def _adapter(module: Any, shapes: Mapping[str, tuple[int, ...]], config: RunConfig) -> Iterator[Piece]:
    """A piece for each parameter; a single one if PEFT cuts them to the ranks that AdaLoRA has kept."""
    if config.tuning.is_reft:
        names = {name: name for name in shapes}
    elif config.tuning.virtual_token_count:
        names = dict.fromkeys(shapes, PROMPT_WEIGHTS)
    else:
        # Never written to, so that they occupy no memory.
        rooms = {name: torch.empty(shape) for name, shape in shapes.items()}
        owners = {id(room): name for name, room in rooms.items()}
        saved = saved_weights(module, rooms)
        if not all(id(tensor) in owners for tensor in saved.values()):
            yield _cut_piece(module, saved, list(shapes))
            return
        names = {owners[id(tensor)]: name for name, tensor in saved.items()}
    for name, target in names.items():
        yield _adapter_piece(module, name, target, shapes[name])


def _cut_piece(module: Any, saved: Tensors, names: Sequence[str]) -> Piece:
    def make(tensors: Tensors) -> Tensors:
        whole = saved_weights(module, {name: tensors[name].float() for name in names})
        return {name: tensor.contiguous() for name, tensor in whole.items()}

    entries = tuple(Entry(name=name, shape=tuple(tensor.shape), dtype=torch.float32) for name, tensor in saved.items())
    return Piece(sources=tuple(names), saved=entries, make=make)


def _adapter_piece(module: Any, name: str, saved: str, shape: tuple[int, ...]) -> Piece:
    def make(tensors: Tensors) -> Tensors:
        return {saved: with_initial_weights(module, name, tensors[name].float()).contiguous()}

    whole = with_initial_weights(module, name, torch.empty(shape, device="meta"))
    return Piece(sources=(name,), saved=(Entry.of(saved, whole),), make=make)


def _whole_model(module: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[Piece]:
    """A piece for each parameter; for each layer where transformers writes other tensors than the module's (experts)."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        found = _LAYER.match(name)
        groups.setdefault(found[1] if found else name, []).append(name)
    for members in groups.values():
        nothing = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name in members}
        written = as_published(module, nothing)
        if written.keys() == nothing.keys():
            yield from (_own_piece(name, shapes[name], dtype) for name in members)
        else:
            yield _converted_piece(module, members, written, dtype)


def _own_piece(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
    def make(tensors: Tensors) -> Tensors:
        return {name: tensors[name].to(dtype).contiguous()}

    return Piece(sources=(name,), saved=(Entry(name=name, shape=shape, dtype=dtype),), make=make)


def _converted_piece(module: Any, members: Sequence[str], written: Tensors, dtype: torch.dtype) -> Piece:
    def make(tensors: Tensors) -> Tensors:
        made = as_published(module, {name: tensors[name].to(dtype) for name in members})
        return {name: tensor.contiguous() for name, tensor in made.items()}

    saved = tuple(Entry.of(name, tensor) for name, tensor in written.items())
    return Piece(sources=tuple(members), saved=saved, make=make)


def as_published(module: PreTrainedModel, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Parameters as tensors of a published checkpoint, which may split what the module holds as one (experts)."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(module, dict(tensors)))
