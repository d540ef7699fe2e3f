"""The training state in a checkpoint's files, read by exact byte ranges: a rank reads the headers and its own share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.distributed.zero_fragments import Fragment
from orchestrator.errors import CheckpointError
from orchestrator.tensors.reader import TensorFolder, read_metadata

WEIGHT = "weight"
FLAT = "flat"
EXTRA = "extra"
INDEX = "index"
PIECE_ELEMENTS = 4 << 20
"""Elements that are read and copied at a time, so that the host holds no second copy of a large tensor."""


class WrittenState:
    """The files of all ranks of a checkpoint, read by name. Only their headers are kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [TensorFolder.of_files([file]) for file in files]
        self.numbers: dict[str, dict[str, Any]] = {}
        """Plain values of a parameter's optimizer state, such as its step count."""
        self.is_bound_to_ranks = False
        """True if some states are not element-wise over one parameter: 8-bit ones in ZeRO's partitions."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._kinds: dict[str, dict[str, int]] = {}
        for number, (file, tensors) in enumerate(zip(files, self._files, strict=True)):
            index = json.loads(read_metadata(file)[INDEX])
            self.numbers |= index["numbers"]
            for name, entry in index["fragments"].items():
                self._shapes[name] = tuple(entry["shape"])
                self._parts.setdefault(name, []).append((entry["start"], entry["start"] + entry["length"], number))
            for key in tensors.names:
                kind, _, name = key.partition(":")
                self.is_bound_to_ranks |= kind.startswith(f"{FLAT}.")
                self._kinds.setdefault(name, {})[kind] = number

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

    def has_states(self, name: str) -> bool:
        """Whether the optimizer had made its state of a parameter."""
        return bool(self.numbers[name])

    def state_dtypes(self, name: str) -> dict[str, torch.dtype]:
        """Names and types of the element-wise states of a parameter."""
        kinds = self._kinds[name]
        return {
            kind: self._files[kinds[kind]].dtype(f"{kind}:{name}")
            for kind in sorted(kinds)
            if kind != WEIGHT and not kind.startswith(f"{EXTRA}.")
        }

    def extras(self, name: str) -> dict[str, torch.Tensor]:
        """Non-element-wise states of a parameter, such as the scales of 8-bit states."""
        found = {kind: file for kind, file in self._kinds[name].items() if kind.startswith(f"{EXTRA}.")}
        return {
            kind.removeprefix(f"{EXTRA}."): self._files[file].read(f"{kind}:{name}") for kind, file in found.items()
        }

    def flat(self, number: int, rank: int) -> dict[str, str]:
        """State -> its tensor, of those that a rank wrote for its flat master `number` as a whole."""
        prefix = f"{FLAT}.{number}."
        return {
            name.removeprefix(prefix).rstrip(":"): name for name in self._files[rank].names if name.startswith(prefix)
        }

    def of_rank(self, rank: int) -> TensorFolder:
        """The tensors in a rank's file; states of a flat master are of use to that rank alone."""
        return self._files[rank]

    def copy(self, key: str, fragment: Fragment, target: torch.Tensor) -> None:
        """Copy the elements of a fragment from the saved parts that cover it into a tensor laid out like its master."""
        room = fragment.of(target)
        stop = fragment.start + fragment.length
        position = fragment.start
        for part_start, part_stop, file in sorted(self._parts[fragment.name]):
            if part_start <= position < min(part_stop, stop):
                last = min(part_stop, stop)
                piece = room[position - fragment.start : last - fragment.start]
                copy_range(self._files[file], f"{key}:{fragment.name}", position - part_start, piece)
                position = last
        if position != stop:
            raise CheckpointError(f"{fragment.name}: the checkpoint holds elements up to {position}, {stop} are needed")


def copy_range(tensors: TensorFolder, name: str, start: int, target: torch.Tensor) -> None:
    """Fill a flat tensor with the elements from `start` on of a written one, piece by piece."""
    for offset in range(0, target.numel(), PIECE_ELEMENTS):
        piece = target[offset : offset + PIECE_ELEMENTS]
        piece.copy_(tensors.read_flat(name, start + offset, start + offset + piece.numel()))
