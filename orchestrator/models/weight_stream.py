"""Streams weights from files into a model of transformers: onto one device, or layer by layer into ZeRO-3's shards.

transformers builds the model without values, converts names, fuses and quantises tensors, ties them and initialises what
a file lacks. Its way from file to memory is replaced: its own puts all values on rank 0's host under ZeRO-3, and a whole
4-bit model on every rank's device.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import is_initialized
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model, dot_natural_key
from transformers.integrations import deepspeed as zero_settings
from transformers.utils.loading_report import LoadStateDictInfo

from orchestrator.errors import ModelError
from orchestrator.tensors.reader import TensorFolder
from orchestrator.tensors.writer import DTYPE_NAMES

NUMBERED = re.compile(r".*?\.\d+(?=\.)")
"""The part of a tensor's name up to its first number: its layer."""
HOST = torch.device("cpu")
Device = torch.device | Literal["auto"]


_place: ContextVar[Device | None] = ContextVar("place", default=None)


def load_streamed(kind: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """The model of a folder by an Auto class of transformers, and its report of names that are missing or unexpected.

    On the rank's device (or that of `placed_on`), or as ZeRO-3 shards where transformers is configured for them (outside
    of `placed_on`): then every rank must call it, rank 0 alone reads, and each holds its share and a layer. `options` are
    those of `from_pretrained`.
    """
    place, settings = _place.get(), zero_settings.deepspeed_config()
    target = place or rank_device()
    if place is not None or not zero_settings.is_deepspeed_zero3_enabled():
        settings = None
    shards = None if settings is None else _Shards(settings, rank_device())
    with _unsharded(), _loaded_by(_onto_device if shards is None else shards.fill):
        # safetensors only: unpickling a foreign file may run its code.
        model, report = kind.from_pretrained(
            str(folder), device_map=target, use_safetensors=True, output_loading_info=True, **options
        )
    if shards is not None:
        shards.take(model.parameters())
    return model, report


def open_unfilled(kind: Any, folder: Path, **options: Any) -> tuple[Any, TensorFolder, Any]:
    """(the model of a folder without any value, its files, how transformers would fill it); see `load_streamed`.

    Every parameter is on the meta device; buffers have their values.
    """
    found: list[Any] = []

    def fill(_model: Any, tensors: TensorFolder, load_config: Any) -> LoadStateDictInfo:
        found.extend((tensors, load_config))
        nothing: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return LoadStateDictInfo(**nothing, error_msgs=[], conversion_errors={}, skipped_pp_keys=set())

    with _unsharded(), _loaded_by(fill):
        model = kind.from_pretrained(str(folder), device_map=HOST, use_safetensors=True, **options)
    return model, *found


def _onto_device(model: Any, tensors: TensorFolder, load_config: Any) -> Any:
    # transformers materialises them one by one, and casts each before it reads many more.
    values = {name: _Unread(tensors, name) for name in tensors.names}
    return convert_and_load_state_dict_in_model(model, values, load_config)[0]


def rank_device() -> torch.device:
    """The device of this process's Accelerator; the host where it has none."""
    device: Any = PartialState().device if is_initialized() else HOST
    return torch.device(device)


@contextmanager
def placed_on(device: Device) -> Generator[None]:
    """Load models whole onto this device inside the block, also on the ranks of a sharded job.

    `auto` spreads the layers of one process over its devices.
    """
    token = _place.set(device)
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def _unsharded() -> Generator[None]:
    """Let transformers build whole models inside this block, even if it is configured for ZeRO-3."""
    reference: Any = zero_settings._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage]
    zero_settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings = None if reference is None else reference()
        if settings is not None:
            zero_settings.set_hf_deepspeed_config(settings)


@contextmanager
def _loaded_by(filling: Callable[[Any, TensorFolder, Any], Any]) -> Generator[None]:
    """Replace the method by which transformers fills a model from its files, inside this block."""
    own: Any = PreTrainedModel._load_pretrained_model  # pyright: ignore[reportPrivateUsage]

    def fill(model: Any, state_dict: Any, files: Any, load_config: Any, *rest: Any) -> tuple[Any, Any]:
        if state_dict is not None or "disk" in load_config.device_map.values():
            return own(model, state_dict, files, load_config, *rest)
        tensors = TensorFolder.of_files([Path(file) for file in files], fault=ModelError)
        return filling(model, tensors, load_config), None

    PreTrainedModel._load_pretrained_model = staticmethod(fill)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(own)  # pyright: ignore[reportPrivateUsage]


class _Unread:
    """A tensor of a file, read when it is sliced: what transformers expects of safetensors' own slices."""

    def __init__(self, tensors: TensorFolder, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, every: object) -> torch.Tensor:
        assert every is Ellipsis, "transformers asks for whole tensors"
        return self._tensors.read(self._name)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self._tensors.dtype(self._name), "F8")


class _Shards:
    """Owns DeepSpeed's partitioning of a model that is being loaded."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._first: Any = None

    def fill(self, model: Any, tensors: TensorFolder, load_config: Any) -> Any:
        """Load and shard one layer after the other; transformers' report."""
        whole: Any = None
        for group in layer_groups(tensors.names):
            values = {name: self._shared(tensors, name) for name in group}
            report, _ = convert_and_load_state_dict_in_model(model, values, load_config)
            del values
            self.take(_loaded_and_untied(model))
            _return_freed_memory()
            if whole is None:
                whole = report
                continue
            whole.missing_keys &= report.missing_keys
            whole.unexpected_keys |= report.unexpected_keys
            whole.mismatched_keys |= report.mismatched_keys
            whole.conversion_errors |= report.conversion_errors
            whole.error_msgs += report.error_msgs
        return whole

    def take(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Keep this rank's share of parameters that are still whole."""
        from deepspeed import zero

        left = [parameter for parameter in parameters if not hasattr(parameter, "ds_id")]
        if left and self._first is None:
            self._first = left[0]
            zero.Init(module=torch.nn.ParameterList(left), config_dict_or_path=dict(self._settings))
        elif left:
            self._first.convert_to_zero_parameters(param_list=left)

    def _shared(self, tensors: TensorFolder, name: str) -> torch.Tensor:
        """A tensor on every rank's device: rank 0 reads it, so that its file is read once."""
        if dist.get_rank() == 0:
            value = tensors.read(name).to(self._device)
        else:
            value = torch.empty(tensors.shape(name), dtype=tensors.dtype(name), device=self._device)
        if value.numel():
            dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)
        return value


def _return_freed_memory() -> None:
    """Give freed host memory back to the system; glibc keeps, and fragments, what is freed in pieces below 32 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _loaded_and_untied(model: Any) -> list[torch.nn.Parameter]:
    """Parameters that have values, without those that may be tied: transformers first compares them whole."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    return [parameter for name, parameter in model.named_parameters() if not parameter.is_meta and name not in tied]


def layer_groups(names: Sequence[str]) -> list[list[str]]:
    """Names of tensors by layer; those outside of the numbered layers by the module that contains theirs."""
    ordered = sorted(names, key=lambda name: (layer_of(name), dot_natural_key(name)))
    return [list(group) for _, group in groupby(ordered, key=layer_of)]


def layer_of(name: str) -> str:
    numbered = NUMBERED.match(name)
    return numbered.group() if numbered else ".".join(name.split(".")[:-2])
