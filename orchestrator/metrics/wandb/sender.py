"""The only process that imports the W&B SDK: follows metrics.jsonl and gives every step to W&B once; must not import
torch.

Observed behaviour of resuming a run (SDK 0.31) that this module relies on:
- Online with `resume="allow"` the server says how far it is (`starting_step`), and the SDK drops smaller steps. What
  was only handed to the SDK is lost when this process is killed, so the server is queried instead of trusting a file of
  ours.
- Offline the SDK cannot resume. Each attempt gets a folder with the steps that no folder closed before holds; `wandb
  sync` on the folder above sends them in order. A folder that was not closed cleanly makes `wandb sync` fail: it is
  written again.
- `wandb sync` of an online attempt sends twice what had arrived already; `send_now` does not.
"""

from __future__ import annotations

import netrc
import os
import select
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.metrics.jsonl import Row, Tail, last_attempt_rows, step_of
from orchestrator.metrics.wandb.protocol import (
    Ending,
    WandbSettings,
    WandbState,
    how_to_see,
    load_settings,
    parse_ending,
    read_state,
    say,
    write_state,
)
from orchestrator.metrics.wandb.sample_tables import Samples

if TYPE_CHECKING:
    import wandb

CANNOT_OPEN = 4
NOT_INSTALLED = 5
_BROKEN = 6
_POLL_SECONDS = 0.25
_STATE_EVERY_SECONDS = 2.0
_FLUSH_EVERY_SECONDS = 2.0
Mode = Literal["online", "offline"]


class CannotOpenError(Exception):
    """W&B cannot be reached as asked; the text says why."""


def main(argv: list[str]) -> None:
    """`SETTINGS MODE WORKER_PID`: send until the supervisor signals the end. Exits immediately, because the SDK's own
    exit may hang.
    """
    settings = load_settings(Path(argv[0]))
    mode: Mode = "online" if argv[1] == "online" else "offline"
    try:
        session = open_session(settings, mode, worker_pid=int(argv[2]))
        ending = pump(session, Tail(Path(settings.metrics_file)), lambda: _next_end(settings))
        session.close(ending)
        code = 0
    except CannotOpenError as error:
        say(f"offline, because {error}")
        code = CANNOT_OPEN
    except ModuleNotFoundError as error:
        say(f"not used: {error}; install it with: pip install wandb")
        code = NOT_INSTALLED
    except Exception as error:
        say(f"{type(error).__name__}: {_first_line(error)}")
        code = _BROKEN
    sys.stderr.flush()
    os._exit(code)


def send_now(settings: WandbSettings) -> int:
    """Send what the server lacks of a run that is no longer running; 0 when it has everything."""
    try:
        session = open_session(settings, "online", worker_pid=None)
    except CannotOpenError as error:
        say(f"nothing was sent, because {error}")
        return 2
    ending = Ending(outcome=session.state.outcome, summary=session.state.summary, timeout_seconds=0)
    pump(session, Tail(Path(settings.metrics_file)), lambda: ending)
    session.close(ending)
    say(how_to_see(session.directory))
    return 0


def pump(session: Session, tail: Tail, next_end: Callable[[], Ending | None]) -> Ending:
    """Send rows as they come, until the end. Rows of the newest step wait until it is complete.

    A step is complete when a later one begins, or at an orderly end. If the worker died, its last step is held back:
    the next attempt sends it, with the evaluation that may belong to it.
    """
    waiting: list[Row] = []
    while True:
        ending = next_end()
        waiting += [row for row in tail.poll() if "step" in row]
        waiting = session.send(waiting, hold_newest=ending is None or not ending.orderly)
        if ending is not None:
            return ending


@dataclass
class Session:
    """One open run of the SDK; owns the state file while it is open."""

    run: wandb.Run
    directory: Path
    state: WandbState
    next_step: int
    samples: Samples
    profile_folder: Path
    state_written: float = 0.0

    def send(self, rows: list[Row], *, hold_newest: bool) -> list[Row]:
        """Log each step once, merging its rows; return the rows that must wait."""
        by_step: dict[int, Row] = {}
        rows = [row for row in last_attempt_rows(rows) if step_of(row) >= self.next_step]
        for row in rows:
            by_step.setdefault(step_of(row), {}).update(row)
        held = max(by_step, default=0) if hold_newest else None
        for step, row in by_step.items():
            if step != held:
                values = {key: value for key, value in row.items() if value is not None and key not in ("step", "time")}
                self._show_samples(step)
                self.run.log(values, step=step, commit=True)
                self.next_step = step + 1
        if self.next_step - 1 != self.state.last_step and time.monotonic() - self.state_written > _STATE_EVERY_SECONDS:
            self._keep(replace(self.state, last_step=self.next_step - 1))
        return [row for row in rows if step_of(row) == held]

    def _show_samples(self, step: int) -> None:
        """Add the table of a step to its row; a step is sent even if the server refuses tables."""
        table = self.samples.take(step)
        if not table:
            return
        try:
            self.run.log(table, step=step, commit=False)
        except Exception as error:
            say(f"the table of step {step} was not accepted: {_first_line(error)}")

    def _send_profile(self) -> None:
        """Send traces and breakdowns as files of the run; a refused one does not affect the others."""
        for file in sorted(self.profile_folder.glob("*")):
            try:
                self.run.save(str(file), str(self.profile_folder.parent), "now")  # pyright: ignore[reportUnknownMemberType]
            except Exception as error:
                say(f"{file.name} was not accepted: {_first_line(error)}")

    def close(self, ending: Ending) -> None:
        """End the run at W&B, then say in the state file that everything is safe. How it ended is noted first: W&B may not answer."""
        step = self.next_step - 1
        self._keep(replace(self.state, last_step=step, outcome=ending.outcome, summary=ending.summary))
        for key, value in ending.summary.items():
            self.run.summary[key] = value
        if ending.outcome == "stopped":
            self.run.mark_preempting()
        self._send_profile()
        folder = Path(self.run.dir).parent.name
        self.run.finish(exit_code=0 if ending.outcome == "finished" else 1)
        if self.state.mode == "online":
            mark_as_synced(self.directory, self.state)
            self._keep(replace(self.state, through_step=step, is_open=False, server_uncertain=False))
        else:
            closed = (*self.state.closed_folders, folder)
            self._keep(replace(self.state, through_step=step, is_open=False, closed_folders=closed))

    def _keep(self, state: WandbState) -> None:
        write_state(self.directory, state)
        self.state = state
        self.state_written = time.monotonic()


def open_session(settings: WandbSettings, mode: Mode, *, worker_pid: int | None) -> Session:
    """Open the run with its one id. Raises CannotOpenError where it should be online and cannot."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    directory = Path(settings.directory)
    state = read_state(directory)
    if mode == "online" and (reason := why_no_key(wandb.setup().settings)):
        raise CannotOpenError(reason)
    if mode == "offline":
        # Offline folders of one id overwrite each other, and the SDK ignores `resume` there (0.31).
        state = drop_torn_folders(directory, state)
    try:
        run = _init(settings, state, mode, worker_pid)
    except Exception as error:
        if mode == "offline":
            raise
        raise CannotOpenError(f"the server did not accept the run: {_first_line(error)}") from error
    # A resumed run goes on after the server's last line; offline the state file is the only memory.
    next_step = run.starting_step if mode == "online" else state.through_step + 1
    online = mode == "online"
    state = replace(
        state, mode=mode, url=run.url if online else state.url, sender_pid=os.getpid(), last_step=next_step - 1
    )
    state = replace(state, is_open=True, server_uncertain=online or state.server_uncertain)
    write_state(directory, state)
    say(f"online, {run.url}" if online else f"offline, in {directory}")
    samples = Samples(Tail(Path(settings.samples_file)))
    return Session(run, directory, state, next_step, samples, Path(settings.profile_folder))


def _init(settings: WandbSettings, state: WandbState, mode: Mode, worker_pid: int | None) -> wandb.Run:
    """`wandb.init` with the settings that this version of the SDK knows."""
    import wandb

    wanted: dict[str, Any] = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "init_timeout": settings.init_timeout_seconds,
        "silent": True,
        "use_dot_wandb": False,
        "x_stats_pid": worker_pid or os.getpid(),
        "x_transaction_log_flush_interval": _FLUSH_EVERY_SECONDS,
    }
    known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        id=state.run_id,
        name=settings.name,
        group=settings.group,
        job_type=settings.job_type,
        config=dict(settings.config),
        dir=Path(settings.directory).parent,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(**known),
    )


def why_no_key(sdk: wandb.Settings) -> str | None:
    """Why no key is found for the server, or None; looks where the SDK looks, and never asks a person."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or sdk.api_key:
        return None
    host = sdk.base_url.split("://", 1)[-1].split("/", 1)[0].split(":", 1)[0]
    candidates = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates if name):
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return None
        except (OSError, netrc.NetrcParseError):
            continue
    return f"there is no key for {sdk.base_url} (set WANDB_API_KEY, or run `wandb login` once)"


def drop_torn_folders(directory: Path, state: WandbState) -> WandbState:
    """Remove the offline folders that were not closed cleanly; their steps are written again. One that a person synced
    counts as safe.
    """
    for folder in directory.glob(f"offline-run-*-{state.run_id}"):
        if folder.name in state.closed_folders:
            continue
        if any(folder.glob("*.wandb.synced")):
            closed = (*state.closed_folders, folder.name)
            state = replace(state, through_step=max(state.through_step, state.last_step), closed_folders=closed)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return state


def mark_as_synced(directory: Path, state: WandbState) -> None:
    """Keep `wandb sync` from sending again what the server now has, with the marker that it uses itself."""
    for file in directory.glob(f"offline-run-*-{state.run_id}/run-*.wandb"):
        file.with_name(file.name + ".synced").touch()


def _next_end(settings: WandbSettings) -> Ending | None:
    """The supervisor's message; a failure if it vanished silently."""
    ready, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
    if not ready:
        return None
    line = sys.stdin.readline()
    if line.endswith("\n"):
        return parse_ending(line)
    return Ending(outcome="failed", summary={}, timeout_seconds=settings.finish_timeout_seconds, orderly=False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


if __name__ == "__main__":
    main(sys.argv[1:])
