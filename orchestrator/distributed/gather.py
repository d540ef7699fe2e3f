"""Whole parameters, one at a time, from any sharding."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.distributed.runtime import Runtime


@contextmanager
def whole_parameter(runtime: Runtime, parameter: Any) -> Generator[torch.Tensor]:
    """The whole of a parameter: a trained one's fp32 master, a frozen one in its own type. Every rank must enter.

    A frozen one is valid inside the block only.
    """
    if parameter.requires_grad and runtime.uses_deepspeed:
        from deepspeed.utils import safe_get_full_fp32_param

        # The fp32 master: the 16-bit weights of the forward pass have lost the small updates.
        whole = safe_get_full_fp32_param(parameter)
        assert whole is not None, "DeepSpeed keeps an fp32 master of every trained parameter"
        yield whole.detach()
    else:
        with gathered(parameter):
            yield parameter.detach()


@contextmanager
def gathered(parameter: Any) -> Generator[None]:
    """Make a parameter's values whole inside the block if ZeRO-3 shards them; then every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


@contextmanager
def gathered_to_write(parameters: Sequence[Any]) -> Generator[bool]:
    """Make parameters whole inside the block, for new values; every rank must enter if ZeRO-3 shards them.

    Yield whether this rank writes: under ZeRO-3 the first one does, for all.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield True
        return
    import deepspeed
    import torch.distributed as dist

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield dist.get_rank() == 0
