"""What ended an attempt first, read from the state folder that the guards leave in the logs; pure reading."""

import json
from dataclasses import dataclass
from pathlib import Path

FAILURE_FILE = "failure.json"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The first death of an attempt: who, where, and of what."""

    rank: int
    node: int
    host: str
    exit_code: int | None
    signal: str | None
    message: str | None

    def __str__(self) -> str:
        if self.exit_code is None and self.signal is None and self.message is not None:
            return self.message
        how = f"was killed by {self.signal}" if self.signal else f"ended with exit code {self.exit_code}"
        return f"rank {self.rank} on {self.host} {how}" + (f": {self.message}" if self.message else "")


def read_first_cause(log_directory: str | Path, attempt: int) -> Cause | None:
    """The first cause of the attempt, or None where no guard saw a death (or the file is not readable)."""
    path = Path(log_directory) / f"attempt-{attempt}" / FAILURE_FILE
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    match content:
        case {
            "rank": int(rank),
            "node": int(node),
            "host": str(host),
            "exit_code": int() | None as exit_code,
            "signal": str() | None as signal,
            "message": str() | None as message,
        }:
            return Cause(rank=rank, node=node, host=host, exit_code=exit_code, signal=signal, message=message)
        case _:
            return None
