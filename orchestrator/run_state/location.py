"""Detects whether a run folder was moved, mounted elsewhere or copied. Must not import torch.

A copy has everything of its original on disk, but not its W&B run, its Slurm jobs and its running processes.
`location.json` distinguishes the two: it has the folder's path and inode as seen by the last command that wrote into
it.
"""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import RunFolderError
from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.attempts import MACHINE_LOST, Attempt, write_attempt
from orchestrator.run_state.frozen import read_config

Kind = Literal["new", "here", "moved", "mounted", "copied"]
OF_ORIGINAL = "of-original"
"""Suffix of records that a copy inherited and must not continue."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """How a run folder came to its current path."""

    kind: Kind
    path: Path
    """Current path of the folder."""
    recorded: Path | None
    """Its path when a command last wrote into it."""

    @property
    def is_copy(self) -> bool:
        return self.kind == "copied"


def locate(run: RunFolder) -> Location:
    """Compare a run folder with its own record; read-only."""
    path = run.root.resolve()
    recorded = _read(run)
    if recorded is None:
        return Location(
            kind="new" if not run.run.exists() else _without_record(run, path), path=path, recorded=_frozen_path(run)
        )
    if recorded.path == path:
        return Location(kind="here", path=path, recorded=path)
    return Location(kind=_elsewhere(recorded, path), path=path, recorded=recorded.path)


def settle(run: RunFolder, stages: tuple[str, ...]) -> str | None:
    """Update the folder's record to its current path; returns a notice for the user, or None.

    A copy leaves the W&B runs and Slurm jobs of its original alone: their records are renamed.
    """
    location = locate(run)
    if location.kind in ("here", "mounted"):
        return None
    earlier = _read(run)
    with_wandb: list[str] = []
    if location.is_copy:
        with_wandb = [name for name in stages if _leave_to_original(run.stage(name), location)]
    is_same_run = earlier is not None and not location.is_copy
    record = {
        "id": earlier.id if earlier is not None and is_same_run else secrets.token_hex(8),
        "path": str(location.path),
        "inode": location.path.stat().st_ino,
    }
    write_json(run.location, record)
    return _sentence(location, with_wandb)


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    id: str
    path: Path
    inode: int


def _read(run: RunFolder) -> _Recorded | None:
    """None for a folder of an older version, or with a torn record: its frozen path is used instead."""
    with suppress(RunFolderError, OSError):
        match read_json(run.location):
            case {"id": str(identity), "path": str(path), "inode": int(inode)}:
                return _Recorded(id=identity, path=Path(path), inode=inode)
            case _:
                pass
    return None


def _elsewhere(recorded: _Recorded, path: Path) -> Kind:
    """The kind of a folder whose path differs from the recorded one."""
    if _is_same_folder(recorded.path, path):
        return "mounted"
    there = _read(RunFolder(recorded.path)) if recorded.path.is_dir() else None
    if there is not None and there.id == recorded.id:
        return "copied"  # the original still exists at its old path
    # A rename keeps the inode. Another one means a copy, or a move to another disk, which cannot be distinguished from
    # a copy whose original is out of sight: with a new W&B run nothing is lost, with the old one two runs could write
    # into it.
    return "moved" if path.stat().st_ino == recorded.inode else "copied"


def _without_record(run: RunFolder, path: Path) -> Kind:
    frozen = _frozen_path(run)
    if frozen is None or frozen == path:
        return "here" if frozen is None else "new"
    if _is_same_folder(frozen, path):
        return "mounted"
    return "copied" if (frozen / run.run.name).is_file() else "moved"


def _frozen_path(run: RunFolder) -> Path | None:
    """output_dir/name of run.json."""
    with suppress(RunFolderError, OSError):
        config = read_config(run)
        return Path(str(config["output_dir"])) / str(config["name"])
    return None


def _is_same_folder(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, also through links and bind mounts, which share device and inode."""
    with suppress(OSError):
        return one.samefile(other)
    return False


def _leave_to_original(files: StageFolder, location: Location) -> bool:
    """Whether an unfinished stage had something that remains with the original."""
    if files.result.exists() or not files.root.is_dir():
        return False
    foreign = [path for path in (files.submission, files.jobs, files.wandb) if path.exists()]
    for path in foreign:
        path.rename(_free_name(path))
    for number in files.open_attempts():
        attempt = Attempt(
            number=number, state="failed", why=f"the run folder was copied while this attempt ran in {location.recorded}",
            host=socket.gethostname(), rank=None, exit_code=MACHINE_LOST, step=None,
        )  # fmt: skip
        write_attempt(files, attempt)
    return files.wandb in foreign


def _free_name(path: Path) -> Path:
    taken = len(list(path.parent.glob(f"{path.name}.{OF_ORIGINAL}*")))
    return path.with_name(f"{path.name}.{OF_ORIGINAL}-{taken + 1}")


def _sentence(location: Location, with_wandb: list[str]) -> str | None:
    if location.kind == "moved":
        return f"the run was moved here from {location.recorded}; it continues as the same run"
    if location.is_copy:
        wandb = f"; W&B gets a new run for {', '.join(with_wandb)}" if with_wandb else ""
        return f"the run is a copy of {location.recorded} and continues independently of it{wandb}"
    return None
