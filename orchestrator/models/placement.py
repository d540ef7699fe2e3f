"""Where a process that is alone puts whole models: on its device, or over the GPUs of its node where one is too small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from orchestrator.config.run import RunConfig
from orchestrator.models.weight_stream import Device, rank_device
from orchestrator.tensors.reader import TensorFolder

WEIGHTS_SHARE = 0.8
"""Of a GPU's free memory; activations and the keys and values of generated tokens take the rest."""
BYTES_IN_4BIT = 0.6
"""Per parameter: NF4 with its scales, and the embeddings in 16 bits."""


def place_for(folder: Path, config: RunConfig, dtype: torch.dtype, *, models: int = 1) -> Device:
    """The place of this many models of a folder's size that are in memory together."""
    device = rank_device()
    if device.type != "cuda":
        return device
    tensors = TensorFolder.open(folder)
    each = BYTES_IN_4BIT if config.quantization.is_4bit else dtype.itemsize
    needed = models * each * sum(math.prod(tensors.shape(name)) for name in tensors.names)
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    return place_by_size(needed, free, device)


def place_by_size(needed: float, free: Sequence[int], device: torch.device) -> Device:
    """`auto` (layers over all GPUs) if weights of `needed` bytes are too many for this device and there are others.

    `free` bytes of each GPU.
    """
    is_too_small = needed > WEIGHTS_SHARE * free[device.index or 0]
    return "auto" if len(free) > 1 and is_too_small else device
