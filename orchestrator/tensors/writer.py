"""Writes safetensors files one tensor at a time, hashed along the way: a few tensors are in memory, never a file.

The files are those of the library byte for byte: the same order, header and padding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.errors import RunFolderError
from orchestrator.files.atomic import os_sentence, write_text
from orchestrator.files.manifest import FileDigest

NAMES_BY_RANK = (
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.int16, "I16"),
    (torch.float16, "F16"),
    (torch.bfloat16, "BF16"),
    (torch.int32, "I32"),
    (torch.float32, "F32"),
    (torch.float64, "F64"),
    (torch.int64, "I64"),
)
"""The format's name of each type, in the library's order: it writes the last ones first."""
DTYPE_NAMES = dict(NAMES_BY_RANK)
ALIGNMENT = 8
PIECE_BYTES = 8 << 20
"""Bytes hashed and written at a time: small enough that the file system and the training thread get their turn."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Entry:
        return Entry(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)


def in_file_order(entries: Sequence[Entry]) -> list[Entry]:
    """The order of a file: by type, then by name."""
    ranks = [dtype for dtype, _ in NAMES_BY_RANK]
    return sorted(entries, key=lambda entry: (-ranks.index(entry.dtype), entry.name))


def split_into_shards(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """File name -> its entries, each file of at most `limit` bytes of tensors (more only if it holds a single one).

    The names are transformers': model.safetensors, or model-00001-of-00003.safetensors with an index.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]], *, parameters: int) -> None:
    """The index that loaders of several files read; nothing for a single file. `parameters` is what it says of them."""
    if len(shards) == 1:
        return
    owners = {entry.name: name for name, entries in shards.items() for entry in entries}
    size = sum(entry.bytes for entries in shards.values() for entry in entries)
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": owners}
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


Result = TypeVar("Result")


class TensorFile:
    """Owns one file that is being written. Tensors come in the file's order; a thread hashes and writes them meanwhile.

    At most two tensors are in memory: the one that is written and the one that waits.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> None:
        """Open the file and write its header. RunFolderError if the disk refuses, here and later."""
        self.path = path
        self.names = frozenset(entry.name for entry in entries)
        self._left = in_file_order(entries)
        self._left.reverse()
        self._digest, self._size = hashlib.sha256(), 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensor-file")
        self._pending: Future[None] | None = None
        self._file = self._refused_by_name(lambda: path.open("wb", buffering=0))
        header = header_of(in_file_order(entries), metadata)
        self._refused_by_name(lambda: self._write(len(header).to_bytes(8, "little") + header))

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Queue the next tensor, which must be on the host and not change afterwards."""
        entry = self._left.pop()
        assert Entry.of(name, tensor) == entry, f"{self.path}: {Entry.of(name, tensor)} came, {entry} is next"
        self._settle()
        self._pending = self._thread.submit(self._write, bytes_of(tensor))

    def close(self) -> FileDigest:
        """Finish and fsync the file; size and sha256 of what was in memory."""
        assert not self._left, f"{self.path}: {self._left[-1]} is missing"
        self._settle()
        self._refused_by_name(lambda: os.fsync(self._file.fileno()))
        self.abandon()
        return FileDigest(bytes=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close the file as it is."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._refused_by_name(pending.result)

    def _refused_by_name(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except OSError as error:
            raise RunFolderError(os_sentence(self.path, error)) from None

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._digest.update(piece)
            self._size += len(piece)
            # An unbuffered write may be short.
            while piece:
                piece = piece[self._file.write(piece) :]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a host tensor, of any type; not copied if it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat).cast("B")


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The JSON header of a file with these entries in this order, padded so that the tensors start aligned."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)
