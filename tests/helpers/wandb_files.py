"""Reads the files that the W&B SDK writes offline; its own reader was removed in 0.31."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:7]
    position, message = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(message)
            message = b""


def offline_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("offline-run-*/run-*.wandb"))


def offline_history(directory: Path) -> list[dict[str, Any]]:
    """The history rows of all offline attempts, in attempt order."""
    rows: list[dict[str, Any]] = []
    for path in offline_files(directory):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows
