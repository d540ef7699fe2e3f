"""Deletes only our own folders: sizes, questions, links that are never followed. Must not import torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import EXIT_DONE, ConfigError, RunFolderError
from orchestrator.files.atomic import os_sentence
from orchestrator.monitoring.stage_status import find_runs, stage_statuses
from orchestrator.run_folder.folder import PREPARATION, RUN_FILE, RunFolder, StageFolder
from orchestrator.run_state.freeze import read_config
from orchestrator.run_state.location import OF_ORIGINAL

ALIVE = ("running", "waiting", "unknown")
"""States in which a job may still write; an unknown state is also protected."""
OURS = (
    RUN_FILE,
    "plan.json",
    "environment.json",
    "location.json",
    "scripts",
    "superseded",
    "export",
    "parent",
    "wandb",
    PREPARATION,
)
STUDY = "study.json"
_STAGE = StageFolder(Path("stage"))
OURS_OF_A_STAGE = {
    _STAGE.curves.with_suffix(".png").name,
    # Every name that the run folder defines, so that a new one needs no entry here.
    *(name.fget(_STAGE).name for name in vars(StageFolder).values() if isinstance(name, property) and name.fget),
}
OURS_OF_A_STUDY = (STUDY, "report.json", "report.txt", "report.png", "optuna.journal")


def remove_runs(folders: Sequence[Path], *, yes: bool) -> int:
    """Delete whole run and study folders after a question; ConfigError if one of them is no such folder, or is
    running.
    """
    chosen = list(dict.fromkeys(folder.absolute() for folder in folders))
    problems = [problem for folder in chosen for problem in refusals(folder)]
    if problems:
        raise ConfigError(problems)
    sizes = {folder: size_of(folder) for folder in chosen}
    for folder, size in sizes.items():
        print(f"{size_text(size):>10}  {folder}")
    ask(f"delete {_counted(len(chosen))}, {size_text(sum(sizes.values()))}?", yes=yes)
    for folder in chosen:
        delete_folder(folder)
        print(f"deleted {folder}")
    return EXIT_DONE


def refusals(folder: Path) -> Iterator[str]:
    """Why a folder must not be deleted."""
    if folder.is_symlink():
        yield f"{folder} is a link; give the folder that it points to, {folder.resolve()}"
        return
    is_run, is_study = RunFolder(folder).is_run, (folder / STUDY).is_file()
    if not is_run and not is_study:
        yield from _no_run(folder)
        return
    inner = list(_runs_below(folder))  # copied in by mistake, and perhaps the only copy of their training
    known: set[str] = {*OURS_OF_A_STUDY} if is_study else set()
    if is_run:
        run = RunFolder(folder)
        try:
            stages = read_config(run).get("stages")
        except RunFolderError as error:
            yield f"{error}; rm deletes only what it knows to be a run"
            return
        stages = [*stages] if isinstance(stages, dict) else []
        known |= {*OURS, *stages}
        alive = [status for status in stage_statuses([run]) if status.state in ALIVE]
        yield from (
            f"{folder}: stage {status.stage} is {status.state}; end it first with `orchestrator cancel {folder}`"
            for status in alive
        )
        for stage in [*(folder / name for name in (*stages, PREPARATION)), *run.superseded.glob("*")]:
            yield from _foreign(stage, OURS_OF_A_STAGE, inner)
    yield from _foreign(folder, known, inner)
    yield from (f"{folder} also holds the run {run}; move that away first" for run in inner)
    if Path.cwd().is_relative_to(folder.resolve()):
        yield f"{folder}: you are inside this folder; leave it first"


def _foreign(folder: Path, known: Container[str], runs: Sequence[Path]) -> Iterator[str]:
    """A sentence if visible entries of a folder have names other than ours; the folders in `runs` have their own."""
    if folder.is_symlink() or not folder.is_dir():
        return
    own = {path for run in runs for path in (run, *run.parents)}
    names = sorted(path.name for path in folder.iterdir() if path not in own and not path.name.startswith("."))
    foreign = [name for name in names if name not in known and f".{OF_ORIGINAL}-" not in name]
    if foreign:
        yield f"{folder} also holds {', '.join(foreign[:5])}, which no run wrote; move that away first"


def _runs_below(folder: Path) -> Iterator[Path]:
    """Other runs and studies inside a folder, at any depth; links are not followed."""
    for root, folders, names in os.walk(folder):
        if Path(root) != folder and (RUN_FILE in names or STUDY in names):
            folders.clear()
            yield Path(root)


def _no_run(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{folder} is not a folder"
    elif runs := find_runs(folder):
        yield f"{folder} is a folder of {_counted(len(runs))}; name the runs themselves, such as {runs[0].root}"
    else:
        yield f"{folder} is not a run folder: it holds neither run.json nor {STUDY}"


def ask(question: str, *, yes: bool) -> None:
    """Continue if the user agrees; ConfigError if nobody can be asked, or the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} There is no terminal to ask on; add --yes to confirm")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted")


def delete_folder(folder: Path) -> None:
    """Delete a folder or file; it is renamed first, so that nothing ever reads half of it. Links are not followed."""
    leaving = folder.with_name(f".{folder.name}.deleted-{os.getpid()}")
    try:
        folder.rename(leaving)
        if leaving.is_dir() and not leaving.is_symlink():
            shutil.rmtree(leaving)
        else:
            leaving.unlink()
    except OSError as error:
        raise RunFolderError(os_sentence(folder, error)) from None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; targets of links are not counted."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # another process may be deleting too
                total += (Path(root) / name).lstat().st_size
    return total


def size_text(size: int) -> str:
    """`12 KiB`, `3.4 MiB`, `1.2 GiB`."""
    if size < 1 << 20:
        return f"{-(-size // 1024)} KiB"
    return f"{size / 2**20:,.1f} MiB" if size < 1 << 30 else f"{size / 2**30:,.1f} GiB"


def _counted(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
