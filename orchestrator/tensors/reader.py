"""Reads tensors of safetensors files by their byte ranges, with pread: no file is mapped, no tensor is copied twice."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.tensors.writer import DTYPE_NAMES, INDEX, Entry

SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", "reft.safetensors")
"""Names of a folder's only file of weights."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
READ_BYTES = 1 << 30
"""The most that is read in one call: Linux stops short of 2 GiB."""
MAPPED_BYTES = 128 << 10
"""Tensors of this size and more have a mapping of their own; a process may have some 65,000."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor and where its bytes are."""

    entry: Entry
    path: Path
    start: int
    """Offset of its first byte in the file."""


class TensorFolder:
    """The tensors of a folder, by name. Only headers are kept; every read opens the file, so there is nothing to close."""

    def __init__(self, places: Mapping[str, Place], fault: type[OrchestratorError] = CheckpointError) -> None:
        self._places = dict(places)
        self._fault = fault

    @staticmethod
    def open(folder: Path, *, fault: type[OrchestratorError] = CheckpointError) -> TensorFolder:
        """Read the headers of a folder: one file of weights, or shards with their index.

        `fault` is raised if a file is missing, truncated or malformed, here and later.
        """
        return TensorFolder.of_files(_files_of(folder, fault), fault=fault)

    @staticmethod
    def of_files(paths: list[Path], *, fault: type[OrchestratorError] = CheckpointError) -> TensorFolder:
        """Read the headers of these files, whose tensors have names of their own."""
        places: dict[str, Place] = {}
        for path in paths:
            places.update(read_header(path, fault=fault))
        return TensorFolder(places, fault)

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the files and of their bytes."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def entry(self, name: str) -> Entry:
        return self._places[name].entry

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def path(self, name: str) -> Path:
        """The file that has this tensor."""
        return self._places[name].path

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the host, in memory of its own."""
        entry = self.entry(name)
        return self.read_flat(name, 0, torch.Size(entry.shape).numel()).view(entry.shape)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor; no other bytes are read."""
        place = self._places[name]
        width, total = place.entry.dtype.itemsize, torch.Size(place.entry.shape).numel()
        assert 0 <= start <= stop <= total, f"{name} has {total} elements, not [{start}, {stop})"
        if start == stop:
            return torch.empty(0, dtype=place.entry.dtype)
        memory = _memory((stop - start) * width)
        self._fill(memoryview(memory), place.path, place.start + start * width)
        return torch.frombuffer(memory, dtype=place.entry.dtype)

    def _fill(self, view: memoryview, path: Path, offset: int) -> None:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._fault(f"{path}: {error.strerror}") from None
        try:
            while view:
                size = os.preadv(file, [view[:READ_BYTES]], offset)
                if not size:
                    raise self._fault(f"{path} is truncated: it ends at byte {offset}")
                view, offset = view[size:], offset + size
        except OSError as error:
            raise self._fault(f"{path}: {error.strerror}") from None
        finally:
            os.close(file)


def _memory(size: int) -> mmap.mmap | bytearray:
    """Memory that goes back to the system with its tensor; glibc keeps freed pieces below 32 MiB, and fragments them."""
    if size < MAPPED_BYTES:
        return bytearray(size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _files_of(folder: Path, fault: type[OrchestratorError]) -> list[Path]:
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX
    try:
        owners: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / str(file) for file in owners.values()})
    except FileNotFoundError:
        raise fault(f"{folder} has no weights: none of {', '.join(SINGLE_FILES)}, {INDEX}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise fault(f"{index} is damaged: it is not an index of safetensors files") from None
    if lost := [str(file) for file in files if not file.is_file()]:
        raise fault(f"{index} names files that are missing: {', '.join(lost[:3])}")
    return files


def read_header(path: Path, *, fault: type[OrchestratorError] = CheckpointError) -> dict[str, Place]:
    """Name -> place of a file's tensors, in the order of their bytes, after a check against the file's size."""
    size, length, header = _parsed_header(path, fault)
    try:
        places = _places(path, header, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise fault(f"{path} is damaged: its header is not that of a safetensors file") from None
    end = max((place.start + place.entry.bytes for place in places), default=8 + length)
    if end != size:
        raise fault(f"{path} is {'truncated' if size < end else 'damaged'}: {size} bytes, its header says {end}")
    return {place.entry.name: place for place in places}


def read_metadata(path: Path, *, fault: type[OrchestratorError] = CheckpointError) -> dict[str, str]:
    """The texts in a file's header that its writer added."""
    _, _, header = _parsed_header(path, fault)
    return dict(header.get("__metadata__", {}))


def _parsed_header(path: Path, fault: type[OrchestratorError]) -> tuple[int, int, dict[str, Any]]:
    """Bytes of the file, bytes of its header, and the header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise fault(f"{path} is truncated or not a safetensors file")
            return size, length, dict(json.loads(file.read(length)))
    except FileNotFoundError:
        raise fault(f"{path} is missing") from None
    except OSError as error:
        raise fault(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise fault(f"{path} is damaged: its header is not that of a safetensors file") from None


def _places(path: Path, header: Mapping[str, Any], data: int) -> list[Place]:
    """The tensors of a header whose data begins at byte `data`; ValueError if a range is not that of its shape."""
    places: list[Place] = []
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        entry = Entry(name=name, shape=tuple(map(int, facts["shape"])), dtype=DTYPES[facts["dtype"]])
        start, stop = map(int, facts["data_offsets"])
        if start < 0 or stop - start != entry.bytes:
            raise ValueError(name)
        places.append(Place(entry=entry, path=path, start=data + start))
    return sorted(places, key=lambda place: place.start)
