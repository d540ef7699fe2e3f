"""Data set + tokenizer -> folders of prepared rows, made once, atomically, named by a digest; no torch, no group.

A hit imports neither transformers nor tokenizers. One process calls this; others wait for its result.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.config.data import DataConfig
from orchestrator.data.prepared.folder import PreparedFolder
from orchestrator.data.prepared.key import PreparedKey, changed_components
from orchestrator.data.prepared.meta import Statistics, is_prepared, read_meta
from orchestrator.data.prepared.parts import PreparedSplit, plan_parts, prepared_folders
from orchestrator.data.row_faults import SHOWN_FAULTS, Fault, fault_sentences
from orchestrator.errors import DataError
from orchestrator.files.cache import locked

Say = Callable[[str], None]
PREPARE_COMMAND = "python -m orchestrator prepare"
TRUNCATION_LIMIT = 0.01
"""Share of the rows that may lose trained tokens before `truncation=accept` is required."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared folders and the statistics counted while they were made."""

    train: Path
    evaluation: Path | None
    train_digest: str
    evaluation_digest: str | None
    train_statistics: Statistics
    evaluation_statistics: Statistics | None
    was_hit: bool
    """Whether everything was already prepared."""


def ensure_prepared(
    config: DataConfig,
    *,
    tokenizer_folder: Path,
    cache: Path,
    seed: int,
    say: Say,
    refuse_over_seconds: float | None = None,
    prepare_command: str = PREPARE_COMMAND,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Prepared:
    """The prepared rows of a configuration, made if missing.

    Raises DataError with every faulty row; if over 1 % of the rows lose trained tokens; if rows of `eval` also occur in
    `train`; and, after half a second of work, if it would take over `refuse_over_seconds`.
    """
    from orchestrator.data.preparation.hub_download import fetch

    root = cache / "data"
    parts = plan_parts(config, tokenizer_folder=tokenizer_folder, cache=root, seed=seed, fetch=fetch)
    missing = [part for part in parts if not is_prepared(root / part.digest)]
    build = Build(config, root, tokenizer_folder, seed, say, refuse_over_seconds, prepare_command, advance)
    problems: list[str] = []
    for part in missing:
        try:
            _prepare(part, build)
        except DataError as error:
            problems += error.problems
    if not problems:
        problems = [*_truncation(root, parts[0], config, say), *_overlap(root, parts, config, say)]
    if problems:
        raise DataError(problems)
    return _prepared(root, parts, was_hit=not missing)


def _prepared(root: Path, parts: tuple[PreparedSplit, ...], *, was_hit: bool) -> Prepared:
    train, evaluation = prepared_folders(root, parts)
    train_meta = read_meta(train)
    evaluation_meta = None if evaluation is None else read_meta(evaluation)
    return Prepared(
        train=train,
        evaluation=evaluation,
        train_digest=train_meta.digest,
        evaluation_digest=None if evaluation_meta is None else evaluation_meta.digest,
        train_statistics=train_meta.statistics,
        evaluation_statistics=None if evaluation_meta is None else evaluation_meta.statistics,
        was_hit=was_hit,
    )


@dataclass(frozen=True, slots=True)
class Build:
    """How missing parts are built, and where."""

    config: DataConfig
    root: Path
    tokenizer_folder: Path
    seed: int
    say: Say
    refuse_over_seconds: float | None
    prepare_command: str
    advance: Callable[[int], None]


def _prepare(part: PreparedSplit, build: Build) -> None:
    """Build one part in its own folder and rename it into place; a second caller waits and finds it done."""
    from orchestrator.data.preparation.build import Limits, build_rows

    root, target = build.root, build.root / part.digest
    limits = Limits(seconds=build.refuse_over_seconds, prepare_command=build.prepare_command, advance=build.advance)
    try:
        with locked(root / f"{part.digest}.lock"):
            if is_prepared(target):
                return
            changed = changed_components(root, PreparedKey(part.key))
            if changed:
                build.say(
                    f"preparing {part.role} rows; compared with the most similar prepared set, these differ: {'; '.join(changed)}"
                )
            building = _fresh_folder(root, part.digest)
            try:
                build_rows(
                    building,
                    part,
                    build.config,
                    tokenizer_folder=build.tokenizer_folder,
                    seed=build.seed,
                    say=build.say,
                    limits=limits,
                )
                _publish(building, target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(f"the prepared rows cannot be written below {root}: {error.strerror or error}") from error


def _fresh_folder(root: Path, digest: str) -> Path:
    """An empty folder to build in. Half-built ones of the same digest are removed: we now hold their builder's lock."""
    for folder in root.glob(f".building-{digest}-{socket.gethostname()}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    building = root / f".building-{digest}-{socket.gethostname()}-{os.getpid()}"
    building.mkdir()
    return building


def _publish(building: Path, target: Path) -> None:
    """Rename the finished folder; if another machine was faster (locks do not span all file systems), keep its copy."""
    from orchestrator.data.preparation.store import sync_folder

    try:
        building.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_prepared(target):
            raise
    sync_folder(target.parent)


def _truncation(root: Path, part: PreparedSplit, config: DataConfig, say: Say) -> list[str]:
    """The error if over 1 % of the rows lose trained tokens; if that is accepted it is only reported."""
    rows = PreparedFolder(root / part.digest)
    statistics = rows.meta.statistics
    number = statistics.rows_losing_trained_tokens
    if number <= TRUNCATION_LIMIT * statistics.source_rows:
        return []
    share = number / statistics.source_rows
    what = (
        f"{number} of {statistics.source_rows} rows ({share:.1%}) lose trained tokens to max_length={config.max_length}"
    )
    if config.truncation == "accept":
        say(f"warning: {what} (truncation=accept)")
        return []
    cut = rows.unit_cut_trained
    units = np.flatnonzero(cut > 0)[:SHOWN_FAULTS].tolist()
    faults = [_fault("truncation", rows, part, unit, f"loses {cut[unit]} trained tokens") for unit in units]
    return [what, *fault_sentences(faults, {"truncation": number})]


def _overlap(root: Path, parts: tuple[PreparedSplit, ...], config: DataConfig, say: Say) -> list[str]:
    """The error if evaluation rows occur verbatim in the training rows."""
    if len(parts) < 2:
        return []
    rows = PreparedFolder(root / parts[1].digest)
    shared = np.flatnonzero(np.isin(rows.unit_hashes, PreparedFolder(root / parts[0].digest).unit_hashes))
    if not len(shared):
        return []
    what = f"{len(shared)} of {len(rows.unit_hashes)} rows of data.eval also appear verbatim in data.train"
    if config.overlap == "accept":
        say(f"warning: {what} (overlap=accept)")
        return []
    units = shared[:SHOWN_FAULTS].tolist()
    faults = [_fault("overlap", rows, parts[1], unit, "also appears in data.train") for unit in units]
    return [what, *fault_sentences(faults, {"overlap": len(shared)})]


def _fault(code: str, rows: PreparedFolder, part: PreparedSplit, unit: int, what: str) -> Fault:
    return Fault(code, rows.where(int(rows.unit_rows[unit]), int(rows.unit_numbers[unit]), part.all_files), what)
