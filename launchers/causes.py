"""What ended an attempt first, read from the state folder that the guards leave in the logs; pure reading.

`python -m launchers.causes LOG_DIRECTORY ATTEMPT` prints the exit code (empty if there was none) and the sentence; if
no guard lived long enough to see anything, the sentence is the last error in the logs.
"""

import json
import re
import signal as signals
import sys
from dataclasses import dataclass
from pathlib import Path

FAILURE_FILE = "failure.json"
_TAIL_BYTES = 65_536
_ERROR_LINE = re.compile(r"([\w.]+(Error|Exception|Interrupt|Failure)(:|$)|\S*error: |\S+: No module named )")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The first death of an attempt: who, where, and of what."""

    rank: int
    node: int
    host: str
    exit_code: int | None
    signal: str | None
    message: str | None

    @property
    def shell_exit_code(self) -> int | None:
        """The exit code as a shell reports it: 128 + N for signal N."""
        if self.signal is not None and self.signal in signals.Signals.__members__:
            return 128 + signals.Signals[self.signal]
        return self.exit_code

    def __str__(self) -> str:
        if self.exit_code is None and self.signal is None and self.message is not None:
            return self.message
        how = f"was killed by {self.signal}" if self.signal else f"ended with exit code {self.exit_code}"
        return f"rank {self.rank} on {self.host} {how}" + (f": {self.message}" if self.message else "")


def read_first_cause(log_directory: str | Path, attempt: int) -> Cause | None:
    """The first cause of the attempt, or None if no guard saw a death (or the file is not readable)."""
    # Exit codes cannot answer this: srun returns the highest of its tasks, so a killed peer hides the real cause.
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


def read_last_error(log_directory: str | Path, attempt: int) -> str | None:
    """The last line that looks like a Python or Slurm error in the first node's log that has one."""
    for path in sorted(Path(log_directory).glob(f"node-*.attempt-{attempt}.log")):
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        errors = [line for line in lines if _ERROR_LINE.match(line)]
        if errors:
            return f"{path.name}: {errors[-1].strip()}"
    return None


def main() -> int:
    log_directory, attempt = sys.argv[1], int(sys.argv[2])
    cause = read_first_cause(log_directory, attempt)
    sentence = read_last_error(log_directory, attempt) if cause is None else str(cause)
    if sentence is not None:
        code = None if cause is None else cause.shell_exit_code
        print("" if code is None else code)
        print(" ".join(sentence.split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
