"""Which part of each trained parameter and optimizer state this rank holds. Only this module knows ZeRO's layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from orchestrator.distributed.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements `start .. start + length` of the flattened parameter `name`, in a tensor that the optimizer steps."""

    name: str
    """Name in the unwrapped module."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    length: int
    master: torch.Tensor
    """Tensor that the optimizer steps and by which it keys its state: the parameter, or ZeRO's flat fp32 partition."""
    offset: int
    """Where the fragment begins in the flattened master."""

    @property
    def is_whole(self) -> bool:
        """Whether the master is this parameter and nothing else."""
        return self.start == 0 and self.offset == 0 and self.length == self.master.numel()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment's elements of a tensor laid out like the master."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.length]


def trained_parameters(runtime: Runtime, model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that are trained, in module order: the same on every rank."""
    module = cast("torch.nn.Module", runtime.accelerator.unwrap_model(model))
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def count_trained(runtime: Runtime, model: torch.nn.Module) -> int:
    """Elements of all trained parameters; a ZeRO-3 shard counts as the whole parameter."""
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in trained_parameters(runtime, model)]
    return sum(sizes)


def local_fragments(runtime: Runtime, model: torch.nn.Module) -> list[Fragment]:
    """The fragments that this rank's optimizer steps; without sharding every rank has every parameter, whole."""
    named = trained_parameters(runtime, model)
    if not runtime.uses_deepspeed:
        return [
            Fragment(name=name, shape=tuple(p.shape), start=0, length=p.numel(), master=p, offset=0)
            for name, p in named
        ]
    # ZeRO 1 and 2 partition flat groups of parameters, ZeRO-3 every parameter by itself.
    engine: Any = model
    if engine.zero_optimization_stage() == 3:
        found = [_zero3_fragment(engine.optimizer, name, parameter) for name, parameter in named]
    else:
        found = [_zero12_fragment(engine.optimizer, name, parameter) for name, parameter in named]
    return [fragment for fragment in found if fragment is not None]


def base_optimizer(runtime: Runtime, optimizer: Any) -> torch.optim.Optimizer:
    """torch's or bitsandbytes' optimizer inside the wrappers of Accelerate and ZeRO."""
    return optimizer.optimizer.optimizer if runtime.uses_deepspeed else optimizer.optimizer


def refresh_model(runtime: Runtime, model: torch.nn.Module) -> None:
    """Apply externally written masters to the weights of the forward pass; every rank must call it."""
    if not runtime.uses_deepspeed:
        return
    engine: Any = model
    # A master that is written from outside leaves the forward's copy stale until the next step.
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    # ZeRO-3 keeps small parameters gathered all the time: their whole copies need the new values as well.
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _zero12_fragment(zero: Any, name: str, parameter: Any) -> Fragment | None:
    # DeepSpeed leaves the mapping None where this rank's partition holds nothing of the parameter.
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return Fragment(
        name=name,
        shape=tuple(parameter.shape),
        start=mapping.lp_fragment_address.start,
        length=mapping.lp_fragment_address.numel,
        master=zero.single_partition_of_fp32_groups[mapping.param_group_index],
        offset=mapping.hp_fragment_address.start,
    )


def _zero3_fragment(zero: Any, name: str, parameter: Any) -> Fragment | None:
    """ZeRO-3 splits every parameter into equal parts; the last ones are padded."""
    group, offset, elements = zero.grad_position[zero.get_param_id(parameter)]
    start = zero._get_param_partition_rank(parameter) * elements
    length = min(elements, parameter.ds_numel - start)
    if length <= 0:
        return None
    return Fragment(
        name=name,
        shape=tuple(parameter.ds_shape),
        start=start,
        length=length,
        master=zero.fp32_partitioned_groups_flat[group],
        offset=offset,
    )
