"""The process between worker and W&B: survives signals, notices the worker's end, replaces a failing sender.

Must not import torch or the SDK.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.metrics.wandb.protocol import (
    TIMED_OUT,
    Ending,
    WandbSettings,
    load_settings,
    parse_ending,
    read_state,
    resolve_mode,
    say,
    send,
    spawn,
)
from orchestrator.metrics.wandb.sender import CANNOT_OPEN, NOT_INSTALLED, send_now

_SENDER = "orchestrator.metrics.wandb.sender"
_POLL_SECONDS = 0.5
_MAX_RESTARTS = 3
_RESTART_PAUSE_SECONDS = 2.0
_OPENING_SHARE = 0.5
"""The part of the time to end that a sender may take to open the run; after it the attempt goes offline."""
_ENDING_SHARE = 0.85
"""The part of the time to end that senders get; the rest is for closing down before the worker stops waiting."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: list[str]) -> int:
    """`SETTINGS PARENT_PID` supervises a run; `SETTINGS` alone sends what W&B lacks of a run that is not running."""
    settings_file = Path(argv[0])
    settings = load_settings(settings_file)
    if len(argv) == 1:
        return send_now(settings)
    for number in _IGNORED:
        # Launchers and Slurm signal every process of a job; this one must outlive them to close the run.
        signal.signal(number, signal.SIG_IGN)
    parent_pid = int(argv[1])
    supervisor = _Supervisor(settings_file, settings, parent_pid)
    ending = supervisor.watch(lambda: _worker_end(settings, parent_pid))
    return supervisor.end(ending)


class _Supervisor:
    """Owns the current sender."""

    def __init__(self, settings_file: Path, settings: WandbSettings, parent_pid: int) -> None:
        self._settings_file = settings_file
        self._parent_pid = parent_pid
        self._directory = Path(settings.directory)
        self._num_restarts = 0
        self._sender: _Sender | None = self._start(resolve_mode(settings.mode))

    def watch(self, next_end: Callable[[], Ending | None]) -> Ending:
        """Keep a sender at work until the worker ends."""
        while True:
            ending = next_end()
            if ending is not None:
                return ending
            self._replace_dead_sender()

    def end(self, ending: Ending) -> int:
        """Let the sender finish the run: 0 when it did, 1 when no sender could, TIMED_OUT when it took too long."""
        start = time.monotonic()
        deadline = start + ending.timeout_seconds * _ENDING_SHARE
        opening_deadline = start + ending.timeout_seconds * _OPENING_SHARE
        while self._sender is not None and time.monotonic() < deadline:
            self._sender.pass_on(ending, deadline)
            code = self._sender.process.poll()
            if code == 0:
                return 0
            if code is not None:
                self._replace_dead_sender()
            elif self._sender.mode == "online" and time.monotonic() > opening_deadline and not self._is_open():
                say("the server did not answer in time; this attempt is kept offline")
                self._go_offline()
            time.sleep(0.05)
        if self._sender is None:
            return 1
        self._kill()
        return TIMED_OUT

    def _start(self, mode: str) -> _Sender:
        return _Sender(spawn(_SENDER, str(self._settings_file), mode, str(self._parent_pid), own_session=False), mode)

    def _is_open(self) -> bool:
        assert self._sender is not None
        return read_state(self._directory).sender_pid == self._sender.process.pid

    def _replace_dead_sender(self) -> None:
        """A sender that could not open the run goes offline; one that broke is started again, a few times."""
        if self._sender is None or self._sender.process.poll() is None:
            return
        code = self._sender.process.returncode
        if code == CANNOT_OPEN and self._sender.mode == "online":
            self._sender = self._start("offline")
        elif code == NOT_INSTALLED or self._num_restarts == _MAX_RESTARTS:
            self._sender = None
        else:
            self._num_restarts += 1
            say(f"the sender ended with code {code}; restarting it ({self._num_restarts} of {_MAX_RESTARTS})")
            time.sleep(_RESTART_PAUSE_SECONDS * (self._num_restarts - 1))
            self._sender = self._start(self._sender.mode)

    def _go_offline(self) -> None:
        self._kill()
        self._sender = self._start("offline")

    def _kill(self) -> None:
        if self._sender is not None:
            self._sender.process.kill()
            self._sender.process.wait()
            self._sender = None


@dataclass
class _Sender:
    """One sender process, and whether it knows of the end."""

    process: subprocess.Popen[bytes]
    mode: str
    knows_the_end: bool = False

    def pass_on(self, ending: Ending, deadline: float) -> None:
        """Pass the end on, once, with the time that is left."""
        if not self.knows_the_end:
            self.knows_the_end = True
            send(self.process.stdin, replace(ending, timeout_seconds=max(0.1, deadline - time.monotonic())))


def _worker_end(settings: WandbSettings, parent_pid: int) -> Ending | None:
    """The worker's final message; a failure if it vanished silently; None while it lives."""
    ready, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
    if ready:
        line = sys.stdin.readline()
        if line.endswith("\n"):
            return parse_ending(line)
    elif os.getppid() == parent_pid:
        return None
    return Ending(outcome="failed", summary={}, timeout_seconds=settings.finish_timeout_seconds, orderly=False)
