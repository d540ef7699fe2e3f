"""SHA-256 digests of files, cached while size and time of change stay the same. Must not import torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

from orchestrator.errors import DataError

RACY_NANOSECONDS = 2_000_000_000
"""A file changed this shortly before hashing could change again without a new time stamp, so its hash is not cached."""


class FileHashes:
    """sha256 of files, remembered by (path, size, time, inode) in a file of the cache, so that a hit reads no data."""

    def __init__(self, cache: Path) -> None:
        self._path = cache / "hashes.json"
        self._known: dict[str, str] = self._load()
        self._is_new = False

    def _load(self) -> dict[str, str]:
        try:
            value = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return cast("dict[str, str]", value) if isinstance(value, dict) else {}

    def of(self, path: Path) -> str:
        """The sha256 of a file's bytes. Raises DataError if it cannot be read."""
        try:
            state = path.stat()
            name = f"{path}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
            known = self._known.get(name)
            if known is not None:
                return known
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if time.time_ns() - state.st_mtime_ns > RACY_NANOSECONDS:
            self._known[name] = digest
            self._is_new = True
        return digest

    def save(self) -> None:
        """Write new entries atomically; an unwritable cache only costs time."""
        if not self._is_new:
            return
        temporary = self._path.with_name(f"hashes.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(list(self._known.items())[-10_000:])))
            temporary.replace(self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
        self._is_new = False
