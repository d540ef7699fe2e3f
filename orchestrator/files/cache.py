"""The cache between runs: dequantised models and prepared data. Must not import torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(scratch: str | None = None) -> Path:
    """ORCHESTRATOR_CACHE, else the site's scratch folder, else the user's cache folder."""
    chosen = os.environ.get("ORCHESTRATOR_CACHE") or scratch
    if chosen:
        return Path(chosen).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator"


def compiled_folder() -> Path:
    """Folder of one Python environment's compiled extensions: two environments sharing it would recompile in turns."""
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "orchestrator" / "torch_extensions" / name


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Lock for one process at a time, released when its holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The kernel releases the lock with its holder, however that ends: no stale locks.
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
