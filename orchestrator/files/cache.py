"""Where things are kept between runs: dequantised models and prepared data. Must not import torch."""

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
    """Where compiled extensions of one Python environment are kept: two environments that share a folder would compile anew in turns."""
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "orchestrator" / "torch_extensions" / name


@contextmanager
def locked(path: Path) -> Generator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
