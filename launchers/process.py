"""Run a rendered script as a child of this process and follow it: the only effects of local and torchrun."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from launchers.causes import Cause, read_first_cause
from launchers.claims import Claim
from launchers.spec import JobSpec, LaunchError, Script, write

LAUNCH_LOG = "launch.log"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the script ended: 0 done, 75 saved, 93 do not restart, 1 crash, 3 not started, 137 killed by us."""

    exit_code: int
    attempt: int | None
    cause: Cause | None
    last_words: str
    """The last line the script itself printed; the ranks' output is in the log files."""


class Launch:
    """A running script, in a session of its own: Ctrl-C in the caller's terminal does not reach it."""

    def __init__(self, child: subprocess.Popen[bytes], spec: JobSpec, log_offset: int) -> None:
        self._child = child
        self._spec = spec
        self._log_offset = log_offset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running():
            self.kill()

    @property
    def process_id(self) -> int:
        return self._child.pid

    @property
    def attempt(self) -> int | None:
        """The attempt's number, as soon as the script has claimed it."""
        claims = Path(self._spec.log_directory).glob("attempt-*/claim")
        mine = [path.parent.name for path in claims if _claimed_by(path, self._child.pid)]
        return max((int(name.removeprefix("attempt-")) for name in mine), default=None)

    def is_running(self) -> bool:
        return self._child.poll() is None

    def poll(self) -> Outcome | None:
        """None while it runs, then the outcome."""
        code = self._child.poll()
        if code is None:
            return None
        attempt = self.attempt
        cause = None if code == 0 or attempt is None else read_first_cause(self._spec.log_directory, attempt)
        exit_code = code if code >= 0 else 128 - code
        return Outcome(exit_code=exit_code, attempt=attempt, cause=cause, last_words=self._last_words())

    def stop(self) -> None:
        """Ask the ranks to save and end; the outcome follows as 75."""
        _ask_to_stop(self._spec)
        with suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)

    def kill(self, *, grace_seconds: float = 10.0) -> None:
        """End everything now: the script, the agent, the guards and the ranks."""
        _kill_tree(self._child.pid)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(grace_seconds)

    def _last_words(self) -> str:
        with (Path(self._spec.log_directory) / LAUNCH_LOG).open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_offset)
            lines = log.read().splitlines()
        return lines[-1] if lines else ""


class Joined:
    """A script that another command started on this machine; it continues when this process ends."""

    def __init__(self, claim: Claim, spec: JobSpec) -> None:
        self._claim = claim
        self._spec = spec

    @property
    def attempt(self) -> int:
        return self._claim.attempt

    def is_running(self) -> bool:
        return self._claim.is_alive

    def poll(self) -> Outcome | None:
        """None while it runs. The exit code of a process that is not a child is not known: the attempt's record decides."""
        if self.is_running():
            return None
        cause = read_first_cause(self._spec.log_directory, self.attempt)
        code = (cause and cause.shell_exit_code) or 128 + signal.SIGKILL
        return Outcome(exit_code=code, attempt=self.attempt, cause=cause, last_words="")

    def stop(self) -> None:
        """As of `Launch`."""
        _ask_to_stop(self._spec)
        if self.is_running():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._claim.process, signal.SIGTERM)

    def kill(self) -> None:
        """As of `Launch`."""
        if self.is_running():
            _kill_tree(self._claim.process)


def launch(script: Script, spec: JobSpec) -> Launch:
    """Write the script, start it in the background, return immediately. Raises LaunchError."""
    log = Path(spec.log_directory) / LAUNCH_LOG
    try:
        path = write(script)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            offset = output.tell()
            child = subprocess.Popen(
                ["bash", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "LAUNCH_QUIET": "1"},
                # Ctrl-C reaches the foreground process group only: the job must outlive the command.
                start_new_session=True,
            )
    except OSError as error:
        raise LaunchError(f"The script {script.path} could not be started: {error}.") from error
    return Launch(child, spec, offset)


def follow(running: Launch, *, tick: Callable[[], None], every_seconds: float = 0.5) -> Outcome:
    """Wait for the end, calling `tick` meanwhile; the first Ctrl-C saves and ends, the second kills."""
    interrupts = 0
    while True:
        try:
            outcome = running.poll()
            if outcome is not None:
                return outcome
            tick()
            time.sleep(every_seconds)
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 1:
                running.stop()
            else:
                running.kill()


def _ask_to_stop(spec: JobSpec) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        Path(spec.stop_file).write_text("cancel\n", encoding="utf-8")


def _kill_tree(process: int) -> None:
    # The script first: when its ranks die it must not start another attempt.
    for member in [process, *descendants(process)]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)


def _claimed_by(path: Path, process: int) -> bool:
    with suppress(OSError):
        return path.read_text(encoding="utf-8").split(" ")[1:2] == [str(process)]
    return False


def descendants(process: int) -> list[int]:
    """Children, their children and so on: agent, guards, ranks. Linux only, else none."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # A program's name is in parentheses and may itself contain blanks and parentheses.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    family = {process}
    while born := {child for child, parent in parents.items() if parent in family} - family:
        family |= born
    return sorted(family - {process})
