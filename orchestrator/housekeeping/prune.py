"""Finds what runs and the cache no longer need, each with its size and the reason. Must not import torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.base import JsonValue, flatten
from orchestrator.data.prepared.meta import is_prepared
from orchestrator.errors import EXIT_DONE, ConfigError, OrchestratorError
from orchestrator.files.atomic import read_json
from orchestrator.files.cache import cache_folder
from orchestrator.files.manifest import MANIFEST, file_digest
from orchestrator.housekeeping.remove import ALIVE, ask, delete_folder, size_of, size_text
from orchestrator.monitoring.stage_status import find_runs, pipeline_of, stage_statuses
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.frozen import newer_version, read_config

RECENT_SECONDS = 3600.0
"""Younger cache entries are kept: they may belong to a run that is just starting."""
INTERRUPTED = (".partial", ".deleted")
"""Endings of checkpoints that a kill left half-written or half-deleted; `.old` ones may be the only good copy."""


@dataclass(frozen=True, kw_only=True)
class Dispensable:
    """A folder that nothing needs."""

    path: Path
    why: str
    size: int


def prune(folders: Sequence[Path], *, yes: bool, dry_run: bool) -> int:
    """List what can go, ask, delete. The cache is pruned only for folders of runs: a single run does not know who else
    uses it.
    """
    runs, whole = _runs_of(folders)
    skipped, found = of_runs(runs)
    if whole:
        found += unused_cache(runs, cache_folder())
    for sentence in skipped:
        print(sentence)
    if not found:
        print("nothing to prune")
        return EXIT_DONE
    console = Console()
    console.print(_table(found))
    total = size_text(sum(entry.size for entry in found))
    if dry_run:
        print(f"{total} in all; nothing was deleted")
        return EXIT_DONE
    ask(f"delete these {len(found)} entries, {total}?", yes=yes)
    for entry in found:
        delete_folder(entry.path)
    print(f"deleted {len(found)} entries, {total}")
    return EXIT_DONE


def _runs_of(folders: Sequence[Path]) -> tuple[list[RunFolder], bool]:
    """The runs, and whether a folder of runs was given."""
    found: dict[Path, RunFolder] = {}
    whole = False
    for folder in folders:
        runs = find_runs(folder.resolve()) if folder.is_dir() else []
        if not runs:
            raise ConfigError(
                f"{folder} is not a run folder, and holds none: neither run.json nor NAME/run.json is in it"
            )
        whole |= not RunFolder(folder).is_run
        found |= {run.root: run for run in runs}
    return list(found.values()), whole


def of_runs(runs: Sequence[RunFolder]) -> tuple[list[str], list[Dispensable]]:
    """Sentences about runs that are left alone, and what the others no longer need."""
    skipped = {run.root: f"a link to {run.root.resolve()}; give that folder" for run in runs if run.root.is_symlink()}
    versions = {run.root: newer_version(run) for run in runs if run.root not in skipped}
    # A newer version may need what this one considers dispensable.
    skipped |= {
        root: f"version {version} of the orchestrator wrote it; prune it with that one"
        for root, version in versions.items()
        if version is not None
    }
    own = [run for run in runs if run.root not in skipped]
    skipped |= {
        status.folder: f"stage {status.stage} is {status.state}"
        for status in stage_statuses(own)
        if status.state in ALIVE
    }
    found = [entry for run in own if run.root not in skipped for entry in dispensable(run)]
    return [f"{root}: skipped, {why}" for root, why in skipped.items()], found


def dispensable(run: RunFolder) -> list[Dispensable]:
    """What an inactive run no longer needs; never an artifact in use, never the checkpoint that a resume would take."""
    flat = flatten(read_config(run))
    found: list[Dispensable] = []
    for name in pipeline_of(run):
        files = run.stage(name)
        found += _checkpoints(files, name, flat)
        found += _entries(files.quarantine, "*", "a checkpoint that failed its proof, or that a rollback left behind")
        if files.result.exists():
            found += _entries(run.superseded, f"{name}-*", f"{name} has been rerun since and is proven")
    return [entry for entry in found if _is_inside(entry.path, run.root)]


def _checkpoints(files: StageFolder, name: str, flat: dict[str, JsonValue]) -> Iterator[Dispensable]:
    if not files.checkpoints.is_dir():
        return
    for path in sorted(files.checkpoints.glob(".step-*")):
        if path.name.endswith(INTERRUPTED):
            yield _entry(path, "a save or a deletion that was interrupted")
    steps = checkpoints.saved_steps(files)
    every = flat.get(f"stages.{name}.checkpoint.keep_every")
    keep_every = every if isinstance(every, int) else None
    if files.result.exists():
        if not _is_intact(files):
            return
        gone = [step for step in steps if keep_every is None or step % keep_every]
        yield from (_entry(files.checkpoint(step), f"{name} is finished, and its artifact proven") for step in gone)
        return
    last = flat.get(f"stages.{name}.checkpoint.keep_last")
    keep_last = last if isinstance(last, int) else len(steps)
    gone = _obsolete(files, steps, keep_last=keep_last, keep_every=keep_every)
    why = f"older than the newest {keep_last} (checkpoint.keep_last), and neither the best nor kept by keep_every"
    yield from (_entry(files.checkpoint(step), why) for step in gone)


def _obsolete(files: StageFolder, steps: Sequence[int], *, keep_last: int, keep_every: int | None) -> list[int]:
    """Steps that retention expires and that are older than the newest valid one; the others may be needed to resume."""
    try:
        best = checkpoints.best_step(files)
    except (OrchestratorError, KeyError, TypeError):  # a damaged manifest: the best step is unknown
        return []
    gone = checkpoints.expired_steps(steps, keep_last=keep_last, keep_every=keep_every, best=best)
    proven = checkpoints.newest_valid(files)[0] if gone else None
    return [] if proven is None else [step for step in gone if step < proven.step]


def _is_intact(files: StageFolder) -> bool:
    """Whether the artifact is the proven one; if not, the checkpoints are all that is left of the training."""
    try:
        return file_digest(files.artifact / MANIFEST) == read_json(files.result)["artifact"]["manifest_sha256"]
    except (OSError, OrchestratorError, KeyError, TypeError):
        return False


def unused_cache(runs: Sequence[RunFolder], cache: Path) -> list[Dispensable]:
    """Prepared data and dequantised bases that none of the runs refers to; both are recreated when needed."""
    used = set(_used(runs))
    prepared = [path for path in _old(cache / "data") if is_prepared(path) or path.name.startswith(".building-")]
    models = [path for path in _old(cache / "models") if (path / "config.json").is_file()]
    reasons = [
        *((path, "prepared data that none of these runs uses") for path in prepared),
        *((path, "a dequantised base that none of these runs uses") for path in models),
    ]
    unused = [(path, why) for path, why in reasons if path.name not in used]
    return [_entry(path, why) for path, why in unused if _is_inside(path, cache)]


def _old(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    before = time.time() - RECENT_SECONDS
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.lstat().st_mtime < before)


def _used(runs: Iterable[RunFolder]) -> Iterator[str]:
    """Names of the cache's folders that the runs refer to, which survive a move of the cache."""
    for run in runs:
        for name in pipeline_of(run):
            for file in (run.stage(name).prepared, run.stage(name).result):
                yield from _names(file)


def _names(file: Path) -> Iterator[str]:
    try:
        content: JsonValue = read_json(file) if file.exists() else {}
    except OrchestratorError:
        return
    for value in flatten(content).values():
        if isinstance(value, str) and value.startswith("/"):
            yield from Path(value).parts


def _entries(folder: Path, pattern: str, why: str) -> Iterator[Dispensable]:
    if folder.is_dir():
        yield from (_entry(path, why) for path in sorted(folder.glob(pattern)))


def _entry(path: Path, why: str) -> Dispensable:
    return Dispensable(path=path, why=why, size=size_of(path))


def _is_inside(path: Path, root: Path) -> bool:
    """Whether no link leads out: neither the entry itself nor a folder above it."""
    return not path.is_symlink() and path.resolve().is_relative_to(root.resolve())


def _table(found: Sequence[Dispensable]) -> Any:
    table = Table(box=None, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=1)
    table.add_column("why", overflow="fold", ratio=1)
    for entry in found:
        table.add_row(size_text(entry.size), Text(str(entry.path)), Text(entry.why))
    return table
