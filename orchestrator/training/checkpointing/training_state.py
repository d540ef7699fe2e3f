"""The training state by parameter name, for any engine: fp32 masters and optimizer states, never a frozen base.

Every rank holds fragments (`start`, `length`) of flattened parameters. Written by name, they can be read back with any
number of ranks and any ZeRO stage. Only non-element-wise states (8-bit ones under ZeRO) are bound to their ranks.
"""

from __future__ import annotations

import json
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
from orchestrator.training.checkpointing.tensor_files import names_in, open_tensors

WEIGHT = "weight"
RANDOM = "random"
FLAT = "flat"
EXTRA = "extra"
INDEX = "index"


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
    with open_tensors(files) as handles, torch.no_grad():
        written = Written(handles)
        written.check_names(trained_parameters(runtime, model))
        if written.is_bound_to_ranks and not same_ranks:
            raise CheckpointError(
                "8-bit optimizer states under ZeRO are tied to the ranks that wrote them; resume with the same sharding and "
                "number of ranks, or start over with optimizer=adamw"
            )
        states = base_optimizer(runtime, optimizer).state
        for number, (master, members) in enumerate(_by_master(local_fragments(runtime, model))):
            for fragment in members:
                fragment.of(master).copy_(written.read(WEIGHT, fragment))
            flat = written.flat(number, runtime.rank) if written.is_bound_to_ranks else {}
            states[master] = (
                _flat_state(written, flat, master, members)
                if flat
                else _master_state(written, master, members, states.get(master, {}))
            )
        refresh_model(runtime, model)


def restore_random_state(file: Path, device: torch.device) -> None:
    """Restore the random generators of the rank that wrote `file`."""
    with open_tensors([file]) as (handle,):
        names = [name for name in names_in(handle) if name.startswith(f"{RANDOM}:")]
        set_random_state({name.partition(":")[2]: handle.get_tensor(name) for name in names}, device)


class Written:
    """The files of all ranks of a checkpoint, read by name. The caller owns the file handles."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles
        self.numbers: dict[str, dict[str, Any]] = {}
        """Plain values of a parameter's optimizer state, such as its step count."""
        self.is_bound_to_ranks = False
        """True if some states are not element-wise over one parameter: 8-bit ones in ZeRO's partitions."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._kinds: dict[str, dict[str, int]] = {}
        for file, handle in enumerate(handles):
            index = json.loads(handle.metadata()[INDEX])
            self.numbers |= index["numbers"]
            for name, entry in index["fragments"].items():
                self._shapes[name] = tuple(entry["shape"])
                self._parts.setdefault(name, []).append((entry["start"], entry["start"] + entry["length"], file))
            for key in names_in(handle):
                kind, _, name = key.partition(":")
                self.is_bound_to_ranks |= kind.startswith(f"{FLAT}.")
                self._kinds.setdefault(name, {})[kind] = file

    def check_names(self, parameters: Iterable[tuple[str, Any]]) -> None:
        """Raise CheckpointError if the trained parameters differ from the saved ones."""
        shapes = self._shapes
        wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}
        problems = [f"{name}: missing from the checkpoint" for name in sorted(wanted.keys() - shapes.keys())]
        problems += [
            f"{name}: in the checkpoint, but not trained here" for name in sorted(shapes.keys() - wanted.keys())
        ]
        problems += [
            f"{name}: shape {list(shapes[name])} in the checkpoint, {list(wanted[name])} here"
            for name in sorted(shapes.keys() & wanted.keys())
            if shapes[name] != wanted[name]
        ]
        if problems:
            raise CheckpointError(problems)

    def state_keys(self, name: str) -> list[str]:
        """Names of the element-wise states of a parameter."""
        return sorted(kind for kind in self._kinds[name] if kind != WEIGHT and not kind.startswith(f"{EXTRA}."))

    def extras(self, name: str) -> dict[str, torch.Tensor]:
        """Non-element-wise states of a parameter, such as the scales of 8-bit states."""
        found = {kind: file for kind, file in self._kinds[name].items() if kind.startswith(f"{EXTRA}.")}
        return {
            kind.removeprefix(f"{EXTRA}."): self._handles[file].get_tensor(f"{kind}:{name}")
            for kind, file in found.items()
        }

    def flat(self, number: int, rank: int) -> dict[str, torch.Tensor]:
        """States that a rank wrote for its flat master `number` as a whole; only that rank can read them."""
        prefix = f"{FLAT}.{number}."
        handle = self._handles[rank]
        return {
            key.removeprefix(prefix).rstrip(":"): handle.get_tensor(key)
            for key in names_in(handle)
            if key.startswith(prefix)
        }

    def read(self, key: str, fragment: Fragment) -> torch.Tensor:
        """The elements of a fragment, assembled from the saved parts that cover it."""
        stop = fragment.start + fragment.length
        pieces: list[torch.Tensor] = []
        position = fragment.start
        for part_start, part_stop, file in sorted(self._parts[fragment.name]):
            if part_start <= position < min(part_stop, stop):
                last = min(part_stop, stop)
                pieces.append(
                    self._handles[file].get_slice(f"{key}:{fragment.name}")[position - part_start : last - part_start]
                )
                position = last
        if position != stop:
            raise CheckpointError(f"{fragment.name}: the checkpoint holds elements up to {position}, {stop} are needed")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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


def _master_state(
    written: Written, master: torch.Tensor, members: Sequence[Fragment], live: Mapping[str, Any]
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
        for key in written.state_keys(fragment.name):
            values = written.read(key, fragment)
            if key not in state:
                state[key] = _room_for(values.dtype, master, live.get(key))
            fragment.of(state[key]).copy_(values)
        state |= {key: value.to(master.device, copy=True) for key, value in extras.items()}
        # A forgotten step count gives a wrong bias correction, which shows only two steps later.
        state |= {key: _from_number(value, master.device) for key, value in written.numbers[fragment.name].items()}
    return state


def _room_for(dtype: torch.dtype, master: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    if live is not None and live.dtype == dtype and live.shape == master.shape:
        return live.zero_()
    return torch.zeros(master.shape, dtype=dtype, device=master.device)


def _flat_state(
    written: Written, flat: Mapping[str, torch.Tensor], master: torch.Tensor, members: Sequence[Fragment]
) -> dict[str, Any]:
    """The state of a master as this same rank wrote it."""
    state: dict[str, Any] = {key: value.to(master.device, copy=True) for key, value in flat.items()}
    numbers = written.numbers[members[0].name]
    return state | {key: _from_number(value, master.device) for key, value in numbers.items()}


def _number(value: Any) -> dict[str, Any]:
    if torch.is_tensor(value):
        return {"tensor": str(value.dtype).removeprefix("torch."), "value": value.item()}
    return {"value": value}


def _from_number(number: Mapping[str, Any], device: torch.device) -> Any:
    """A step count in the optimizer's form; the fused AdamW requires it on the parameter's device."""
    if "tensor" in number:
        return torch.tensor(number["value"], dtype=getattr(torch, number["tensor"]), device=device)
    return number["value"]
