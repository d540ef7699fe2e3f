"""Runs as the parent of every rank (standard library only): records the first death and ends the others.

`python -m launchers.guard --state DIR --stop-file F --nodes N --node I [--watch] -- ARGV` starts ARGV as its child. The
first guard whose child dies writes DIR/failure.json; the others see it and end theirs. A child that ends with 76 has work
left for a fresh process, and is started again. A TERM without a failure on
record is a preemption: it becomes the stop file, so that the ranks save. Guards send heartbeats, so that a frozen or
lost node is identified.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launchers.causes import FAILURE_FILE, Cause

TICK_SECONDS = 0.5
WATCH_SECONDS = 2.0
MAX_BEAT_SECONDS = 10.0
SAVED_EXIT_CODE = 75
WRITTEN_EXIT_CODE = 76
"""The rank has done its work up to the proof: it is started again, in a fresh process that goes on with that."""
START = "LAUNCH_START"
"""How often this rank was started, for its eyes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a guard; `watch`: look for failures on other nodes, not only on a signal to end."""

    state: Path
    stop_file: Path
    nodes: int
    watch: bool
    rank: int
    node: int
    grace_seconds: float
    silence_seconds: float


@dataclass
class Clock:
    """Time of the last action of each kind, in seconds of the monotonic clock."""

    watched: float
    beat: float
    trusted: float
    """Start of the others' silence: this guard's start, or the moment it was itself unfrozen."""


def main() -> int:
    settings, command = _parse(sys.argv[1:], os.environ)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the child inherits this until it installs handlers of its own
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or settings.state / f"error-{settings.rank}.json")
    told_to_end: list[bool] = []

    def on_term(_number: int, _frame: object) -> None:
        told_to_end.append(True)
        if not (settings.state / FAILURE_FILE).exists() and not _is_superseded(settings.state):
            _touch_stop_file(settings.stop_file)

    signal.signal(signal.SIGTERM, on_term)
    starts, exit_code = 0, WRITTEN_EXIT_CODE
    while exit_code == WRITTEN_EXIT_CODE:
        starts += 1
        variables = {"TORCHELASTIC_ERROR_FILE": str(error_file), START: str(starts)}
        child = subprocess.Popen(command, env=os.environ | variables, preexec_fn=_ignore_term)
        exit_code = _watch(child, settings, told_to_end)
    if exit_code not in {0, SAVED_EXIT_CODE}:
        record_failure(settings, exit_code=exit_code, message=_read_message(error_file))
        _end_group()
    # torchrun makes 1 of every exit code but 0, so a rank that saved ends with 0; the files say what happened.
    return 128 - exit_code if exit_code < 0 else 0 if _saved_under_torchrun(exit_code) else exit_code


def _ignore_term() -> None:
    """In a child before its program: a handler of this process would become the default there, which ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def record_failure(settings: Settings, *, exit_code: int | None, message: str | None) -> None:
    """Write failure.json unless another guard was first; complete or absent, never half."""
    cause = Cause(
        rank=settings.rank,
        node=settings.node,
        host=socket.gethostname(),
        exit_code=exit_code if exit_code is not None and exit_code >= 0 else None,
        signal=_signal_name(exit_code),
        message=message,
    )
    temporary = settings.state / f".failure.{settings.rank}.{socket.gethostname()}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(asdict(cause) | {"time": time.time()}) + "\n", encoding="utf-8")
        # A link fails where the name exists, on NFS too: exactly one guard is the first.
        os.link(temporary, settings.state / FAILURE_FILE)
    except FileExistsError:
        pass
    except OSError as error:  # a full disk must not hide the exit code
        print(f"guard of rank {settings.rank}: no failure record: {error}", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Settings, list[str]]:
    parser = argparse.ArgumentParser(prog="launchers.guard")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--grace-seconds", type=float, default=8.0)
    parser.add_argument("--silence-seconds", type=float, default=90.0)
    split = arguments.index("--")
    options = parser.parse_args(arguments[:split])
    settings = Settings(
        state=options.state,
        stop_file=options.stop_file,
        nodes=options.nodes,
        watch=options.watch or environment.get("LOCAL_RANK", "0") == "0",
        rank=int(environment.get("RANK", "0")),
        node=options.node,
        grace_seconds=options.grace_seconds,
        silence_seconds=options.silence_seconds,
    )
    return settings, list(arguments[split + 1 :])


def _watch(child: subprocess.Popen[bytes], settings: Settings, told_to_end: Sequence[bool]) -> int:
    parent = os.getppid()
    clock = Clock(watched=0.0, beat=0.0, trusted=time.monotonic())
    leads_node = os.environ.get("LOCAL_RANK", "0") == "0"
    while True:
        try:
            return child.wait(TICK_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        # The kernel gives an orphan another parent.
        if os.getppid() != parent:
            record_failure(settings, exit_code=None, message="the launcher of this rank died")
            return _end(child, settings.grace_seconds)
        if leads_node and not _beat_and_listen(settings, clock):
            child.kill()  # thawed after another attempt took over: nothing may be saved any more
            return child.wait()
        due = told_to_end or (settings.watch and time.monotonic() - clock.watched > WATCH_SECONDS)
        if due:
            clock.watched = time.monotonic()
            if _failure_is_recorded(settings.state):
                return _end(child, settings.grace_seconds)


def _beat_and_listen(settings: Settings, clock: Clock) -> bool:
    """Send a heartbeat and check for others': node 0 for all nodes, the others for node 0. False: a later attempt has
    taken over.
    """
    now, every = time.monotonic(), min(MAX_BEAT_SECONDS, settings.silence_seconds / 4)
    if now - clock.beat < every:
        return True
    if clock.beat and now - clock.beat > 3 * every:  # this process was frozen: its knowledge of others is stale
        clock.trusted = now
        if _is_superseded(settings.state):
            return False
    clock.beat = now
    own = settings.state / f"node-{settings.node}.alive"
    try:
        own.write_text(f"{socket.gethostname()} {time.time():.1f}\n", encoding="utf-8")
    except OSError:  # a full disk is the worker's to report
        return True
    if now - clock.trusted > settings.silence_seconds:
        # Both times come from the file server's clock: those of the nodes may differ.
        _listen(settings, own.stat().st_mtime)
    return True


def _listen(settings: Settings, now: float) -> None:
    """Put the first node that has been silent for too long on record."""
    for node in range(1, settings.nodes) if settings.node == 0 else [0]:
        seconds, host = _silence(settings.state / f"node-{node}.alive", now)
        if seconds is None or seconds > settings.silence_seconds:
            record_failure(settings, exit_code=None, message=_silence_sentence(node, seconds, host))
            return


def _is_superseded(state: Path) -> bool:
    name, _, number = state.name.rpartition("-")
    return number.isdigit() and (state.parent / f"{name}-{int(number) + 1}").exists()


def _silence(path: Path, now: float) -> tuple[float | None, str]:
    """Seconds since the node's last beat by the file server's clock, and its host; opening beats NFS caches."""
    try:
        with path.open(encoding="utf-8") as file:
            return now - os.fstat(file.fileno()).st_mtime, file.readline().split(" ")[0]
    except OSError:
        return None, "unknown host"


def _silence_sentence(node: int, seconds: float | None, host: str) -> str:
    if seconds is None:
        return f"node {node} never sent a heartbeat"
    return f"node {node} ({host}) sent no heartbeat for {seconds:.0f} s: frozen or lost"


def _failure_is_recorded(state: Path) -> bool:
    try:
        os.close(os.open(state, os.O_RDONLY))  # opening the folder makes NFS forget that the file was not there
    except OSError:
        return False
    return (state / FAILURE_FILE).exists()


def _end(child: subprocess.Popen[bytes], grace_seconds: float) -> int:
    child.terminate()
    try:
        return child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _end_group() -> None:
    """End what the dead child left behind (data loading processes), if this guard leads the group."""
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(os.getpgrp(), signal.SIGTERM)


def _touch_stop_file(path: Path) -> None:
    """Write all or nothing if the file system has links: the ranks read why they should stop."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # there already, or no disk: the worker has its own handler
        temporary.write_text("signal TERM\n", encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            temporary.replace(path)
        temporary.unlink(missing_ok=True)


def _read_message(path: Path) -> str | None:
    """The exception the rank left in torch's error file: its "message", a text or an object with one."""
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    match content:
        case {"message": str(message)} | {"message": {"message": str(message)}}:
            return message
        case _:
            return None


def _signal_name(exit_code: int | None) -> str | None:
    if exit_code is None or exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _saved_under_torchrun(exit_code: int) -> bool:
    return exit_code == SAVED_EXIT_CODE and "TORCHELASTIC_RUN_ID" in os.environ


if __name__ == "__main__":
    sys.exit(main())
