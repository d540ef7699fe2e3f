"""Data set + tokenizer -> a folder of prepared rows, made once, atomically, named by a digest; no torch, no process group.

A hit imports neither transformers nor tokenizers.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.cache import locked
from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.dataset.key import FileHashes, PreparedKey, changed_components, prepared_key
from orchestrator.dataset.prepared import META, Meta, Statistics, is_prepared
from orchestrator.dataset.sources import held_out_source, locate, splits_train
from orchestrator.errors import DataError
from orchestrator.training.data.build import build_rows

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared folders and what was counted while they were made."""

    train: Path
    evaluation: Path | None
    train_digest: str
    evaluation_digest: str | None
    train_statistics: Statistics
    evaluation_statistics: Statistics | None
    was_hit: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One set of rows to prepare: train or evaluation."""

    role: str
    sources: tuple[tuple[SourceConfig, tuple[Path, ...]], ...]
    key: PreparedKey


def ensure_prepared(
    config: DataConfig,
    *,
    tokenizer_folder: Path,
    cache: Path,
    seed: int,
    say: Say,
    refuse_over_seconds: float | None = None,
    prepare_command: str = "python -m orchestrator prepare",
) -> Prepared:
    """The prepared rows of a configuration, made where they are missing. Called by one process; others wait for the folder.

    Raises DataError with every faulty row; and, before any work, where it would take over `refuse_over_seconds`.
    """
    parts = plan_parts(config, tokenizer_folder=tokenizer_folder, cache=cache, seed=seed)
    missing = [part for part in parts if not is_prepared(cache / part.key.digest)]
    for part in missing:
        _prepare(part, config, tokenizer_folder=tokenizer_folder, cache=cache, seed=seed, say=say)
    metas = [Meta.from_json((cache / part.key.digest / META).read_text()) for part in parts]
    folders = [cache / part.key.digest for part in parts]
    has_evaluation = len(parts) > 1
    return Prepared(
        train=folders[0],
        evaluation=folders[1] if has_evaluation else None,
        train_digest=metas[0].digest,
        evaluation_digest=metas[1].digest if has_evaluation else None,
        train_statistics=metas[0].statistics,
        evaluation_statistics=metas[1].statistics if has_evaluation else None,
        was_hit=not missing,
    )


def plan_parts(config: DataConfig, *, tokenizer_folder: Path, cache: Path, seed: int) -> tuple[Part, ...]:
    """Train, and evaluation where there is one, with their keys. Reads no row."""
    hashes = FileHashes(cache)
    train = tuple((source, _files(source, "data.train")) for source in (config.train, *config.mix))
    split = {"fraction": config.eval.fraction, "max_rows": config.eval.max_rows} if splits_train(config) else None
    held_out = held_out_source(config)

    def part(role: str, sources: tuple[tuple[SourceConfig, tuple[Path, ...]], ...], rule: dict[str, Any] | None) -> Part:
        key = prepared_key(
            config, sources, role=role, split=rule, tokenizer_folder=tokenizer_folder, seed=seed, hashes=hashes
        )
        return Part(role, sources, key)

    parts = [part("train", train, split)]
    if split is not None:
        parts.append(part("evaluation", train, split))
    elif held_out is not None:
        parts.append(part("evaluation", ((held_out, _files(held_out, "data.eval")),), None))
    hashes.save()
    return tuple(parts)


def _files(source: SourceConfig, field: str) -> tuple[Path, ...]:
    files = locate(source, field=field)
    if files is None:
        raise DataError(f"{field}.path={source.path} is not on this machine")
    return files


def _prepare(part: Part, config: DataConfig, *, tokenizer_folder: Path, cache: Path, seed: int, say: Say) -> None:
    """Builds one part in a folder of its own and renames it into place; a second caller waits and finds it done."""
    digest = part.key.digest
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{digest}.lock"):
        if is_prepared(cache / digest):
            return
        changed = changed_components(cache, part.key)
        if changed:
            say(f"{part.role} rows must be prepared: {', '.join(changed)} changed since the last time")
        _remove_leftovers(cache, digest)
        building = cache / f".building-{digest}-{socket.gethostname()}-{os.getpid()}"
        building.mkdir()
        try:
            build_rows(building, part, config, tokenizer_folder=tokenizer_folder, seed=seed, say=say)
            building.rename(cache / digest)
        except OSError as error:
            raise DataError(f"{cache} cannot take the prepared rows: {error.strerror or error}") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _remove_leftovers(cache: Path, digest: str) -> None:
    """Half-built folders of the same digest: their maker is gone, since the lock is ours."""
    for folder in cache.glob(f".building-{digest}-{socket.gethostname()}-*"):
        shutil.rmtree(folder, ignore_errors=True)
