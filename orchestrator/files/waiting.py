"""Waiting for a file that another process writes, without a time limit. Must not import torch.

Ranks wait for slow work of another rank (a hash, a download, a report) like this, never in a collective, whose time-out
would end the job. If that rank dies, its launcher ends those that wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 1.0


def wait_for(path: Path, *, until: Callable[[], bool] | None = None) -> None:
    """Return once the file exists, or `until` holds, which may read it."""
    pause = POLL_SECONDS
    while not (until or path.exists)():
        time.sleep(pause)
        pause = min(LONGEST_POLL_SECONDS, pause * 1.1)
        forget(path.parent)


def forget(folder: Path) -> None:
    """Make NFS look again for a file that was not there: opening its folder ends what the client remembers."""
    try:
        os.close(os.open(folder, os.O_RDONLY))
    except OSError:
        return
