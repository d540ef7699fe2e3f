"""What the three W&B processes share: settings, state, messages on the pipe. Must not import torch or the SDK."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import site
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import JsonValue, TypeAdapter

from orchestrator.files.atomic import read_json, write_json

Outcome = Literal["finished", "stopped", "failed"]
"""How an attempt ended: done, saved to be resumed, or failed."""


TIMED_OUT = 3
"""The supervisor's exit code if the time was too short."""


MODULE = "orchestrator.metrics.wandb"


SETTINGS_FILE = "settings.json"


STATE_FILE = "state.json"


_STANDARD_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Settings of one stage's W&B run; kept as a file in `directory`, so nothing in it may be secret."""

    project: str
    entity: str | None
    """Team or user; null is the default entity of the key."""
    mode: Literal["auto", "online", "offline", "disabled"]
    """`auto` follows WANDB_MODE, else goes online; without a key or a network every mode falls back to offline, and
    says so."""
    name: str
    """Name of the run in the UI."""
    group: str
    job_type: str
    config: Mapping[str, JsonValue]
    """Shown with the run; no secrets."""
    metrics_file: str
    """The record that is followed."""
    samples_file: str
    """Completions to send as tables; may be missing."""
    profile_folder: str
    """Traces of `profile=true`, sent as files at the end; may be missing."""
    directory: str
    """Folder of the SDK's files and of ours; one for each stage; must be called `wandb`, as the SDK calls its own."""
    init_timeout_seconds: float
    """How long the server may take to answer at the start before the attempt goes offline."""
    finish_timeout_seconds: float
    """Timeout of the end if the worker died without requesting it."""


@dataclass(frozen=True, kw_only=True)
class WandbState:
    """State of the W&B run, kept in `directory` over all attempts. The worker creates it, then only senders write
    it.
    """

    run_id: str
    mode: Literal["online", "offline"] | None = None
    """Of the last attempt; null before the first."""
    url: str | None = None
    sender_pid: int | None = None
    """The sender that opened the run last."""
    last_step: int = -1
    """The last step handed to the SDK."""
    through_step: int = -1
    """Every step up to this one is safe: at the server, or in an offline folder that was closed in order."""
    closed_folders: tuple[str, ...] = ()
    """Names of the offline folders that were closed in order."""
    is_open: bool = False
    """A sender is working, or was killed while working."""
    server_uncertain: bool = False
    """An online attempt has not ended cleanly: only the server knows what it has."""
    outcome: Outcome = "failed"
    """How the last attempt ended, as far as it could say."""
    summary: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Its final message."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The worker's final message, or the supervisor's on its behalf if the worker died (`orderly` is false)."""

    outcome: Outcome
    summary: Mapping[str, JsonValue]
    timeout_seconds: float
    orderly: bool = True


def how_to_see(directory: Path) -> str:
    """One sentence: the address of an online run, or the command that sends what W&B lacks."""
    state = read_state(directory)
    ours = shlex.join([sys.executable, "-m", MODULE, str(directory / SETTINGS_FILE)])
    theirs = shlex.join(["wandb", "sync", str(directory)])
    if state.mode is None:
        return f"W&B has no data of this run yet; when the job has ended, send it with: {ours}"
    if state.mode == "online":
        rest = f"; if the job has ended, W&B may lack steps: send them with: {ours}" if state.server_uncertain else ""
        return f"W&B run: {state.url}{rest}"
    if state.is_open or state.server_uncertain:
        return f"W&B run is offline; when the job has ended, send it with: {ours}"
    return f"W&B run is offline; send it with: {theirs}"


def resolve_mode(mode: str) -> str:
    """online, offline or disabled; `auto` leaves the choice to WANDB_MODE."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "online").strip().lower()
    return {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(wish, "online")


def spawn(module: str, *arguments: str, own_session: bool) -> subprocess.Popen[bytes]:
    """Start one of our modules with a pipe to it, from the same sources, independent of the working folder."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    root = str(Path(__file__).resolve().parents[3])
    if root not in site.getsitepackages():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    argv = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=_STANDARD_ERROR, env=environment, start_new_session=own_session
    )


def send(pipe: IO[bytes] | None, ending: Ending) -> None:
    """Send the ending through the pipe and close it; a vanished reader is no error."""
    assert pipe is not None
    if pipe.closed:
        return
    with contextlib.suppress(BrokenPipeError):
        pipe.write(json.dumps(asdict(ending)).encode() + b"\n")
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def parse_ending(line: str) -> Ending:
    """The ending that `send` put on the pipe."""
    return TypeAdapter(Ending).validate_json(line)


def load_settings(path: Path) -> WandbSettings:
    """The settings that `start` wrote."""
    return TypeAdapter(WandbSettings).validate_python(read_json(path))


def read_state(directory: Path) -> WandbState:
    """The state of a run; RunFolderError where there is none."""
    return TypeAdapter(WandbState).validate_python(read_json(directory / STATE_FILE))


def write_state(directory: Path, state: WandbState) -> None:
    """Replace the state atomically."""
    write_json(directory / STATE_FILE, asdict(state))


def say(sentence: str) -> None:
    """One line on standard error, which is the log of the worker."""
    print(f"W&B: {sentence}", file=sys.stderr, flush=True)
