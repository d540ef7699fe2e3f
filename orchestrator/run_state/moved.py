"""Detects a run folder that was moved while a process of this machine worked on it: the process keeps writing to the
old path. Must not import torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.claims import Claim, open_claim
from orchestrator.errors import RunFolderError
from orchestrator.run_folder.checkpoints import saved_steps
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.location import locate


@dataclass(frozen=True, kw_only=True)
class Away:
    """A live attempt that was started at another path and writes there."""

    claim: Claim
    root: Path
    """The run folder as the process knows it; it may be gone, or contain only what was written since the move."""
    is_taken: bool
    """Whether another run is now at that path."""


def away(run: RunFolder, stage: str) -> Away | None:
    """The live attempt whose claim is in this folder but which works at another path.

    None for a copy: its original holds the same claim, and the process is the original's. A move to another disk looks
    like a copy but leaves no original behind.
    """
    files = run.stage(stage)
    claim = open_claim(files.logs, files.attempts)
    if claim is None or not claim.is_of_this_machine or not claim.is_alive:
        return None
    script = claim.script
    if script is None or _is_same_file(script, run.scripts / script.name):
        return None
    root = script.parent.parent
    if locate(run).is_copy and (root / run.run.name).exists():
        return None
    return Away(claim=claim, root=root, is_taken=(root / run.run.name).exists())


def bring_back(old: Path, run: RunFolder) -> str:
    """The command that fetches what was written at the old path, which only has files written after the move."""
    return f"cp -a {shlex.quote(f'{old}/.')} {shlex.quote(str(run.root))}"


def refuse_left_behind(run: RunFolder, stages: Sequence[str]) -> None:
    """Raise RunFolderError if the old path of a moved run has later work: resuming here would lose it silently."""
    problems = list(_left_behind(run, stages))
    if problems:
        raise RunFolderError(problems)


def is_left_behind(run: RunFolder, stage: str) -> Path | None:
    """The old path of a run folder, if a stage wrote there after the move."""
    old = locate(run).recorded
    if old is None or _is_same_file(old, run.root) or (old / run.run.name).exists() or not (old / stage).is_dir():
        return None  # a folder with a run.json is a complete run, not the remains of this one
    return old


def _left_behind(run: RunFolder, stages: Sequence[str]) -> Iterator[str]:
    for stage in stages:
        old = is_left_behind(run, stage)
        if old is None:
            continue
        there, here = RunFolder(old).stage(stage), run.stage(stage)
        newest, own = max(saved_steps(there), default=-1), max(saved_steps(here), default=-1)
        is_finished = there.result.exists() and not here.result.exists()
        if is_finished or newest > own:
            what = "its result" if is_finished else f"its newest checkpoint (step {newest})"
            yield (
                f"{stage}: {what} is in {there.root}, where its process kept writing after the folder was moved; "
                f"type `{bring_back(old, run)}`, then repeat this command"
            )


def _is_same_file(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False
