"""Who works on an attempt, from the claim that its script left: alive here, begun on another machine, or gone.
Read-only.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATE, _START_TIME = 0, 19
"""Fields of /proc/PID/stat after the name of the program."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The newest attempt whose end is not on record."""

    attempt: int
    host: str
    process: int
    """Process id of the script, the parent of ranks and guards."""
    job: str
    """Slurm's job id; empty outside Slurm."""
    identity: str
    """Boot, start time and namespace of the process, which distinguish it from a later process with the same id."""
    folder: Path

    @property
    def is_of_this_machine(self) -> bool:
        """Whether the process would be visible from here. Containers of one host may share its name, not its processes."""
        return not self.job and self.host == socket.gethostname() and self.identity.endswith(_namespace())

    @property
    def is_alive(self) -> bool:
        """Only for a claim of this machine."""
        return bool(self.identity) and self.identity == identify(self.process)

    @property
    def script(self) -> Path | None:
        """The script that the process runs, from /proc; None if it has ended."""
        with suppress(OSError):
            words = Path(f"/proc/{self.process}/cmdline").read_bytes().split(b"\0")
            return Path(os.fsdecode(words[1])) if len(words) > 1 else None
        return None

    def beats(self) -> str:
        """The guards' latest heartbeat; it changes every few seconds while they live."""
        files = sorted(self.folder.glob("node-*.alive"))
        texts: list[str] = []
        for file in files:
            with suppress(OSError):
                texts.append(file.read_text(encoding="utf-8"))
        return "".join(texts)


def open_claim(log_directory: str | Path, attempts_directory: str | Path) -> Claim | None:
    """The claim of the newest attempt, or None if that attempt has ended, or none has begun."""
    numbers = [path.name.removeprefix("attempt-") for path in Path(log_directory).glob("attempt-*")]
    newest = max((int(number) for number in numbers if number.isdigit()), default=0)
    if not newest or (Path(attempts_directory) / f"{newest}.json").exists():
        return None
    folder = Path(log_directory) / f"attempt-{newest}"
    words = _text(folder / "claim").split()
    if len(words) < 2 or not words[1].isdigit():
        return None
    return Claim(
        attempt=newest,
        host=words[0],
        process=int(words[1]),
        job=words[2] if len(words) > 2 else "",
        identity=_text(folder / "process").strip(),
        folder=folder,
    )


def identify(process: int) -> str:
    """As `identify` of functions.bash: empty for a process that has ended."""
    text = _text(Path(f"/proc/{process}/stat"))
    # The program's name, in parentheses, may contain blanks: fields are counted after it.
    fields = text.rpartition(")")[2].split()
    if not fields or fields[_STATE] in "ZX":  # a zombie has ended; its parent only has not looked yet
        return ""
    boot = _text(Path("/proc/sys/kernel/random/boot_id")).strip()
    return f"{boot} {fields[_START_TIME]} {_namespace()}"


def _namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
