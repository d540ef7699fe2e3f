"""Whole trained parameters by name, from any sharding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch

from orchestrator.distributed.runtime import Runtime


def gather_trainable(runtime: Runtime, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """fp32 host copies of every trained parameter, by its name in the unwrapped module.

    Every rank must call it; rank 0 gets the tensors, the others an empty dict.
    """
    module = cast("torch.nn.Module", runtime.accelerator.unwrap_model(model))
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in trained:
        whole = _whole(runtime, parameter)
        if runtime.is_main:
            # Without `copy`, a CPU's fp32 parameters would be returned themselves, not copied.
            gathered[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return gathered


def gather_frozen(runtime: Runtime, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Host copies of every frozen parameter, in its own dtype; see `gather_trainable`."""
    module = cast("torch.nn.Module", runtime.accelerator.unwrap_model(model))
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        # Gathering is a collective: every rank enters, one parameter at a time, so only one is whole on a device.
        with _made_whole(parameter):
            if runtime.is_main:
                gathered[name] = parameter.detach().to("cpu", copy=True)
    return gathered


def _made_whole(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _whole(runtime: Runtime, parameter: torch.nn.Parameter) -> torch.Tensor:
    if not runtime.uses_deepspeed:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    # The fp32 master: the 16-bit weights of the forward pass have lost the small updates.
    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None, "DeepSpeed keeps an fp32 master of every trained parameter"
    return whole
