"""The training state by parameter name, for any engine: fp32 masters and optimizer states, never a frozen base.

Every rank holds fragments (`start`, `length`) of flattened parameters. Written by name, they can be read back with any
number of ranks and any ZeRO stage. Only non-element-wise states (8-bit ones under ZeRO) are bound to their ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.distributed.random_state import random_state, set_random_state
from orchestrator.distributed.runtime import Runtime
from orchestrator.distributed.zero_fragments import (
    Fragment,
    base_optimizer,
    local_fragments,
    refresh_model,
    trained_parameters,
)
from orchestrator.errors import CheckpointError
from orchestrator.tensors.reader import TensorFolder
from orchestrator.training.checkpointing.written_state import EXTRA, FLAT, WEIGHT, WrittenState, copy_range

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank writes: tensors (views of the live ones) and an index of plain values."""

    tensors: dict[str, torch.Tensor]
    index: dict[str, Any]


def collect(runtime: Runtime, model: torch.nn.Module, optimizer: Any) -> RankState:
    """Collect this rank's part of the state, without copies or communication."""
    base = base_optimizer(runtime, optimizer)
    fragments = _own_share(runtime, local_fragments(runtime, model))
    tensors = {f"{WEIGHT}:{fragment.name}": fragment.of(fragment.master) for fragment in fragments}
    numbers: dict[str, Any] = {}
    for number, (master, members) in enumerate(_by_master(fragments)):
        state = base.state.get(master, {})
        # A step count is a tensor in torch's fused AdamW and an int in others: it is stored as a number.
        arrays = {key: value for key, value in state.items() if torch.is_tensor(value) and key != "step"}
        for fragment in members:
            numbers[fragment.name] = {key: _number(value) for key, value in state.items() if key not in arrays}
        tensors |= _named_states(number, master, members, arrays)
    tensors |= {f"{RANDOM}:{key}": value for key, value in random_state(runtime.device).items()}
    ranges = {f.name: {"shape": f.shape, "start": f.start, "length": f.length} for f in fragments}
    return RankState(tensors=tensors, index={"fragments": ranges, "numbers": numbers})


def restore(
    files: Sequence[Path], runtime: Runtime, model: torch.nn.Module, optimizer: Any, *, same_ranks: bool
) -> None:
    """Load a written state into a prepared model and optimizer; every rank must call it.

    `same_ranks`: world size and sharding match those of the writer. Raises CheckpointError if names or shapes do not
    match, or if the state cannot be moved.
    """
    with torch.no_grad():
        written = WrittenState(files)
        written.check_names(trained_parameters(runtime, model))
        if written.is_bound_to_ranks and not same_ranks:
            raise CheckpointError(
                "8-bit optimizer states under ZeRO are tied to the ranks that wrote them; resume with the same sharding and "
                "number of ranks, or start over with optimizer=adamw"
            )
        base = base_optimizer(runtime, optimizer)
        for number, (master, members) in enumerate(_by_master(local_fragments(runtime, model))):
            for fragment in members:
                written.copy(WEIGHT, fragment, master)
            live = _live_state(base, master) if any(written.has_states(f.name) for f in members) else {}
            flat = written.flat(number, runtime.rank) if written.is_bound_to_ranks else {}
            state = (
                _flat_state(written.of_rank(runtime.rank), flat, master, live)
                if flat
                else _master_state(written, master, members, live)
            )
            # A forgotten step count gives a wrong bias correction, which shows only two steps later.
            for fragment in members:
                state |= {
                    key: _from_number(value, master.device) for key, value in written.numbers[fragment.name].items()
                }
            base.state[master] = state
        refresh_model(runtime, model)


def restore_random_state(file: Path, device: torch.device) -> None:
    """Restore the random generators of the rank that wrote `file`."""
    tensors = TensorFolder.of_files([file])
    names = [name for name in tensors.names if name.startswith(f"{RANDOM}:")]
    set_random_state({name.partition(":")[2]: tensors.read(name) for name in names}, device)


def _own_share(runtime: Runtime, fragments: list[Fragment]) -> list[Fragment]:
    """Without sharding every rank holds the same state, so each writes a share of the parameters."""
    if runtime.uses_deepspeed:
        return fragments
    return fragments[runtime.rank :: runtime.world_size]


def _by_master(fragments: Iterable[Fragment]) -> list[tuple[torch.Tensor, list[Fragment]]]:
    groups: dict[int, tuple[torch.Tensor, list[Fragment]]] = {}
    for fragment in fragments:
        groups.setdefault(id(fragment.master), (fragment.master, []))[1].append(fragment)
    return list(groups.values())


def _named_states(
    number: int, master: torch.Tensor, members: Sequence[Fragment], arrays: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    # 8-bit states have a scale for each block of elements, so they cannot be cut at a parameter's boundary.
    extras = {key: value for key, value in arrays.items() if value.numel() != master.numel()}
    if extras and not all(fragment.is_whole for fragment in members):
        return {f"{FLAT}.{number}.{key}:": value.detach() for key, value in arrays.items()}
    named = {f"{key}:{f.name}": f.of(value) for f in members for key, value in arrays.items() if key not in extras}
    return named | {f"{EXTRA}.{key}:{f.name}": value.detach() for f in members for key, value in extras.items()}


def _live_state(base: torch.optim.Optimizer, master: torch.Tensor) -> Mapping[str, Any]:
    """The optimizer's own state of a master; before its first step bitsandbytes is made to allocate it.

    Only its own allocation is paged: a tensor made here would stay on the device.
    """
    make: Any = getattr(base, "init_state", None)
    if base.state.get(master) or make is None:
        return base.state.get(master, {})
    group = base.param_groups[0]
    # ZeRO-3 leaves the groups empty between steps, and bitsandbytes looks the parameter up in its group. What it makes
    # depends on nothing else of the group.
    parameters, group["params"] = group["params"], [master]
    try:
        make(group, master, 0, 0)
    finally:
        group["params"] = parameters
    return base.state[master]


def _master_state(
    written: WrittenState, master: torch.Tensor, members: Sequence[Fragment], live: Mapping[str, Any]
) -> dict[str, Any]:
    """Assemble the state of one master from its parameters; tensors of the live state are written in place."""
    state: dict[str, Any] = {}
    for fragment in members:
        extras = written.extras(fragment.name)
        if extras and not fragment.is_whole:
            raise CheckpointError(
                f"{fragment.name}: 8-bit optimizer states cannot be moved into ZeRO's partitions; resume with sharding=none, "
                "or start over with optimizer=adamw"
            )
        for key, dtype in written.state_dtypes(fragment.name).items():
            if key not in state:
                state[key] = _room_for(dtype, master, live.get(key))
            written.copy(key, fragment, state[key])
        state |= {key: _kept(value, live.get(key), master.device) for key, value in extras.items()}
    return state


def _room_for(dtype: torch.dtype, master: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    if live is not None and live.dtype == dtype and live.shape == master.shape:
        return live.zero_()
    return torch.zeros(master.shape, dtype=dtype, device=master.device)


def _kept(value: torch.Tensor, live: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The live tensor where it is equal already, such as a table that bitsandbytes shares between all states."""
    if live is not None and live.dtype == value.dtype and torch.equal(live.cpu(), value):
        return live
    return value.to(device)


def _flat_state(
    tensors: TensorFolder, names: Mapping[str, str], master: torch.Tensor, live: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a master as this same rank wrote it; tensors of the live state are written in place."""
    state: dict[str, Any] = {}
    for key, name in names.items():
        if tensors.shape(name) == tuple(master.shape):
            state[key] = _room_for(tensors.dtype(name), master, live.get(key))
            copy_range(tensors, name, 0, state[key].view(-1))
        else:
            state[key] = _kept(tensors.read(name), live.get(key), master.device)
    return state


def _number(value: Any) -> dict[str, Any]:
    if torch.is_tensor(value):
        return {"tensor": str(value.dtype).removeprefix("torch."), "value": value.item()}
    return {"value": value}


def _from_number(number: Mapping[str, Any], device: torch.device) -> Any:
    """A step count in the optimizer's form; the fused AdamW requires it on the parameter's device."""
    if "tensor" in number:
        return torch.tensor(number["value"], dtype=getattr(torch, number["tensor"]), device=device)
    return number["value"]
