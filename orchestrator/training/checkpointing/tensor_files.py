"""Writes named tensors as safetensors, hashed along the way, and reads the file back. Knows no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.errors import CheckpointError
from orchestrator.files.manifest import file_digest

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
PIECE_BYTES = 8 << 20
"""Bytes written and hashed at a time: small enough that the file system and the training thread get their turn."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """Expected size and digest of a file."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Written:
    """Write host tensors and fsync; return size and digest of what was in memory. OSError if the disk refuses."""
    digest = hashlib.sha256()
    size = 0
    # Widest elements first: then every tensor starts at a multiple of its element size without padding.
    aligned = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    with open(path, "wb", buffering=0) as file:
        for piece in _pieces(aligned, metadata):
            view = memoryview(piece)
            digest.update(view)
            size += len(view)
            # An unbuffered write may be short.
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return Written(bytes=size, sha256=digest.hexdigest())


def check_written(path: Path, written: Written) -> None:
    """Read a file back, bypassing the page cache where possible, and compare; CheckpointError if it differs."""
    with open(path, "rb") as file:
        # Otherwise the comparison would read the page cache and not the disk; the pages were synced, so they can go.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size, digest = path.stat().st_size, file_digest(path)
    if (size, digest) != (written.bytes, written.sha256):
        raise CheckpointError(
            f"{path}: read back, it has {size} bytes and sha256 {digest[:12]}; {written.bytes} and {written.sha256[:12]} were written"
        )


def _pieces(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    header = _header(tensors, metadata)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        raw = (
            memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]  # numpy names its buffer from Python 3.12 on
            if tensor.numel()
            else b""
        )
        for start in range(0, len(raw), PIECE_BYTES):
            yield raw[start : start + PIECE_BYTES]


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, ensure_ascii=False).encode()
    # safetensors pads its header with spaces, so that the data starts aligned.
    return text + b" " * (-(8 + len(text)) % ALIGNMENT)
