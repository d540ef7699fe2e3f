"""The ranks write an artifact's tensors: each file by one rank, each tensor gathered and written before the next one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.config.cluster import ClusterConfig
from orchestrator.distributed.gather import whole_parameter
from orchestrator.distributed.runtime import Runtime
from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import FileDigest
from orchestrator.files.waiting import wait_for
from orchestrator.models.artifact_tensors import Layout, Piece, Tensors
from orchestrator.tensors.writer import TensorFile, in_file_order

FROM_ZERO = ("lora_B", "lora_E", "vera_lambda_b", "oft_R")
"""Adapter tensors that are all zero before the first step."""


class Parameters(Protocol):
    """The parameters of an artifact, whole and one at a time."""

    @property
    def module(self) -> Any:
        """The unwrapped module, of which at least names, shapes and settings are real."""
        ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def is_collective(self) -> bool:
        """Whether every rank must take a parameter that one of them needs."""
        ...

    def take(self, name: str) -> AbstractContextManager[torch.Tensor]:
        """A parameter, valid inside the block; it must not change afterwards if it is on the host."""
        ...


@dataclass(frozen=True, kw_only=True)
class LiveParameters:
    """Parameters of a model in memory, of any sharding."""

    runtime: Runtime
    module: Any
    names: Sequence[str]
    is_collective: bool = True

    @contextmanager
    def take(self, name: str) -> Generator[torch.Tensor]:
        parameter = self.module.get_parameter(name)
        is_lent = hasattr(parameter, "ds_id") and not parameter.requires_grad
        with whole_parameter(self.runtime, parameter) as whole:
            # ZeRO-3 takes the memory back at the end of the block.
            yield whole.clone() if is_lent and whole.device.type == "cpu" else whole


@dataclass(frozen=True, kw_only=True)
class ReadParameters:
    """Parameters that are made from files, on the host."""

    module: Any
    names: Sequence[str]
    read: Callable[[str], torch.Tensor]
    is_collective: bool = False

    @contextmanager
    def take(self, name: str) -> Generator[torch.Tensor]:
        yield self.read(name)


def writers_of(files: Sequence[str], cluster: ClusterConfig) -> dict[str, int]:
    """File -> the rank that writes it: the first rank of every node, then the second ones, and round again."""
    per_node = cluster.processes_per_node
    order = [node * per_node + local for local in range(per_node) for node in range(cluster.nodes)]
    return {file: order[number % len(order)] for number, file in enumerate(files)}


def begin_folder(runtime: Runtime, folder: Path) -> None:
    """Make an empty folder for the files of all ranks; every rank must call it."""
    if runtime.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    runtime.barrier()


def note_digests(folder: Path, digests: Mapping[str, FileDigest]) -> None:
    """Leave the digests of this rank's files where rank 0 finds them."""
    for file, digest in digests.items():
        write_json(folder / f".{file}.json", asdict(digest))


def noted_digests(folder: Path, layout: Layout) -> dict[str, FileDigest]:
    """Wait until every file of the layout is written, and collect the digests that its writers noted."""
    found: dict[str, FileDigest] = {}
    for file in layout.files:
        note = folder / f".{file}.json"
        wait_for(note)
        found[file] = FileDigest(**read_json(note))
        note.unlink()
    return found


def write_tensor_files(
    runtime: Runtime,
    parameters: Parameters,
    layout: Layout,
    folder: Path,
    cluster: ClusterConfig,
    *,
    is_trained: bool = True,
) -> dict[str, FileDigest]:
    """Write the files of a layout into a folder; every rank must call it.

    Return the digests of the files that this rank wrote. CheckpointError with every tensor that holds nothing usable,
    RunFolderError if the disk refuses. A rank holds two whole tensors at most.
    """
    writers = writers_of(list(layout.files), cluster)
    digests: dict[str, FileDigest] = {}
    names = list(layout.files)
    # As many files at a time as there are ranks: each gathers for one file while the others hash and write theirs.
    for first in range(0, len(names), cluster.nodes * cluster.processes_per_node):
        together = names[first : first + cluster.nodes * cluster.processes_per_node]
        own = next((name for name in together if writers[name] == runtime.rank), None)
        file = None if own is None else TensorFile(folder / own, layout.files[own], layout.metadata)
        checks = _Checks(folder, marks=FROM_ZERO if is_trained else ())
        try:
            for name, piece in _turns(layout, together):
                made = _made(parameters, piece, wanted=name == own)
                if file is not None and name == own:
                    _append(file, piece, made, checks)
            runtime.barrier()  # a rank that leaves now may break the last gathering of a slower one
            if file is not None and own is not None:
                checks.refuse()
                digests[own] = file.close()
        finally:
            if file is not None:
                file.abandon()
    return digests


def _turns(layout: Layout, together: Sequence[str]) -> Iterator[tuple[str, Piece]]:
    """(file, piece) in the order of gathering: a piece of every file in turn, each file's in its own order."""
    for turn in zip_longest(*(_pieces_of(layout, name) for name in together)):
        yield from ((name, piece) for name, piece in zip(together, turn, strict=True) if piece is not None)


def _pieces_of(layout: Layout, file: str) -> list[Piece]:
    position = {entry.name: number for number, entry in enumerate(in_file_order(layout.files[file]))}
    firsts = [
        (min(position[entry.name] for entry in piece.saved if entry.name in position), piece)
        for piece in layout.pieces
        if any(entry.name in position for entry in piece.saved)
    ]
    return [piece for _, piece in sorted(firsts, key=lambda pair: pair[0])]


def _made(parameters: Parameters, piece: Piece, *, wanted: bool) -> Tensors:
    """The piece's tensors on the host of the rank that writes them; nothing on the others, which help to gather."""
    if not wanted and not parameters.is_collective:
        return {}
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as whole:
        for name in piece.sources:
            value = whole.enter_context(parameters.take(name))
            if wanted:
                tensors[name] = value.to("cpu")
    return piece.make(tensors) if wanted else {}


def _append(file: TensorFile, piece: Piece, made: Tensors, checks: _Checks) -> None:
    for entry in in_file_order(piece.saved):
        if entry.name in file.names:  # a file may end within a layer whose tensors are made together
            checks.look(entry.name, made[entry.name])
            file.append(entry.name, made[entry.name])


class _Checks:
    """Finds tensors that would load and mean nothing: empty, not finite, or an adapter that was never trained."""

    def __init__(self, folder: Path, marks: Sequence[str]) -> None:
        self._folder, self._marks = folder, marks
        self._problems: list[str] = []
        self._still: dict[str, bool] = {}

    def look(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.numel() == 0:
            self._problems.append(f"{name}: empty")
        elif not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            self._problems.append(f"{name}: {bad} of {math.prod(tensor.shape)} values are not finite")
        # A factor that is still zero is the silent failure of adapters: the file loads and changes nothing.
        for mark in self._marks:
            if mark in name:
                self._still[mark] = self._still.get(mark, True) and not bool(tensor.any())

    def refuse(self) -> None:
        """Raise CheckpointError with every fault."""
        problems = self._problems + [
            f"every {mark} is zero: the adapter changes nothing, it was not trained"
            for mark, is_so in self._still.items()
            if is_so
        ]
        if problems:
            raise CheckpointError([f"{self._folder}: {problem}" for problem in problems])
