"""The manifest of a folder: every file with its size and SHA-256. Must not import torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.files.atomic import write_json

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and content of a file."""

    bytes: int
    sha256: str


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any], *, hashed: Mapping[str, FileDigest] | None = None) -> None:
    """Fsync every file of a folder and write size and sha256 of each, with `facts`, as its last file.

    `hashed` are files whose writer synced and hashed them: they are not read again.
    """
    entries: dict[str, dict[str, Any]] = {}
    for file in _files(folder):
        name = str(file.relative_to(folder))
        known = (hashed or {}).get(name)
        if known is None:
            known = FileDigest(bytes=file.stat().st_size, sha256=file_digest(file))
            with open(file, "rb") as handle:  # the libraries that wrote these files do not sync them
                os.fsync(handle.fileno())
        entries[name] = asdict(known)
    write_json(folder / MANIFEST, {**facts, "files": entries})


def read_manifest(folder: Path, *, share: slice = slice(None)) -> dict[str, Any]:
    """The manifest after every file (of a share of them) was compared with it; CheckpointError names each difference."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; it was never finished")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged") from None
    problems = [problem for name in sorted(entries)[share] for problem in _file_problems(folder / name, entries[name])]
    if problems or not entries:
        raise CheckpointError(problems or f"{path} lists no file")
    return manifest


def _file_problems(path: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: missing"
    elif path.stat().st_size != entry["bytes"]:
        yield f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written"
    elif file_digest(path) != entry["sha256"]:
        yield f"{path}: its sha256 differs from the one that was written"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
