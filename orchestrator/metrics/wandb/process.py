"""W&B as a projection of metrics.jsonl, from the worker's side; must not import torch or the W&B SDK.

Three processes share the work, so that a slow, hanging or dead W&B can neither stop nor slow training: the worker
appends rows to metrics.jsonl and knows one pipe; the supervisor (`python -m orchestrator.metrics.wandb`, in a session
of its own) outlives signals, hears the end of the worker, and replaces a sender that fails; the sender alone imports
the SDK, follows metrics.jsonl and sends each step once. Because the file is the record, a lost sender loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import string
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue

from orchestrator.errors import OrchestratorError
from orchestrator.files.atomic import write_json
from orchestrator.metrics.wandb.protocol import (
    MODULE,
    SETTINGS_FILE,
    STATE_FILE,
    TIMED_OUT,
    Ending,
    Outcome,
    WandbSettings,
    WandbState,
    how_to_see,
    read_state,
    resolve_mode,
    say,
    send,
    spawn,
    write_state,
)

_ID_ALPHABET = string.ascii_lowercase + string.digits
_KILL_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class WandbProcess:
    """A running projection: the supervisor and where its run lives."""

    process: subprocess.Popen[bytes]
    directory: Path


def run_id(directory: Path) -> str:
    """The W&B id of the stage: made once, the same for the life of the run."""
    path = directory / STATE_FILE
    if not path.exists():
        write_state(directory, WandbState(run_id="".join(secrets.choice(_ID_ALPHABET) for _ in range(8))))
    return read_state(directory).run_id


def start(settings: WandbSettings) -> WandbProcess | None:
    """Start the projection in the background and return at once; only on rank 0.

    None if W&B is disabled or fails to start; the failure is logged and training continues.
    """
    if resolve_mode(settings.mode) == "disabled":
        return None
    directory = Path(settings.directory)
    assert directory.name == "wandb" and directory.is_absolute(), settings.directory
    try:
        run_id(directory)
        write_json(directory / SETTINGS_FILE, asdict(settings))
        # A session of its own: signals to the worker's process group do not reach it.
        process = spawn(MODULE, str(directory / SETTINGS_FILE), str(os.getpid()), own_session=True)
    except (OSError, ValueError, OrchestratorError) as error:
        say(f"not used: {error}")
        return None
    return WandbProcess(process, directory)


def finish(run: WandbProcess, summary: Mapping[str, JsonValue], *, outcome: Outcome, timeout_seconds: float) -> str:
    """Let W&B take the last rows and end the run; returns within about `timeout_seconds`, with the sentence that says
    how to see it.

    Call it on every way out of the worker, also after a failure; rows appended before the call are sent. Never raises.
    """
    send(run.process.stdin, Ending(outcome=outcome, summary=summary, timeout_seconds=timeout_seconds))
    try:
        code = run.process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        code = None
        _kill(run.process)
    try:
        sentence = how_to_see(run.directory)
    except (ValueError, OrchestratorError) as error:
        sentence = f"W&B: {error}"
    if code == 0:
        return sentence
    limit = f" within {timeout_seconds:g} s" if code is None or code == TIMED_OUT else ""
    return f"W&B did not receive everything{limit}. {sentence}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the supervisor and its sender; the SDK's own service ends when it misses the sender."""
    with contextlib.suppress(ProcessLookupError):
        # The supervisor leads the group that its senders belong to.
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_GRACE_SECONDS)
