"""Files that appear complete or not at all, and are on disk when the call returns. Must not import torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from orchestrator.errors import RunFolderError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


ELSEWHERE = "set output_dir to a folder you can write to"


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunFolderError with the path if it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(f"{path} is missing") from None
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from None


def write_json(path: Path, value: JsonValue | Mapping[str, Any]) -> None:
    """Write atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # Before the rename: otherwise a power failure may leave the new name with an empty file.
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(os_sentence(path, error)) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def os_sentence(path: Path, error: OSError, *, advice: str = ELSEWHERE) -> str:
    """Why a file cannot be written, and the remedy."""
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(existing_parent(path)).free
        return (
            f"{path}: the disk is full ({free / 2**20:.0f} MiB free); free some space or set output_dir to another disk"
        )
    if error.errno in NO_PERMISSION:
        return f"{path}: no permission to write there; {advice}"
    return f"{path}: {error.strerror or error}"


def existing_parent(path: Path) -> Path:
    """The path itself, or its nearest existing ancestor."""
    return next(parent for parent in [path, *path.parents] if parent.exists())


def free_bytes(path: Path) -> int:
    """Space left on the file system that a path is on, or will be."""
    return shutil.disk_usage(existing_parent(path)).free


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name; an older one there is moved aside before it is removed."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        # A folder cannot replace one that is not empty, so the old one goes first.
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
